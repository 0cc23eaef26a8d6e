// The convolutional layers: stem, MBConv and PatchMerging, by rolling rows.
//
// A bottleneck's hidden map has four to eight times the channels of its input. It never exists: three
// of its rows do, in a ring, for a patch of columns narrow enough that they stay in the cache.
#include <algorithm>
#include <cstring>

#include "layers.hpp"

namespace tinyvit {

Map bordered_map(char* data, int height, int width, long pitch, int border) {
  Map m;
  m.height = height, m.width = width, m.pitch = pitch, m.row = (width + 2 * border) * pitch;
  m.data = data + border * (m.row + pitch);
  std::memset(data, 0, border * m.row);
  std::memset(data + (height + border) * m.row, 0, border * m.row);
  for (int y = 0; y < height; ++y) {
    std::memset(m.at(y, -border), 0, border * pitch);
    std::memset(m.at(y, width), 0, border * pitch);
  }
  return m;
}

namespace {

template <class T>
void point_along(T** pointers, T* start, long pitch, int count) {
  for (int i = 0; i < count; ++i) pointers[i] = start + i * pitch;
}

LinearCall dense_call(const Matrix& weights, const char* in, long pitch, int tokens, bool gelu,
                      char* const* out, char* scratch) {
  return {in, pitch, tokens, 0, tokens, &weights, nullptr, gelu, out, nullptr, scratch};
}

}  // namespace

// -- the stem ---------------------------------------------------------------------------------------

void Stem::make(const Tensors& tensors, Packer& pack, int chans, int width, bool pointwise) {
  is_pointwise = pointwise, in_chans = chans;
  const int side = pointwise ? 1 : 3;
  const Folded a = tensors.conv("patch_embed.seq.0", -1, chans, side);
  const Folded b = tensors.conv("patch_embed.seq.2", width, a.outputs, side);
  half = round_up(a.outputs, kChannelStep), out = round_up(width, kChannelStep);
  Folded columns = a;  // one input for each value that a kernel sees, row by row
  columns.side = 1, columns.inputs = chans * side * side;
  for (int n = 0; n < a.outputs; ++n)
    for (int c = 0; c < chans; ++c)
      for (int t = 0; t < side * side; ++t)
        columns.weight[static_cast<size_t>(n) * columns.inputs + t * chans + c] =
            a.weight[(static_cast<size_t>(n) * chans + c) * side * side + t];
  first = pack.matrix(columns);
  second = pack.matrix(b);
}

namespace {

struct StemSpace {
  float* pixels;  // one row of the image, channels last
  char* lines;    // three rows of the image in the maps' precision, with a border of one pixel
  char* columns;  // what each output of the first convolution sees
  char* ring;     // four rows of its output, with a border of one
  char* zero;
  char* products;
  char** pointers;
  long* taps;
  long line, ring_row;

