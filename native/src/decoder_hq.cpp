// What Light HQ-SAM adds: a map of details for each image, and a mask that corrects the plain one.
//
// Its last convolution is followed by a product with one filter: both together are nine weights a
// channel, so that only nine numbers and the product with the details are left of each position.
#include <algorithm>
#include <cstring>

#include "decoder_space.hpp"

namespace tinyvit {

void Decoder::load_hq(const Tensors& tensors) {
  const std::string d = "mask_decoder.";
  const int c = channels_, quarter = c / 4, eighth = c / 8;
  const tinyvit_tensor& token = tensors.get(d + "hf_token.weight", {1, c});
  own_tokens_.insert(own_tokens_.end(), token.data, token.data + c);
  hq_mlp_ = mlp(tensors, d + "hf_mlp");
  early_channels_ = static_cast<int>(tensors.get(d + "compress_vit_feat.0.weight", {-1, c, 2, 2}).shape[0]);
  from_early_ = upscaling(tensors, d + "compress_vit_feat", early_channels_, c, false);
  from_features_ = upscaling(tensors, d + "embedding_encoder", c, quarter, false);
  fine1_ = pack_.matrix(tensors.conv(d + "embedding_maskfeature.0", "", quarter, eighth, 3));
  fine_norm_ = norm(tensors, d + "embedding_maskfeature.1", quarter);
  const tinyvit_tensor& last = tensors.get(d + "embedding_maskfeature.3.weight", {eighth, quarter, 3, 3});
  fine2_.assign(last.data, last.data + static_cast<size_t>(eighth) * quarter * 9);
  fine2_bias_ = tensors.vector(d + "embedding_maskfeature.3.bias", eighth);
  is_hq_ = true;
}

void Decoder::detail(const float* early, ImageTokens& image) const {
  const int c = channels_, eighth = c / 8, at_once = kUpscaled, wide = 4 * image.width;
  image.detail.resize(static_cast<size_t>(image.count()) * 16 * eighth);
  Floats tokens(static_cast<size_t>(at_once) * from_early_.first.inputs + kReadBeyond / 4, 0.0f);
  Floats features(static_cast<size_t>(at_once) * c + kReadBeyond / 4);
  Floats between(static_cast<size_t>(at_once) * 4 * c + kReadBeyond / 4), a(static_cast<size_t>(at_once) * 16 * eighth), b(a);
  for (int first = 0; first < image.count(); first += at_once) {
    const int count = std::min(at_once, image.count() - first);
    for (int l = 0; l < count; ++l)
      std::memcpy(&tokens[static_cast<size_t>(l) * from_early_.first.inputs],
                  early + static_cast<size_t>(first + l) * early_channels_, early_channels_ * sizeof(float));
    upscale_tokens(from_early_, tokens.data(), count, between.data(), a.data());
    for (int l = 0; l < count; ++l) {
      const float* with = reinterpret_cast<const float*>(image.tokens.data()) + static_cast<size_t>(first + l) * c;
      for (int i = 0; i < c; ++i) features[static_cast<size_t>(l) * c + i] = with[i] - no_mask_[i];
    }
    upscale_tokens(from_features_, features.data(), count, between.data(), b.data());
    for (int l = 0; l < count; ++l)
      for (int row = 0; row < 4; ++row)
        for (int column = 0; column < 4; ++column) {
          const int y = 4 * ((first + l) / image.width) + row, x = 4 * ((first + l) % image.width) + column;
          const size_t from = (static_cast<size_t>(l) * 16 + quarter(row, column)) * eighth;
          float* to = &image.detail[(static_cast<size_t>(y) * wide + x) * eighth];
          for (int i = 0; i < eighth; ++i) to[i] = a[from + i] + b[from + i];
        }
  }
}

// The high-quality mask, [4h][4w], added to the logits or in their place.
void Decoder::refine(const Prompt& p, const float* map, const Floats& filter, bool adds, float* logits) const {
  const int c = channels_, many = c / 4, few = c / 8, both = many + few, band = 16;
  const int wide = 4 * p.image.width, tall = 4 * p.image.height;
  Packed last(*k_, both, 10);  // nine taps of the mask's features, and the details
  for (int t = 0; t < 9; ++t)
    for (int i = 0; i < many; ++i) {
      float w = 0;
      for (int n = 0; n < few; ++n) w += filter[n] * fine2_[(static_cast<size_t>(n) * many + i) * 9 + t];
      last.at(i, t) = w;
    }
  for (int n = 0; n < few; ++n) last.at(many + n, 9) = filter[n], last.bias[9] += filter[n] * fine2_bias_[n];
  const int results = last.matrix.outputs;
  const long pixel = few * 4L, line = (wide + 2) * pixel;
  std::vector<long> taps;
  for (int t = 0; t < 9; ++t)
    for (int i = 0; i < few; i += kChannelStep) taps.push_back(t / 3 * line + t % 3 * pixel + i * 4L);
  p.team.run((tall + band - 1) / band, [&](int piece, int) {
    const int top = piece * band, bottom = std::min(top + band, tall);
    Floats hidden(static_cast<size_t>(wide) * both + kReadBeyond / 4, 0.0f);
    std::vector<Floats> ring(3, Floats(static_cast<size_t>(wide) * results));
    const Rows at(hidden.data(), wide, both);
    for (int y = top - 1; y <= bottom; ++y) {
      if (y >= 0 && y < tall) {
        k_->linear({bytes(map) + y * line, pixel, wide, 0, wide, &fine1_, taps.data(), false, at.at.data(), nullptr});
        k_->normalize({at.at.data(), wide, many, many, 1e-6f, fine_norm_.gamma, fine_norm_.beta, at.at.data(), true});
        k_->gelu(hidden.data(), hidden.data(), wide * both);
        for (int x = 0; x < wide; ++x)
          std::memcpy(&hidden[static_cast<size_t>(x) * both + many], &p.image.detail[(static_cast<size_t>(y) * wide + x) * few],
                      few * sizeof(float));
        const Rows out(ring[y % 3].data(), wide, results);
        k_->linear({bytes(hidden.data()), both * 4L, wide, 0, wide, &last.matrix, nullptr, false, out.at.data(), nullptr});
      }
      const int row = y - 1;  // whose neighbours are all there now
      if (row < top) continue;
      for (int x = 0; x < wide; ++x) {
        float sum = ring[row % 3][static_cast<size_t>(x) * results + 9];
        for (int dy = std::max(-1, -row); dy <= std::min(1, tall - 1 - row); ++dy)
          for (int dx = std::max(-1, -x); dx <= std::min(1, wide - 1 - x); ++dx)
            sum += ring[(row + dy) % 3][static_cast<size_t>(x + dx) * results + (dy + 1) * 3 + dx + 1];
        float& to = logits[static_cast<size_t>(row) * wide + x];
        to = adds ? to + sum : sum;
      }
    }
  });
}

}  // namespace tinyvit
