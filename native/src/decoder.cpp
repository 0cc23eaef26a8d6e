// The mask decoder: its weights, the tokens' side, and the order of things for one prompt.
#include "decoder.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu.hpp"
#include "decoder_space.hpp"

namespace tinyvit {
namespace {

const float kLog2e = 1.44269504f;

std::vector<float> transposed(const std::vector<float>& m, int rows, int columns) {
  std::vector<float> t(m.size());
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c) t[static_cast<size_t>(c) * rows + r] = m[static_cast<size_t>(r) * columns + c];
  return t;
}

std::vector<float> values(const tinyvit_tensor& t) {
  size_t count = 1;
  for (int i = 0; i < t.ndim; ++i) count *= t.shape[i];
  return std::vector<float>(t.data, t.data + count);
}

// A 2x2 transposed convolution of stride 2 as a product: outputs are [dy][dx][channel].
Folded transposed_conv(const Tensors& tensors, const std::string& name, int in, int out) {
  const std::vector<float> w = values(tensors.get(name + ".weight", {in, out, 2, 2}));
  const std::vector<float> b = tensors.vector(name + ".bias", out);
  Folded f;
  f.outputs = 4 * out, f.inputs = in;
  f.weight.resize(w.size()), f.bias.resize(4 * out);
  for (int n = 0; n < 4 * out; ++n) {
    f.bias[n] = b[n % out];
    for (int k = 0; k < in; ++k)
      f.weight[static_cast<size_t>(n) * in + k] = w[(static_cast<size_t>(k) * out + n % out) * 4 + n / out];
  }
  return f;
}

}  // namespace

Norm Decoder::norm(const Tensors& tensors, const std::string& name, int channels) {
  return {pack_.floats(tensors.vector(name + ".weight", channels), channels),
          pack_.floats(tensors.vector(name + ".bias", channels), channels)};
}

CrossAttention Decoder::cross(const Tensors& tensors, const std::string& name, bool to_image) {
  CrossAttention a;
  const int c = channels_;
  a.inner = static_cast<int>(tensors.get(name + ".q_proj.weight", {-1, c}).shape[0]);
  if (a.inner % heads_)
    throw Error(TINYVIT_INVALID, "num_heads must divide " + std::to_string(a.inner));
  const float scale = kLog2e / std::sqrt(static_cast<float>(a.inner / heads_));
  const auto weight = [&](const char* part) { return values(tensors.get(name + part, {a.inner, c})); };
  if (to_image) {  // the keys' bias moves all scores of a row alike: softmax does not see it
    a.query = pack_.matrix(tensors.linear(name + ".q_proj", "", a.inner, c));
    a.wide = weight(".k_proj.weight");
    a.bias.assign(a.inner, 0.0f);
    a.wide_values = weight(".v_proj.weight");
    a.value_bias = tensors.vector(name + ".v_proj.bias", a.inner);
    a.out = pack_.matrix(tensors.linear(name + ".out_proj", "", c, a.inner));
  } else {
    a.key = pack_.matrix(tensors.linear(name + ".k_proj", "", a.inner, c));
    a.value = pack_.matrix(tensors.linear(name + ".v_proj", "", a.inner, c));
    a.wide = weight(".q_proj.weight");
    a.bias = tensors.vector(name + ".q_proj.bias", a.inner);
    a.wide_values = transposed(values(tensors.get(name + ".out_proj.weight", {c, a.inner})), c, a.inner);
    a.out_bias = tensors.vector(name + ".out_proj.bias", c);
  }
  for (float& v : a.wide) v *= scale;
  for (float& v : a.bias) v *= scale;
  return a;
}

Mlp Decoder::mlp(const Tensors& tensors, const std::string& name) {
  Mlp m;
  for (int i = 0;; ++i) {
    const std::string layer = name + ".layers." + std::to_string(i);
    if (i && !tensors.has(layer + ".weight")) return m;
    m.layers.push_back(pack_.matrix(tensors.linear(layer, "", -1, i ? -1 : channels_)));
  }
}