  StemSpace(Arena& arena, const Stem& stem, const Kernels& k, int width) {
    const int halved = stem.is_pointwise ? width : (width + 1) / 2;
    line = (width + 4) * stem.in_chans * static_cast<long>(k.element);
    ring_row = (halved + 3) * static_cast<long>(stem.half * k.element);
    pixels = arena.take<float>((width + 4) * static_cast<size_t>(stem.in_chans));
    lines = arena.take<char>(3 * line);
    columns = arena.take<char>(static_cast<size_t>(halved) * stem.first.inputs * k.element);
    ring = arena.take<char>(4 * ring_row);
    zero = arena.take<char>(ring_row);
    pointers = arena.take<char*>(halved);
    taps = arena.take<long>(9 * stem.half / kChannelStep);
    const int kept = stem.is_pointwise ? width : (halved + 1) / 2;
    products = take_products(arena, k, halved, stem.first.inputs, kept, stem.second.inputs);
  }
};

// Row y of the image into `line`; a pixel of zeros before it and two behind.
void read_line(const Kernels& k, const Picture& image, int y, int width, float* pixels, char* line) {
  const int c = image.channels, count = (width + 3) * c;
  std::memset(pixels, 0, sizeof(float) * count);
  if (y >= 0 && y < image.height) {
    float* p = pixels + c;
    for (int ch = 0; ch < c; ++ch)
      if (image.planes) {
        const float* from = image.planes + (static_cast<size_t>(ch) * image.height + y) * image.width;
        for (int x = 0; x < image.width; ++x) p[x * c + ch] = from[x];
      } else {
        const uint8_t* from = image.bytes + static_cast<size_t>(y) * image.width * c + ch;
        const float* values = image.values + 256 * ch;
        for (int x = 0; x < image.width; ++x) p[x * c + ch] = values[from[static_cast<size_t>(x) * c]];
      }
  }
  k.from_float(pixels, line, count);
}

// A copy of a few bytes: a call of memcpy for each would cost more than the copying.
inline void copy_words(char* to, const char* from, long bytes) {
  long i = 0;
  for (; i + 8 <= bytes; i += 8) std::memcpy(to + i, from + i, 8);
  for (; i + 2 <= bytes; i += 2) std::memcpy(to + i, from + i, 2);
}

}  // namespace

size_t Stem::scratch(const Kernels& k, int width) const {
  Arena arena(nullptr);
  StemSpace(arena, *this, k, width);
  return arena.used();
}

void Stem::run(const Kernels& k, const Picture& image, int height, int width, const Map& map,
               int top, int bottom, char* scratch) const {
  Arena arena(scratch);
  StemSpace s(arena, *this, k, width);
  const long e = static_cast<long>(k.element), column = first.inputs * e, pixel = in_chans * e;
  std::memset(s.columns, 0, static_cast<size_t>(is_pointwise ? width : (width + 1) / 2) * column);
  if (is_pointwise) {
    for (int y = top; y < bottom; ++y) {
      read_line(k, image, y, width, s.pixels, s.lines);
      for (int x = 0; x < width; ++x)
        copy_words(s.columns + x * column, s.lines + (x + 1) * pixel, pixel);
      point_along(s.pointers, s.ring, half * e, width);
      k.linear(dense_call(first, s.columns, column, width, true, s.pointers, s.products));
      point_along(s.pointers, map.at(y, 0), map.pitch, width);
      k.linear(dense_call(second, s.ring, half * e, width, false, s.pointers, s.products));
    }
    return;
  }
  const int rows = (height + 1) / 2, columns = (width + 1) / 2;
  const long px = half * e;
  for (int i = 0; i < 4; ++i) {
    std::memset(s.ring + i * s.ring_row, 0, px);
    std::memset(s.ring + i * s.ring_row + (columns + 1) * px, 0, 2 * px);
  }
  std::memset(s.zero, 0, s.ring_row);
  int done = 2 * top - 2, read = 4 * top - 6;  // rows of the first convolution and of the image
  for (int y = top; y < bottom; ++y) {
    for (int m = std::max(done + 1, 0); m <= 2 * y + 1 && m < rows; ++m) {
      for (int r = std::max(read + 1, 2 * m - 1); r <= 2 * m + 1; ++r)
        read_line(k, image, r < height ? r : -1, width, s.pixels, s.lines + (r + 3) % 3 * s.line);
      read = 2 * m + 1;
      for (int d = 0; d < 3; ++d) {
        const char* from = s.lines + (2 * m - 1 + d + 3) % 3 * s.line;
        for (int x = 0; x < columns; ++x)
          copy_words(s.columns + x * column + 3 * d * pixel, from + 2 * x * pixel, 3 * pixel);
      }
      point_along(s.pointers, s.ring + (m & 3) * s.ring_row + px, px, columns);
      k.linear(dense_call(first, s.columns, column, columns, true, s.pointers, s.products));
    }
    done = 2 * y + 1;
    long* tap = s.taps;
    for (int d = 0; d < 3; ++d) {
      const int m = 2 * y - 1 + d;
      const char* from = m < 0 || m >= rows ? s.zero : s.ring + (m & 3) * s.ring_row;
      for (int x = 0; x < 3; ++x)
        for (int c = 0; c < half; c += kChannelStep)
          *tap++ = from + x * px + c * e - s.ring;
    }
    point_along(s.pointers, map.at(y, 0), map.pitch, map.width);
    LinearCall call = dense_call(second, s.ring, 2 * px, map.width, false, s.pointers, s.products);
    call.taps = s.taps;
    k.linear(call);
  }
}

// -- MBConv and PatchMerging --------------------------------------------------------------------------

void Bottleneck::make(const Tensors& tensors, Packer& pack, const std::string& name, int dim,
                      int out_dim, int step, bool residual) {
  const Folded a = tensors.conv(name + ".conv1", -1, dim, 1);
  const Folded b = tensors.conv(name + ".conv2", a.outputs, 1, 3);
  expand = pack.matrix(a), local = pack.depthwise(b);
  project = pack.matrix(tensors.conv(name + ".conv3", out_dim, a.outputs, 1));
  stride = step, is_residual = residual;
  in = expand.inputs, hidden = expand.outputs, out = project.outputs;
}

namespace {

struct BottleneckSpace {
  char *ring, *zero, *mid, *products;
  char** pointers;
  const char** residual;
  long ring_row;

