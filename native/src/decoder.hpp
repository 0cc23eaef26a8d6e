// SAM's prompt encoder and mask decoder: prompts on an image's features become masks and scores.
#pragma once
#include <functional>
#include <mutex>

#include "layers.hpp"

namespace tinyvit {

// Image tokens [L][C] and their positions, shared by all prompts on an image.
struct ImageTokens {
  int height = 0, width = 0, channels = 0;
  Block tokens, positions, placed;  // features + the embedding of "no mask"; positions; their sum
  std::vector<float> features;  // [L][C] alone, for mask prompts
  int count() const { return height * width; }
};

// Cross attention between few tokens and many image tokens. What multiplies image tokens is moved
// to the side of the few: q . (W k) = (W^T q) . k, and sum(p W v) = W sum(p v).
struct CrossAttention {
  int inner = 0;
  Matrix query, key, value, out;    // of the side that has few tokens: two of the first three
  std::vector<float> wide, bias;    // [inner][C] of what multiplies image tokens for the scores
  std::vector<float> wide_values;   // [inner][C]: value projection, or the output's transposed
  std::vector<float> value_bias, out_bias;
};

struct Norm {
  float *gamma = nullptr, *beta = nullptr;
};

struct TwoWayBlock {
  Matrix query, key, value, out, hidden, shrink;
  Norm norm1, norm2, norm3, norm4;
  CrossAttention to_image, to_tokens;
};

struct Mlp {
  std::vector<Matrix> layers;
};

class Decoder {
 public:
  Decoder(const tinyvit_decoder_config& config, const Tensors& tensors);
  ~Decoder();
  int channels() const { return channels_; }
  int masks(bool multimask) const { return multimask ? num_masks_ - 1 : 1; }
  void prepare(const float* features, int height, int width, ImageTokens& image) const;
  void decode(const ImageTokens& image, const tinyvit_prompts& prompts, float* logits,
              float* scores);

 private:
  struct Space;
  struct Prompt;
  struct Update;
  typedef std::vector<float> Floats;

  Norm norm(const Tensors& tensors, const std::string& name, int channels);
  CrossAttention cross(const Tensors& tensors, const std::string& name, bool to_image);
  Mlp mlp(const Tensors& tensors, const std::string& name);
  Floats linear(const Matrix& m, const Floats& in, int tokens) const;
  void normalize(Floats& rows, int tokens, const Norm& norm) const;
  Floats run_mlp(const Mlp& mlp, const float* in, int outputs) const;
  Floats position(double x, double y) const;
  Floats prompt_tokens(const tinyvit_prompts& prompts, int index) const;
  Floats self_attention(const TwoWayBlock& block, const Floats& placed, const Floats& tokens,
                        int count) const;
  Floats masked_tokens(const ImageTokens& image, const float* mask) const;
  void decode_one(const ImageTokens& image, const tinyvit_prompts& prompts, int index,
                  const Team& team, Space& space, float* logits, float* scores) const;
  Floats attend_image(const CrossAttention& a, const Floats& placed, int count, Prompt& prompt,
                      const Update* update) const;
  const float* place(const Prompt& prompt, const float* x, int first, int count, float* to) const;
  void attend_chunk(Prompt& prompt, const Update* update, const Matrix& scores, int columns,
                    int chunk, int worker) const;
  void update_chunk(const Prompt& prompt, const Update& update, int first, int count, char* scratch,
                    float* x) const;
  void upscale(const Prompt& prompt, const Matrix& filters, int masks, float* logits) const;
  size_t scratch_bytes(int columns) const;

  tinyvit_decoder_config config_;
  const Kernels* k_;
  Packer pack_;
  int channels_ = 0, heads_ = 0, num_masks_ = 0;
  std::vector<TwoWayBlock> blocks_;
  CrossAttention last_;
  Norm last_norm_, up_norm_;
  Matrix up1_, up2_, mask3_;
  Mlp iou_head_;
  std::vector<Mlp> hyper_;
  Floats own_tokens_, frequencies_, points_[4], no_point_, no_mask_;
  Floats mask1_, mask1_bias_, mask1_gamma_, mask1_beta_, mask2_, mask2_bias_, mask2_gamma_, mask2_beta_;
  Pool pool_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Space>> spaces_;
};

}  // namespace tinyvit