Upscaling Decoder::upscaling(const Tensors& tensors, const std::string& name, int in, int middle, bool activates) {
  Upscaling u;
  u.middle = middle, u.out = channels_ / 8, u.activates = activates;
  u.first = with_parts(pack_.matrix(transposed_conv(tensors, name + ".0", in, middle)));
  u.norm = norm(tensors, name + ".1", middle);
  u.second = with_parts(pack_.matrix(transposed_conv(tensors, name + ".3", middle, u.out)));
  return u;
}

// A matrix that meets many tokens.
Matrix Decoder::with_parts(Matrix m) {
  if (k_->split) {
    parts_.emplace_back(2 * sizeof(uint16_t) * m.inputs * m.outputs);
    uint16_t* to = reinterpret_cast<uint16_t*>(parts_.back().data());
    k_->split(m.panels, k_->panel, static_cast<long>(k_->panel) * m.inputs, m.inputs, m.inputs, m.outputs, to);
    m.parts = to;
  }
  return m;
}

Decoder::Decoder(const tinyvit_decoder_config& config, const Tensors& tensors)
    : config_(config),
      k_(choose_kernels(false, config.isa, true)),
      pack_(k_),
      heads_(config.num_heads),
      pool_(config.threads > 0 ? config.threads : cpus()) {
  config_.isa = nullptr;
  const std::string d = "mask_decoder.", p = "prompt_encoder.", t = d + "transformer.";
  const tinyvit_tensor& own = tensors.get(d + "mask_tokens.weight", {-1, -1});
  num_masks_ = static_cast<int>(own.shape[0]), channels_ = static_cast<int>(own.shape[1]);
  const int c = channels_;
  if (c % 256 || num_masks_ < 2 || heads_ < 1 || c % heads_)
    throw Error(TINYVIT_UNSUPPORTED, "the decoder wants a multiple of 256 channels that num_heads divides");
  own_tokens_ = values(tensors.get(d + "iou_token.weight", {1, c}));
  const Floats more = values(own);
  own_tokens_.insert(own_tokens_.end(), more.begin(), more.end());
  for (int i = 0; tensors.has(t + "layers." + std::to_string(i) + ".norm1.weight"); ++i) {
    const std::string name = t + "layers." + std::to_string(i) + ".";
    TwoWayBlock b;
    const auto part = [&](const char* layer, int outputs, int inputs) {
      return pack_.matrix(tensors.linear(name + layer, "", outputs, inputs));
    };
    b.query = part("self_attn.q_proj", c, c), b.key = part("self_attn.k_proj", c, c);
    b.value = part("self_attn.v_proj", c, c), b.out = part("self_attn.out_proj", c, c);
    b.hidden = part("mlp.lin1", -1, c), b.shrink = part("mlp.lin2", c, -1);
    b.norm1 = norm(tensors, name + "norm1", c), b.norm2 = norm(tensors, name + "norm2", c);
    b.norm3 = norm(tensors, name + "norm3", c), b.norm4 = norm(tensors, name + "norm4", c);
    b.to_image = cross(tensors, name + "cross_attn_token_to_image", true);
    b.to_tokens = cross(tensors, name + "cross_attn_image_to_token", false);
    blocks_.push_back(b);
  }
  if (blocks_.empty()) throw Error(TINYVIT_INVALID, "tensor '" + t + "layers.0.norm1.weight' is missing");
  const int inner = blocks_[0].to_image.inner;
  const auto projection = [&](const char* name) {
    return with_parts(pack_.matrix(tensors.linear(t + "layers.0." + name, "", inner, c)));
  };
  shared_key_ = projection("cross_attn_token_to_image.k_proj");
  shared_value_ = projection("cross_attn_token_to_image.v_proj");
  shared_query_ = projection("cross_attn_image_to_token.q_proj");
  last_ = cross(tensors, t + "final_attn_token_to_image", true);
  last_norm_ = norm(tensors, t + "norm_final_attn", c);
  output_ = upscaling(tensors, d + "output_upscaling", c, c / 4, true);
  iou_head_ = mlp(tensors, d + "iou_prediction_head");
  for (int i = 0; i < num_masks_; ++i)
    hyper_.push_back(mlp(tensors, d + "output_hypernetworks_mlps." + std::to_string(i)));
  frequencies_ = values(tensors.get(p + "pe_layer.positional_encoding_gaussian_matrix", {2, c / 2}));
  for (int i = 0; i < 4; ++i)
    points_[i] = values(tensors.get(p + "point_embeddings." + std::to_string(i) + ".weight", {1, c}));
  no_point_ = values(tensors.get(p + "not_a_point_embed.weight", {1, c}));
  no_mask_ = values(tensors.get(p + "no_mask_embed.weight", {1, c}));
  const std::string m = p + "mask_downscaling.";
  const int few = static_cast<int>(tensors.get(m + "0.weight", {-1, 1, 2, 2}).shape[0]);
  const int many = static_cast<int>(tensors.get(m + "3.weight", {-1, few, 2, 2}).shape[0]);
  mask1_ = values(tensors.get(m + "0.weight", {few, 1, 2, 2})), mask1_bias_ = tensors.vector(m + "0.bias", few);
  mask1_gamma_ = tensors.vector(m + "1.weight", few), mask1_beta_ = tensors.vector(m + "1.bias", few);
  mask2_ = values(tensors.get(m + "3.weight", {many, few, 2, 2})), mask2_bias_ = tensors.vector(m + "3.bias", many);
  mask2_gamma_ = tensors.vector(m + "4.weight", many), mask2_beta_ = tensors.vector(m + "4.bias", many);
  mask3_ = pack_.matrix(tensors.conv(m + "6", "", c, many, 1));
  if (tensors.has(d + "hf_token.weight")) load_hq(tensors);
  for (int i = 0; i < pool_.threads(); ++i) spaces_.emplace_back(new Space());
}