  BottleneckSpace(Arena& arena, const Bottleneck& b, const Kernels& k) {
    const int columns = (Bottleneck::kColumns - 1) * b.stride + 3;
    ring_row = columns * static_cast<long>(b.hidden * k.element);
    ring = arena.take<char>(4 * ring_row);
    zero = arena.take<char>(ring_row);
    mid = arena.take<char>(static_cast<size_t>(Bottleneck::kColumns) * b.hidden * k.element);
    pointers = arena.take<char*>(columns);
    residual = arena.take<const char*>(Bottleneck::kColumns);
    products = take_products(arena, k, columns, b.in, Bottleneck::kColumns, b.hidden);
  }
};

}  // namespace

size_t Bottleneck::scratch(const Kernels& k) const {
  Arena arena(nullptr);
  BottleneckSpace(arena, *this, k);
  return arena.used();
}

void Bottleneck::run(const Kernels& k, const Map& from, const Map& to, int top, int bottom, int left,
                     int right, char* scratch) const {
  Arena arena(scratch);
  BottleneckSpace s(arena, *this, k);
  const long px = hidden * static_cast<long>(k.element);
  const int begin = left * stride - 1, end = (right - 1) * stride + 2;  // columns of the input
  const int first = std::max(begin, 0), last = std::min(end, from.width);
  for (int i = 0; i < 4; ++i) {  // columns outside the map are zero; the products do not write there
    std::memset(s.ring + i * s.ring_row, 0, (first - begin) * px);
    std::memset(s.ring + i * s.ring_row + (last - begin) * px, 0, (end - last) * px);
  }
  std::memset(s.zero, 0, s.ring_row);
  int done = top * stride - 2;
  for (int y = top; y < bottom; ++y) {
    const int below = y * stride + 1;
    for (int r = std::max(done + 1, 0); r <= below && r < from.height; ++r) {
      point_along(s.pointers, s.ring + (r & 3) * s.ring_row + (first - begin) * px, px, last - first);
      k.linear(dense_call(expand, from.at(r, first), from.pitch, last - first, true, s.pointers, s.products));
    }
    done = below;
    const char* rows[3];
    for (int d = 0; d < 3; ++d) {
      const int r = y * stride - 1 + d;
      rows[d] = r < 0 || r >= from.height ? s.zero : s.ring + (r & 3) * s.ring_row;
    }
    k.depthwise({rows, px, right - left, stride, &local, true, s.mid, px});
    point_along(s.pointers, to.at(y, left), to.pitch, right - left);
    LinearCall call = dense_call(project, s.mid, px, right - left, is_residual, s.pointers, s.products);
    if (is_residual) {
      point_along<const char>(s.residual, from.at(y, left), from.pitch, right - left);
      call.add = s.residual;
    }
    k.linear(call);
  }
}

}  // namespace tinyvit
