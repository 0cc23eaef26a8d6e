// What an ISA gives: one table of kernels for each precision. Knows nothing of networks.
//
// Maps are [row][column][channel] in memory, a token is one position. The channels of every map are
// padded to a multiple of kChannelStep; padding channels are zero and stay zero. A "row pointer" is
// the address of a token's first channel.
#pragma once
#include <cstddef>
#include <cstdint>

namespace tinyvit {

constexpr int kChannelStep = 32;
// Bytes that kernels may read (never write) behind the last token of a buffer.
constexpr size_t kReadBeyond = 4096;

inline int round_up(int n, int step) { return (n + step - 1) / step * step; }

// The weights of a matrix product, in panels of Kernels::panel outputs; see weights.cpp.
struct Matrix {
  float* panels = nullptr;  // fp32 values, or pairs of bf16 values of neighbouring inputs
  float* bias = nullptr;    // [outputs]
  // For kernels with linear_scratch: [panel][kChannelStep inputs][high, middle, low][half of the panel]
  // [pairs of inputs][outputs][2] bf16 values that sum up to the weights; or null.
  const uint16_t* thirds = nullptr;
  int inputs = 0, outputs = 0;  // padded
  const uint16_t* parts = nullptr;  // of Kernels::split, or none
};

// out[t] = act(W in[t] + bias (+ add[t]))
struct LinearCall {
  const char* in;  // token t lies at in + t / run * jump + t % run * pitch
  long pitch;
  int run;
  long jump;
  int tokens;
  const Matrix* weights;
  const long* taps;  // a convolution: where each kChannelStep inputs lie from the token, in bytes
  bool gelu;
  char* const* out;
  const char* const* add;  // or null
  char* scratch = nullptr;  // linear_scratch bytes; without them products may be slower
};

// A depthwise convolution's weights: [channels / 2 lanes][taps][2][lanes].
struct Depthwise {
  float *taps = nullptr, *bias = nullptr;
  int channels = 0, side = 0;
};

// One row of outputs. in[k] is kernel row k at the column of the first output's leftmost tap.
struct DepthwiseCall {
  const char* const* in;
  long pitch;
  int count, stride;
  const Depthwise* weights;
  bool gelu;
  char* out;
  long out_pitch;
};

// Layer norm over the channels of each token; with gamma and beta or without.
struct NormCall {
  const char* const* in;
  int tokens, channels, padded;
  float eps;
  const float *gamma, *beta;  // [padded], or both null
  char* const* out;
  bool out_is_float;
};

// Attention of all heads within one window.
struct AttendCall {
  const char* const* keys;  // [side * side] row of q, k, v of each position; padding has one too
  const char* queries;      // the rows of the real positions, in order
  long pitch;               // bytes from one row to the next, for queries
  const int* positions;     // [count] which position of the window each query is
  int count;
  int side, heads, width;  // width of a head, padded
  const float* bias;       // [heads][side][2 side - 1][side], see spread_biases
  char* out;               // [count] rows of heads * width
  long out_pitch;
  char* scratch;  // attend_scratch bytes
};

struct Kernels {
  const char* isa;
  int lanes, panel, tile_rows;
  bool is_bf16;
  size_t element;  // bytes of a value in a map
  void (*linear)(const LinearCall&);
  size_t (*linear_scratch)(int tokens, int inputs);  // or null: none is wanted
  void (*depthwise)(const DepthwiseCall&);
  void (*normalize)(const NormCall&);
  void (*attend)(const AttendCall&);
  size_t (*attend_scratch)(int side, int width);
  void (*from_float)(const float* in, char* out, int count);
  void (*to_float)(const char* in, float* out, int count);
  // [tokens] rows -> out[c * plane + t] for the first `channels` channels
  void (*to_planes)(const char* const* rows, int tokens, int channels, float* out, long plane);
  // out[m * plane + t] = filter m . row t, for rows of floats
  void (*project)(const char* const* rows, int tokens, int channels, const float* filters, int count, float* out,
                  long plane);
  void (*gelu)(const float* in, float* out, int count);  // of these three counts are of whole vectors
  void (*exp2)(const float* in, float* out, int count);
  void (*add)(const float* a, const float* b, float* out, int count);
  // x + the sines, then cosines of the sums of two angles, each given by its sines, then cosines
  void (*place)(const float* x, const float* a, const float* b, int half, float* out);
  // Softmax in two parts. The largest value of each column of rows [rows][columns]:
  void (*largest)(const float* scores, int rows, int columns, float* most);
  // 2^(score - most) as turned[column * pitch + row], with zeros behind the last row, and their sums.
  void (*weigh)(const float* scores, int rows, int columns, const float* most, float* turned, int pitch, float* total);
  // Softmax of a row's values h, heads + h, ... below `used` for each head, in place; zeros behind those.
  void (*soften)(float* scores, int rows, long pitch, int columns, int used, int heads);
  void (*add_scaled)(const float* from, float scale, float* to, int count);
  // Lines of logits, see masks.hpp. out = the sum of four rows by their weights; count of whole vectors.
  void (*blend)(const float* const* rows, const float* weights, float* out, int count);
  // out[i] = the sum of weights[k * pitch + i] * line[first[i] + k] for four k; `first` rises.
  void (*expand)(const float* line, const int* first, const float* weights, long pitch, float* out, int count);
  void (*above)(const float* in, int count, float bound, uint64_t* bits);  // count of whole words
  // out[i] = whether what `blend` gives is above the bound
  void (*mark)(const float* const* rows, const float* weights, int count, float bound, uint8_t* out);
  // Where products are quicker by parts of weights: makes them, of four bytes a weight. The 32 weights
  // of input k and of panel p lie at from + k * next_input + p * next_panel; inputs from `there` on are 0.
  void (*split)(const float* from, long next_input, long next_panel, int there, int inputs, int outputs,
                uint16_t* parts) = nullptr;
};

// Null where the library was built without that ISA.
namespace generic { const Kernels* kernels(bool is_bf16); }
namespace avx2 { const Kernels* kernels(bool is_bf16); }
namespace avx512 { const Kernels* kernels(bool is_bf16); }
namespace avx512bf16 { const Kernels* kernels(bool is_bf16); }
namespace amx { const Kernels* kernels(bool is_bf16); const Kernels* splitting_kernels(); }

}  // namespace tinyvit
