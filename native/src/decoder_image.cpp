// The side of the mask decoder with many tokens: attention over the image, and upscaling.
//
// Everything runs over chunks of image tokens that stay in a core's cache: a chunk is changed as
// the block before has left to do, read by the next attention, and its part of the sums is kept.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "decoder_space.hpp"

namespace tinyvit {

size_t Decoder::scratch_bytes(int columns) const {
  Arena arena(nullptr);
  arena.take<float>(static_cast<size_t>(kChunk) * channels_ * 2);  // placed tokens and packed ones
  arena.take<float>(static_cast<size_t>(kChunk) * columns * 2);    // scores, and turned
  Arena other(nullptr);  // see upscale
  other.take<float>(static_cast<size_t>(kUpscaled) * (channels_ + 2 * channels_));
  return std::max(arena.used(), other.used()) + kReadBeyond;
}

// Tokens x = [first, first + count) with their positions.
const float* Decoder::place(const ImageTokens& image, const float* x, int first, int count, float* to) const {
  const size_t c = channels_;
  for (int l = 0; l < count; ++l) {
    const int row = (first + l) / image.width, column = (first + l) % image.width;
    k_->place(x + l * c, &image.along[column * c], &image.down[row * c], static_cast<int>(c / 2), to + l * c);
  }
  return to;
}

// Tokens [first, first + count) of the image, changed as the block before wants it.
void Decoder::update_chunk(const Prompt& p, const Update& u, int first, int count, char* scratch, float* x) const {
  const int c = channels_, columns = u.columns();
  Arena arena(scratch);
  float* placed = arena.take<float>(static_cast<size_t>(kChunk) * c * 2);
  float* scores = arena.take<float>(static_cast<size_t>(kChunk) * columns * 2);
  const float* from = p.source + static_cast<size_t>(first) * c;
  if (u.group) {
    const int inner = p.image.inner;
    const float* queries = reinterpret_cast<const float*>(p.image.queries.data()) + static_cast<size_t>(first) * inner;
    for (size_t g = 0; g < u.scores.size(); ++g) {
      float* part = scores + g * kGroupColumns;
      const Rows rows(part, count, columns);
      k_->linear({bytes(queries + g * u.group * u.width), inner * 4L, count, 0, count, &u.scores[g]->matrix, nullptr, false,
                  rows.at.data(), nullptr});
      k_->soften(part, count, columns, kGroupColumns, u.count * u.group, u.group);
    }
  } else {
    const float* read = place(p.image, from, first, count, placed);
    const Rows rows(scores, count, columns);
    k_->linear({bytes(read), c * 4L, count, 0, count, &u.scores[0]->matrix, nullptr, false, rows.at.data(), nullptr});
    k_->soften(scores, count, columns, columns, u.count * u.heads, u.heads);
  }
  const Rows out(x, count, c), add(const_cast<float*>(from), count, c);
  k_->linear({bytes(scores), columns * 4L, count, 0, count, &u.values.matrix, nullptr, false, out.at.data(),
              add.at.data()});
  k_->normalize({out.at.data(), count, c, c, 1e-5f, u.norm.gamma, u.norm.beta, out.at.data(), true});
}

// A bias that is none.
static float* nothing() {
  static std::vector<float> zeros(1 << 14, 0.0f);
  return zeros.data();
}

// Rows [count][width] as weights of `inputs` inputs, one for each row; zeros behind the last one.
static Matrix as_weights(const Kernels& k, const float* rows, int count, int inputs, int width, float* to) {
  Matrix m;
  m.panels = to, m.bias = nothing(), m.inputs = inputs, m.outputs = width;
  if (k.split) {  // then these alone
    uint16_t* parts = reinterpret_cast<uint16_t*>(to);
    k.split(rows, width, k.panel, count, inputs, width, parts);
    m.parts = parts;
    return m;
  }
  for (int n = 0; n < width; n += k.panel)
    for (int l = 0; l < inputs; ++l) {
      float* at = to + static_cast<long>(n) * inputs + static_cast<long>(l) * k.panel;
      if (l < count) std::memcpy(at, rows + static_cast<long>(l) * width + n, k.panel * sizeof(float));
      else std::memset(at, 0, k.panel * sizeof(float));
    }
  return m;
}

// Sums over all chunks of `width` values for each used column, and of the weights.
void Decoder::merge(const Prompt& p, int columns, int used, int width, Floats& total, Floats& sums) const {
  const float* partial = reinterpret_cast<const float*>(p.space.partial.data());
  Floats most(partial, partial + used);
  total.assign(used, 0.0f), sums.assign(static_cast<size_t>(used) * width, 0.0f);
  for (int k = 1; k < p.chunks(); ++k)
    for (int i = 0; i < used; ++i) most[i] = std::max(most[i], partial[p.partial_each * k + i]);
  for (int k = 0; k < p.chunks(); ++k) {
    const float* part = partial + p.partial_each * k;
    for (int i = 0; i < used; ++i) {
      const float share = std::exp2(part[i] - most[i]);
      if (share < 1e-30f) continue;
      total[i] += share * part[columns + i];
      k_->add_scaled(part + 2 * columns + static_cast<long>(i) * width, share, &sums[static_cast<size_t>(i) * width], width);
    }
  }
}

// How many heads share a panel for so many tokens; 0: there are too many tokens for that.
int Decoder::group(int count) const {
  const int inner = blocks_[0].to_image.inner, width = inner / heads_;
  if (inner % kChannelStep || blocks_[0].to_tokens.inner != inner) return 0;
  for (int g : {8, 4, 2, 1})
    if (heads_ % g == 0 && g * width % kChannelStep == 0 && g * count <= kGroupColumns) return g;
  return 0;
}

// The first block's projections of the image.
void Decoder::share(ImageTokens& image) const {
  const int c = channels_, inner = image.inner = shared_key_.outputs;
  const size_t each = static_cast<size_t>(kChunk) * inner;
  for (Block* b : {&image.keys, &image.queries}) *b = Block(static_cast<size_t>(image.count()) * inner * sizeof(float));
  image.values = Block(static_cast<size_t>(round_up(image.count(), kChannelStep)) * inner * sizeof(float));
  Floats values(each), placed(static_cast<size_t>(kChunk) * c + kReadBeyond / 4);
  for (int first = 0; first < image.count(); first += kChunk) {
    const int count = std::min(kChunk, image.count() - first);
    const auto project = [&](const float* from, const Matrix& weights, float* to) {
      const Rows rows(to, count, inner);
      k_->linear({bytes(from), c * 4L, count, 0, count, &weights, nullptr, false, rows.at.data(), nullptr});
    };
    const size_t at = static_cast<size_t>(first) * inner;
    const float* tokens = reinterpret_cast<const float*>(image.tokens.data()) + static_cast<size_t>(first) * c;
    const float* with_positions = place(image, tokens, first, count, placed.data());
    project(with_positions, shared_key_, reinterpret_cast<float*>(image.keys.data()) + at);
    project(with_positions, shared_query_, reinterpret_cast<float*>(image.queries.data()) + at);
    project(tokens, shared_value_, values.data());
    as_weights(*k_, values.data(), count, round_up(count, kChannelStep), inner,
               reinterpret_cast<float*>(image.values.data()) + at);
  }
}

Decoder::Floats Decoder::attend_shared(const CrossAttention& a, const Floats& placed, int count, Prompt& p) const {
  const int inner = p.image.inner, width = inner / heads_, g = group(count), groups = heads_ / g, part = g * width;
  const int columns = groups * kGroupColumns;
  const Floats queries = linear(a.query, placed, count);
  const float scale = 1.44269504f / std::sqrt(static_cast<float>(width));
  std::vector<std::unique_ptr<Packed>> weights;
  for (int i = 0; i < groups; ++i)
    weights.push_back(grouped(*k_, &queries[static_cast<size_t>(i) * part], inner, count, g, width, scale));
  p.team.run(p.chunks(), [&](int chunk, int worker) {
    const int first = chunk * kChunk, rows = std::min(kChunk, p.image.count() - first), inputs = round_up(rows, kChannelStep);
    Arena arena(p.space.scratch.data() + p.each * worker);
    float* scores = arena.take<float>(static_cast<size_t>(kChunk) * columns * 2);
    float* turned = scores + static_cast<size_t>(kChunk) * columns;
    const size_t at = static_cast<size_t>(first) * inner;
    for (int i = 0; i < groups; ++i) {
      const Rows out(scores + i * kGroupColumns, rows, columns);
      k_->linear({p.image.keys.data() + (at + i * part) * sizeof(float), inner * 4L, rows, 0, rows, &weights[i]->matrix,
                  nullptr, false, out.at.data(), nullptr});
    }
    float* most = reinterpret_cast<float*>(p.space.partial.data()) + p.partial_each * chunk;
    float *total = most + columns, *sums = total + columns;
    k_->largest(scores, rows, columns, most);
    k_->weigh(scores, rows, columns, most, turned, inputs, total);
    for (int i = 0; i < groups; ++i) {
      const size_t from = at + static_cast<size_t>(i) * part * inputs;
      Matrix own;
      own.panels = reinterpret_cast<float*>(p.image.values.data()) + from, own.bias = nothing();
      own.inputs = inputs, own.outputs = part;
      if (k_->split) own.parts = reinterpret_cast<const uint16_t*>(own.panels);
      const Rows out(sums + static_cast<size_t>(i) * kGroupColumns * part, kGroupColumns, part);
      k_->linear({bytes(turned + static_cast<size_t>(i) * kGroupColumns * inputs), inputs * 4L, kGroupColumns, 0,
                  kGroupColumns, &own, nullptr, false, out.at.data(), nullptr});
    }
  });
  Floats total, sums, mixed(static_cast<size_t>(count) * inner);
  merge(p, columns, columns, part, total, sums);
  for (int t = 0; t < count; ++t)
    for (int n = 0; n < inner; ++n) {
      const int h = n / width, column = h / g * kGroupColumns + t * g + h % g;
      mixed[static_cast<size_t>(t) * inner + n] = sums[static_cast<size_t>(column) * part + h % g * width + n % width] / total[column];
    }
  return linear(a.out, mixed, count);
}

// The scores of one chunk, and with 2^(score - largest) the sums of its tokens.
void Decoder::attend_chunk(Prompt& p, const Update* update, const Matrix& weights, int used, int chunk,
                           int worker) const {
  const int columns = weights.outputs;
  const int c = channels_, first = chunk * kChunk, count = std::min(kChunk, p.image.count() - first);
  char* scratch = p.space.scratch.data() + p.each * worker;
  const float* x = p.source + static_cast<size_t>(first) * c;
  if (update) {
    float* changed = p.own + static_cast<size_t>(first) * c;
    update_chunk(p, *update, first, count, scratch, changed);
    x = changed;
  }
  Arena arena(scratch);
  float* placed = arena.take<float>(static_cast<size_t>(kChunk) * c * 2);
  float* packed = placed + static_cast<size_t>(kChunk) * c;
  float* scores = arena.take<float>(static_cast<size_t>(kChunk) * columns * 2);
  float* turned = scores + static_cast<size_t>(kChunk) * columns;
  const float* read = place(p.image, x, first, count, placed);
  const Rows rows(scores, count, columns);
  k_->linear({bytes(read), c * 4L, count, 0, count, &weights, nullptr, false, rows.at.data(), nullptr});

  float* most = reinterpret_cast<float*>(p.space.partial.data()) + p.partial_each * chunk;
  float *total = most + columns, *sums = total + columns;
  const int inputs = round_up(count, kChannelStep);
  k_->largest(scores, count, columns, most);
  k_->weigh(scores, count, columns, most, turned, inputs, total);
  const Matrix tokens = as_weights(*k_, x, count, inputs, c, packed);
  const int rows_used = k_->split ? round_up(used, 32) : used;  // tiles take whole blocks
  const Rows out(sums, rows_used, c);
  k_->linear({bytes(turned), inputs * 4L, rows_used, 0, rows_used, &tokens, nullptr, false, out.at.data(), nullptr});
}

// Attention of the prompt's tokens to the image, which is changed by `update` on the way.
Decoder::Floats Decoder::attend_image(const CrossAttention& a, const Floats& placed, int count, Prompt& p,
                                      const Update* update) const {
  const int c = channels_, width = a.inner / heads_, used = count * heads_;
  Packed weights(*k_, c, used);
  Update::spread(*k_, a, linear(a.query, placed, count), weights, count, heads_, c);
  const int columns = weights.ready(*k_).outputs;
  p.team.run(p.chunks(), [&](int chunk, int worker) { attend_chunk(p, update, weights.matrix, used, chunk, worker); });
  if (update) p.source = p.own;

  Floats total, sums;
  merge(p, columns, used, c, total, sums);
  Floats mixed(static_cast<size_t>(count) * round_up(a.inner, kChannelStep));
  for (int t = 0; t < count; ++t)
    for (int n = 0; n < a.inner; ++n) {
      const int column = t * heads_ + n / width;
      const float *w = &a.wide_values[static_cast<size_t>(n) * c], *s = &sums[static_cast<size_t>(column) * c];
      float dots[8] = {};
      for (int j = 0; j < c; j += 8)
        for (int i = 0; i < 8; ++i) dots[i] += w[j + i] * s[j + i];
      const float dot = ((dots[0] + dots[4]) + (dots[1] + dots[5])) + ((dots[2] + dots[6]) + (dots[3] + dots[7]));
      mixed[static_cast<size_t>(t) * round_up(a.inner, kChannelStep) + n] = dot / total[column] + a.value_bias[n];
    }
  return linear(a.out, mixed, count);
}

// Tokens [count][in] to [16 count][out], in quarters of quarters: [dy][dx][dy2][dx2].
void Decoder::upscale_tokens(const Upscaling& u, const float* tokens, int count, float* between, float* out) const {
  const int middle = u.middle;
  const Rows first_out(between, count, 4L * middle), norms(between, 4 * count, middle);
  const Rows second_out(out, 4 * count, 4L * u.out);
  k_->linear({bytes(tokens), u.first.inputs * 4L, count, 0, count, &u.first, nullptr, false, first_out.at.data(), nullptr});
  k_->normalize({norms.at.data(), 4 * count, middle, middle, 1e-6f, u.norm.gamma, u.norm.beta, norms.at.data(), true});
  k_->gelu(between, between, 4 * count * middle);
  k_->linear({bytes(between), middle * 4L, 4 * count, 0, 4 * count, &u.second, nullptr, u.activates,
              second_out.at.data(), nullptr});
}

// Image tokens to [masks][4h][4w] logits.
void Decoder::upscale(const Prompt& p, const float* filters, int masks, float* logits, float* map) const {
  const int c = channels_, eighth = c / 8, at_once = kUpscaled;
  const int wide = 4 * p.image.width, tall = 4 * p.image.height;
  const size_t plane = static_cast<size_t>(p.image.count()) * 16;
  const int pieces = (p.image.count() + at_once - 1) / at_once;
  const size_t line = (wide + 2) * static_cast<size_t>(eighth);
  if (map) {
    std::fill(map, map + line, 0.0f), std::fill(map + (tall + 1) * line, map + (tall + 2) * line, 0.0f);
    for (int y = 1; y <= tall; ++y)
      for (float* end : {map + y * line, map + (y + 1) * line - eighth}) std::fill(end, end + eighth, 0.0f);
  }
  p.team.run(pieces, [&](int piece, int worker) {
    Arena arena(p.space.scratch.data() + p.each * worker);
    const int first = piece * at_once, count = std::min(at_once, p.image.count() - first);
    float* a = arena.take<float>(static_cast<size_t>(at_once) * c);            // [4 count][C / 4]
    float* b = arena.take<float>(static_cast<size_t>(at_once) * 16 * eighth);  // [16 count][C / 8]
    upscale_tokens(output_, p.own + static_cast<size_t>(first) * c, count, a, b);
    // Logits of a row of the result lie in four rows of four each; q is [dy][dx][dy2][dx2].
    std::vector<const char*> from(4 * count);
    for (int l = 0, next; l < count; l = next) {
      const int y = (first + l) / p.image.width, x = (first + l) % p.image.width;
      next = std::min(count, l + p.image.width - x);
      for (int row = 0; row < 4; ++row) {
        int n = 0;
        for (int i = l; i < next; ++i)
          for (int column = 0; column < 4; ++column) {
            const int q = quarter(row, column);
            from[n++] = bytes(b + (static_cast<long>(i) * 16 + q) * eighth);
            if (map)
              std::memcpy(map + (4 * y + row + 1) * line + (4 * (x + i - l) + column + 1) * static_cast<size_t>(eighth),
                          b + (static_cast<long>(i) * 16 + q) * eighth, eighth * sizeof(float));
          }
        k_->project(from.data(), n, eighth, filters, masks, logits + (4L * y + row) * wide + 4L * x, static_cast<long>(plane));
      }
    }
  });
}

}  // namespace tinyvit