Decoder::~Decoder() = default;

// -- few tokens --------------------------------------------------------------------------------------

Decoder::Floats Decoder::linear(const Matrix& m, const Floats& in, int tokens) const {
  // Seven are a click's; eight are taken at once.
  const int padded = tokens > 4 && tokens < 8 ? 8 : tokens;
  Floats out(static_cast<size_t>(padded) * m.outputs), more;
  if (padded > tokens) {
    more.assign(static_cast<size_t>(padded) * m.inputs, 0.0f);
    std::copy(in.begin(), in.begin() + static_cast<size_t>(tokens) * m.inputs, more.begin());
  }
  const Rows rows(out.data(), padded, m.outputs);
  k_->linear({bytes(padded > tokens ? more.data() : in.data()), m.inputs * 4L, padded, 0, padded, &m, nullptr, false,
              rows.at.data(), nullptr});
  out.resize(static_cast<size_t>(tokens) * m.outputs);
  return out;
}

void Decoder::normalize(Floats& rows, int tokens, const Norm& n) const {
  const int channels = static_cast<int>(rows.size()) / tokens;
  std::vector<char*> at(tokens);
  for (int t = 0; t < tokens; ++t) at[t] = reinterpret_cast<char*>(&rows[static_cast<size_t>(t) * channels]);
  k_->normalize({at.data(), tokens, channels, channels, 1e-5f, n.gamma, n.beta, at.data(), true});
}

Decoder::Floats Decoder::run_mlp(const Mlp& mlp, const float* in, int outputs) const {
  Floats x(in, in + channels_);
  for (size_t i = 0; i < mlp.layers.size(); ++i) {
    if (static_cast<int>(x.size()) != mlp.layers[i].inputs)
      throw Error(TINYVIT_UNSUPPORTED, "hidden widths of the decoder's MLPs must be multiples of 32");
    x = linear(mlp.layers[i], x, 1);
    if (i + 1 < mlp.layers.size())
      for (float& v : x) v = v > 0 ? v : 0;
  }
  x.resize(outputs);
  return x;
}

// Of a point in 0 to 1: sines and cosines of random frequencies.
Decoder::Floats Decoder::position(double x, double y) const {
  const int half = channels_ / 2;
  Floats out(channels_);
  for (int i = 0; i < half; ++i) {
    const double angle = 2 * 3.14159265358979323846 * ((2 * x - 1) * frequencies_[i] + (2 * y - 1) * frequencies_[half + i]);
    out[i] = static_cast<float>(std::sin(angle)), out[half + i] = static_cast<float>(std::cos(angle));
  }
  return out;
}

Decoder::Floats Decoder::prompt_tokens(const tinyvit_prompts& p, int index) const {
  Floats tokens = own_tokens_;
  const auto put = [&](const Floats& t) { tokens.insert(tokens.end(), t.begin(), t.end()); };
  const auto place = [&](const float* xy) {
    return position((xy[0] + 0.5) / config_.input_width, (xy[1] + 0.5) / config_.input_height);
  };
  for (int i = 0; p.points && i < p.num_points; ++i) {
    const size_t at = static_cast<size_t>(index) * p.num_points + i;
    const int label = p.labels[at];
    Floats t = label == -1 ? no_point_ : place(p.points + 2 * at);
    if (label == 0 || label == 1) add_to(t, points_[label]);
    put(t);
  }
  if (p.points && !p.boxes) put(no_point_);
  for (int corner = 0; p.boxes && corner < 2; ++corner)
    put(sum_of(place(p.boxes + 4 * static_cast<size_t>(index) + 2 * corner), points_[2 + corner]));
  return tokens;
}

Decoder::Floats Decoder::self_attention(const TwoWayBlock& b, const Floats& placed, const Floats& tokens,
                                        int count) const {
  const Floats q = linear(b.query, placed, count), k = linear(b.key, placed, count), v = linear(b.value, tokens, count);
  const int c = channels_, width = c / heads_;
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  Floats mixed(static_cast<size_t>(count) * c), weights(count);
  for (int h = 0; h < heads_; ++h)
    for (int t = 0; t < count; ++t) {
      const float* query = &q[static_cast<size_t>(t) * c + h * width];
      float most = -INFINITY, total = 0;
      for (int s = 0; s < count; ++s) {
        const float* key = &k[static_cast<size_t>(s) * c + h * width];
        float dot = 0;
        for (int i = 0; i < width; ++i) dot += query[i] * key[i];
        weights[s] = dot * scale, most = std::max(most, weights[s]);
      }
      for (float& w : weights) total += w = std::exp(w - most);
      float* to = &mixed[static_cast<size_t>(t) * c + h * width];
      for (int s = 0; s < count; ++s)
        for (int i = 0; i < width; ++i) to[i] += weights[s] / total * v[static_cast<size_t>(s) * c + h * width + i];
    }
  return linear(b.out, mixed, count);
}

// -- images ------------------------------------------------------------------------------------------

void Decoder::prepare(const float* features, const float* early, int height, int width, ImageTokens& image) const {
  const int c = channels_;
  const size_t count = static_cast<size_t>(height) * width;
  image.height = height, image.width = width, image.channels = c;
  image.tokens = Block(count * c * sizeof(float));
  float* tokens = reinterpret_cast<float*>(image.tokens.data());
  std::vector<const char*> planes(c);
  for (int i = 0; i < c; ++i) planes[i] = reinterpret_cast<const char*>(features + i * count);
  const size_t whole = count / k_->lanes * k_->lanes;  // vectors are read
  k_->to_planes(planes.data(), c, static_cast<int>(whole), tokens, c);
  for (size_t l = whole; l < count; ++l)
    for (int i = 0; i < c; ++i) tokens[l * c + i] = features[i * count + l];
  for (size_t l = 0; l < count; ++l) k_->add(tokens + l * c, no_mask_.data(), tokens + l * c, c);
  image.along = axis(width, config_.grid_width, frequencies_.data());
  image.down = axis(height, config_.grid_height, frequencies_.data() + c / 2);
  share(image);
  if (is_hq_) detail(early, image);
}

// Sines, then cosines of each place along an axis of so many tokens, of `whole`; by turning the first.
Decoder::Floats Decoder::axis(int length, int whole, const float* frequencies) const {
  const int half = channels_ / 2;
  Floats out(static_cast<size_t>(length) * channels_);
  for (int i = 0; i < half; ++i) {
    const double turn = 2 * 3.14159265358979323846 * frequencies[i], step = 2 * turn / whole, first = step / 2 - turn;
    double sine = std::sin(first), cosine = std::cos(first);
    const double s = std::sin(step), c = std::cos(step);
    for (int n = 0; n < length; ++n) {
      float* to = &out[static_cast<size_t>(n) * channels_];
      to[i] = static_cast<float>(sine), to[half + i] = static_cast<float>(cosine);
      const double next = sine * c + cosine * s;
      cosine = cosine * c - sine * s, sine = next;
    }
  }
  return out;
}

// Image tokens with the embedding of a mask prompt [4h][4w] in the place of "no mask".
Decoder::Floats Decoder::masked_tokens(const ImageTokens& image, const float* mask) const {
  const int few = static_cast<int>(mask1_bias_.size()), many = static_cast<int>(mask2_bias_.size());
  const int inputs = mask3_.inputs, wide = 4 * image.width;
  const auto finish = [&](float* x, int n, const Floats& gamma, const Floats& beta) {
    float mean = 0, variance = 0;
    for (int i = 0; i < n; ++i) mean += x[i] / n;
    for (int i = 0; i < n; ++i) variance += (x[i] - mean) * (x[i] - mean) / n;
    const float scale = 1.0f / std::sqrt(variance + 1e-6f);
    for (int i = 0; i < n; ++i) {
      const float v = (x[i] - mean) * scale * gamma[i] + beta[i];
      x[i] = 0.5f * v * (1 + std::erf(v * 0.70710678f));
    }
  };
  Floats small(static_cast<size_t>(image.count()) * inputs), parts(4 * few);
  for (int y = 0; y < image.height; ++y)
    for (int x = 0; x < image.width; ++x) {
      for (int q = 0; q < 4; ++q) {  // the four positions of the map between
        const float* m = mask + (4L * y + 2 * (q / 2)) * wide + 4 * x + 2 * (q % 2);
        for (int n = 0; n < few; ++n) {
          const float* w = &mask1_[4 * n];
          parts[q * few + n] = mask1_bias_[n] + w[0] * m[0] + w[1] * m[1] + w[2] * m[wide] + w[3] * m[wide + 1];
        }
        finish(&parts[q * few], few, mask1_gamma_, mask1_beta_);
      }
      float* out = &small[(static_cast<size_t>(y) * image.width + x) * inputs];
      for (int n = 0; n < many; ++n) {
        float v = mask2_bias_[n];
        for (int i = 0; i < few; ++i)
          for (int q = 0; q < 4; ++q) v += mask2_[(static_cast<size_t>(n) * few + i) * 4 + q] * parts[q * few + i];
        out[n] = v;
      }
      finish(out, many, mask2_gamma_, mask2_beta_);
    }
  Floats masked = linear(mask3_, small, image.count());
  for (int l = 0; l < image.count(); ++l) {
    const float* tokens = reinterpret_cast<const float*>(image.tokens.data()) + static_cast<size_t>(l) * channels_;
    for (int i = 0; i < channels_; ++i) masked[static_cast<size_t>(l) * channels_ + i] += tokens[i] - no_mask_[i];
  }
  return masked;
}

}  // namespace tinyvit
