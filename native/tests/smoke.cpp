// The whole interface from C, small and quick, for sanitizers: sizes, batches, precisions, ISAs,
// outputs, errors, and two nets in two threads. Exits with 1 where a call does not do as it should.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "tinyvit.h"

namespace {

int failures = 0;

void expect(bool is_right, const std::string& what) {
  if (is_right) return;
  std::fprintf(stderr, "smoke: %s\n", what.c_str());
  ++failures;
}

struct Weights {
  std::map<std::string, std::vector<float>> data;
  std::vector<tinyvit_tensor> tensors;
  unsigned state = 1;

  void add(const std::string& name, std::vector<int64_t> shape) {
    size_t count = 1;
    for (int64_t n : shape) count *= n;
    std::vector<float>& v = data[name];
    v.resize(count);
    const float scale = 1.0f / std::sqrt(static_cast<float>(count / shape[0]));
    for (float& x : v) {
      state = state * 1664525u + 1013904223u;
      x = (static_cast<float>(state >> 8) / 8388608.0f - 1.0f) * scale;
    }
    tinyvit_tensor t = {data.find(name)->first.c_str(), v.data(), static_cast<int32_t>(shape.size()), {}};
    for (size_t i = 0; i < shape.size(); ++i) t.shape[i] = shape[i];
    tensors.push_back(t);
  }
  void conv(const std::string& name, int n, int k, int side) {
    add(name + ".weight", {n, k, side, side});
    add(name + ".bias", {n});
  }
  void linear(const std::string& name, int n, int k) {
    add(name + ".weight", {n, k});
    add(name + ".bias", {n});
  }
};

Weights make_weights(const tinyvit_config& c) {
  Weights w;
  const int* d = c.embed_dims;
  const int side = c.stem == TINYVIT_STEM_CONV ? 3 : 1;
  w.conv("patch_embed.seq.0", d[0] / 2, c.in_chans, side);
  w.conv("patch_embed.seq.2", d[0], d[0] / 2, side);
  for (int s = 0; s < c.num_stages; ++s) {
    const std::string stage = "layers." + std::to_string(s);
    for (int i = 0; i < c.depths[s]; ++i) {
      const std::string b = stage + ".blocks." + std::to_string(i);
      if (s == 0) {
        w.conv(b + ".conv1", 3 * d[0], d[0], 1);
        w.conv(b + ".conv2", 3 * d[0], 1, 3);
        w.conv(b + ".conv3", d[0], 3 * d[0], 1);
        continue;
      }
      w.linear(b + ".attn.qkv", 3 * d[s], d[s]);
      w.linear(b + ".attn.proj", d[s], d[s]);
      w.add(b + ".attn.attention_biases", {c.num_heads[s], int64_t(c.window_sizes[s]) * c.window_sizes[s]});
      w.conv(b + ".local_conv", d[s], 1, 3);
      w.linear(b + ".mlp.fc1", 2 * d[s], d[s]);
      w.linear(b + ".mlp.fc2", d[s], 2 * d[s]);
    }
    if (s + 1 == c.num_stages) continue;
    w.conv(stage + ".downsample.conv1", d[s + 1], d[s], 1);
    w.conv(stage + ".downsample.conv2", d[s + 1], 1, 3);
    w.conv(stage + ".downsample.conv3", d[s + 1], d[s + 1], 1);
  }
  const int last = d[c.num_stages - 1];
  w.add("norm_head.weight", {last});
  w.add("norm_head.bias", {last});
  w.add("neck.0.weight", {24, last, 1, 1});
  w.add("neck.2.weight", {24, 24, 3, 3});
  for (const char* n : {"neck.1.weight", "neck.1.bias", "neck.3.weight", "neck.3.bias"}) w.add(n, {24});
  if (c.end == TINYVIT_END_SAM3) {
    w.conv("head.0", 40, last, 1);
    w.conv("head.3", 40, 40, 3);
  } else {
    w.linear("head", 5, last);
  }
  return w;
}

tinyvit_config small_config() {
  tinyvit_config c = TINYVIT_CONFIG_INIT;
  const int dims[] = {16, 32, 48, 64}, depths[] = {1, 1, 2, 1}, heads[] = {1, 2, 3, 2}, windows[] = {1, 3, 4, 7};
  for (int s = 0; s < 4; ++s)
    c.embed_dims[s] = dims[s], c.depths[s] = depths[s], c.num_heads[s] = heads[s], c.window_sizes[s] = windows[s];
  c.head = 1, c.threads = 2;
  return c;
}

// Runs a batch for every output and returns them one after another.
std::vector<float> run(tinyvit_net* net, int batch, int height, int width, bool is_bytes, bool is_own) {
  tinyvit_error error;
  tinyvit_sizes sizes = {};
  sizes.struct_size = sizeof sizes;
  expect(!tinyvit_measure(net, height, width, &sizes, &error), "measure");
  size_t count[8] = {}, total = 0;
  const auto volume = [](const int32_t* s) { return size_t(s[0]) * s[1] * s[2]; };
  count[0] = volume(sizes.embedding), count[1] = sizes.num_logits, count[2] = volume(sizes.early);
  for (int s = 0; s < 4; ++s) count[3 + s] = volume(sizes.stages[s]);
  for (size_t& n : count) total += n *= batch;
  std::vector<float> results(total), pixels(size_t(batch) * height * width * 3);
  std::vector<uint8_t> bytes(pixels.size());
  for (size_t i = 0; i < pixels.size(); ++i) bytes[i] = i * 37 % 251, pixels[i] = (bytes[i] - 125) / 70.0f;
  std::vector<char> space(is_own ? sizes.workspace_bytes : 0);
  tinyvit_outputs out = TINYVIT_OUTPUTS_INIT;
  float* p = results.data();
  out.embedding = p, out.logits = p += count[0], out.early = p += count[1], p += count[2];
  for (int s = 0; s < 4; ++s) out.stages[s] = p, p += count[3 + s];
  if (is_own) out.workspace = space.data(), out.workspace_bytes = space.size();
  tinyvit_images images = TINYVIT_IMAGES_INIT;
  images.pixels = is_bytes ? TINYVIT_BYTES : TINYVIT_FLOAT_PLANES;
  images.data = is_bytes ? static_cast<void*>(bytes.data()) : pixels.data();
  images.batch = batch, images.height = height, images.width = width;
  for (int c = 0; c < 3; ++c) images.mean[c] = 120, images.std[c] = 60;
  expect(!tinyvit_encode(net, &images, &out, &error), error.message);
  return results;
}

void check_isa(const char* isa, int precision, int end) {
  tinyvit_config c = small_config();
  c.isa = isa, c.precision = precision, c.end = end, c.end_size = 9;
  const Weights w = make_weights(c);
  tinyvit_net *net = nullptr, *single = nullptr;
  tinyvit_error error;
  const tinyvit_status status = tinyvit_create(&c, w.tensors.data(), w.tensors.size(), &net, &error);
  if (isa && (status == TINYVIT_UNSUPPORTED || std::strstr(error.message, "unknown instruction set"))) return;
  expect(!status, error.message);
  c.threads = 1;
  expect(!tinyvit_create(&c, w.tensors.data(), w.tensors.size(), &single, &error), error.message);
  if (!net || !single) return;
  const int sizes[][2] = {{1, 1}, {33, 70}, {64, 49}};
  for (const auto& s : sizes)
    for (int batch : {1, 3})
      for (bool is_bytes : {false, true}) {
        const auto a = run(net, batch, s[0], s[1], is_bytes, false);
        const auto b = run(single, batch, s[0], s[1], is_bytes, true);
        expect(!std::memcmp(a.data(), b.data(), a.size() * sizeof(float)), std::string("bits of ") + (isa ? isa : "best"));
        for (float v : a) expect(std::isfinite(v), "a result is not finite");
      }
  std::vector<float> alone = run(net, 2, 40, 40, false, false), one, two;
  std::thread first([&] { one = run(net, 2, 40, 40, false, true); });
  std::thread second([&] { two = run(net, 2, 40, 40, false, false); });
  const auto other = run(single, 2, 40, 40, false, false);
  first.join(), second.join();
  expect(alone == one && alone == two && alone == other, "calls from two threads");
  tinyvit_trim(net);
  tinyvit_destroy(net), tinyvit_destroy(single);
}

constexpr int kEarly = 40;

Weights make_decoder_weights(bool is_hq) {
  Weights w;
  const int c = 256;
  const std::string t = "mask_decoder.transformer.", p = "prompt_encoder.";
  const auto attention = [&](const std::string& name, int inner) {
    for (const char* part : {".q_proj", ".k_proj", ".v_proj"}) w.linear(name + part, inner, c);
    w.linear(name + ".out_proj", c, inner);
  };
  const auto norm = [&](const std::string& name, int n) { w.add(name + ".weight", {n}), w.add(name + ".bias", {n}); };
  for (int i = 0; i < 2; ++i) {
    const std::string b = t + "layers." + std::to_string(i) + ".";
    attention(b + "self_attn", c);
    attention(b + "cross_attn_token_to_image", c / 2), attention(b + "cross_attn_image_to_token", c / 2);
    w.linear(b + "mlp.lin1", 64, c), w.linear(b + "mlp.lin2", c, 64);
    for (int n = 1; n <= 4; ++n) norm(b + "norm" + std::to_string(n), c);
  }
  attention(t + "final_attn_token_to_image", c / 2), norm(t + "norm_final_attn", c);
  w.add("mask_decoder.iou_token.weight", {1, c}), w.add("mask_decoder.mask_tokens.weight", {3, c});
  w.add("mask_decoder.output_upscaling.0.weight", {c, 64, 2, 2}), w.add("mask_decoder.output_upscaling.0.bias", {64});
  norm("mask_decoder.output_upscaling.1", 64);
  w.add("mask_decoder.output_upscaling.3.weight", {64, 32, 2, 2}), w.add("mask_decoder.output_upscaling.3.bias", {32});
  w.linear("mask_decoder.iou_prediction_head.layers.0", 3, c);
  for (int i = 0; i < 3; ++i) w.linear("mask_decoder.output_hypernetworks_mlps." + std::to_string(i) + ".layers.0", 32, c);
  w.add(p + "pe_layer.positional_encoding_gaussian_matrix", {2, c / 2});
  for (int i = 0; i < 4; ++i) w.add(p + "point_embeddings." + std::to_string(i) + ".weight", {1, c});
  w.add(p + "not_a_point_embed.weight", {1, c}), w.add(p + "no_mask_embed.weight", {1, c});
  w.conv(p + "mask_downscaling.0", 4, 1, 2), norm(p + "mask_downscaling.1", 4);
  w.conv(p + "mask_downscaling.3", 16, 4, 2), norm(p + "mask_downscaling.4", 16);
  w.conv(p + "mask_downscaling.6", c, 16, 1);
  if (!is_hq) return w;
  const std::string d = "mask_decoder.";
  w.add(d + "hf_token.weight", {1, c}), w.linear(d + "hf_mlp.layers.0", 32, c);
  const auto upscaling = [&](const std::string& name, int in, int middle) {
    w.add(name + ".0.weight", {in, middle, 2, 2}), w.add(name + ".0.bias", {middle}), norm(name + ".1", middle);
    w.add(name + ".3.weight", {middle, 32, 2, 2}), w.add(name + ".3.bias", {32});
  };
  upscaling(d + "compress_vit_feat", kEarly, c), upscaling(d + "embedding_encoder", c, 64);
  w.conv(d + "embedding_maskfeature.0", 64, 32, 3), norm(d + "embedding_maskfeature.1", 64);
  w.conv(d + "embedding_maskfeature.3", 32, 64, 3);
  return w;
}

// Masks of the prompts in an image, as run lengths and whole.
void check_masks(tinyvit_decoder* decoder, const tinyvit_prepared* prepared, const tinyvit_prompts& prompts, int number,
                 int height, int width, const std::vector<float>& logits) {
  tinyvit_error error;
  tinyvit_placement place = {sizeof place, 16 * height, 16 * width, 16 * height - 9, 16 * width, 203, 511};
  tinyvit_search search = {sizeof search, 0.1f, 0.2f, 0, 210, 600, 7, 80};
  std::vector<uint8_t> masks(size_t(prompts.count) * number * 203 * 511);
  expect(!tinyvit_enlarge(logits.data(), prompts.count * number, 4 * height, 4 * width, &place, 0.1f, masks.data(), nullptr,
                          &error), error.message);
  tinyvit_regions* regions = nullptr;
  expect(!tinyvit_find(decoder, prepared, &prompts, &place, &search, &regions, nullptr, &error), error.message);
  uint64_t count = 0;
  const tinyvit_region* list = tinyvit_regions_list(regions, &count);
  expect(count == static_cast<uint64_t>(prompts.count * number), "regions");
  for (uint64_t i = 0; i < count; ++i) {
    uint64_t area = 0, sum = 0;
    for (size_t k = 0; k < 203 * 511; ++k) area += masks[i * 203 * 511 + k];
    for (uint64_t k = 0; k < list[i].num_counts; ++k) sum += list[i].counts[k];
    expect(area == list[i].area && sum == 210 * 600, "the area of a region");
  }
  search.left = 200;
  tinyvit_regions* none = nullptr;
  expect(tinyvit_find(decoder, prepared, &prompts, &place, &search, &none, nullptr, &error) == TINYVIT_INVALID, "the frame");
  place.covered_width = 3;
  expect(tinyvit_enlarge(logits.data(), 1, 4 * height, 4 * width, &place, 0, masks.data(), nullptr, &error) == TINYVIT_INVALID,
         "logits that do not cover the image");
  tinyvit_regions_destroy(regions), tinyvit_regions_destroy(none);
}

void check_decoder(const char* isa, bool is_hq) {
  const Weights w = make_decoder_weights(is_hq);
  tinyvit_decoder_config c = TINYVIT_DECODER_CONFIG_INIT;
  tinyvit_error error;
  std::vector<float> bits[2];
  const int height = 7, width = 30, count = 3;  // more than one chunk of tokens
  std::vector<float> features(256 * height * width), early(kEarly * height * width), masks(count * 16 * height * width);
  for (size_t i = 0; i < features.size(); ++i) features[i] = (i * 37 % 251 - 125) / 70.0f;
  for (size_t i = 0; i < early.size(); ++i) early[i] = (i * 29 % 231 - 115) / 60.0f;
  for (size_t i = 0; i < masks.size(); ++i) masks[i] = (i * 31 % 241 - 120) / 20.0f;
  const float points[] = {3, 4, 500, 20, 90, 80, 0, 0, 1000, 1, 33, 44}, boxes[] = {1, 2, 3, 4, 9, 8, 700, 600, 5, 5, 90, 95};
  const int32_t labels[] = {1, 0, 1, -1, 0, 1};
  for (int threads : {1, 2}) {
    c.isa = isa, c.threads = threads;
    tinyvit_decoder* decoder = nullptr;
    tinyvit_prepared* prepared = nullptr;
    const tinyvit_status status = tinyvit_decoder_create(&c, w.tensors.data(), w.tensors.size(), &decoder, &error);
    if (isa && (status == TINYVIT_UNSUPPORTED || std::strstr(error.message, "unknown instruction set"))) return;
    expect(!status, error.message);
    if (status) return;
    tinyvit_embedding e = {sizeof e, 256, height, width, features.data(), kEarly, is_hq ? early.data() : nullptr};
    expect(!tinyvit_prepare(decoder, &e, &prepared, &error), error.message);
    for (int kind = 0; kind < 8; ++kind) {
      tinyvit_prompts prompts = {};
      prompts.struct_size = sizeof prompts, prompts.num_points = 2, prompts.multimask = kind & 1;
      if (kind & 1) prompts.points = points, prompts.labels = labels;
      if (kind & 2) prompts.boxes = boxes;
      if (kind & 4) prompts.masks = masks.data();
      int32_t number = 0;
      expect(!tinyvit_decode(decoder, nullptr, &prompts, nullptr, nullptr, &number, &error), error.message);
      prompts.count = count;
      std::vector<float> logits(size_t(count) * number * 16 * height * width), scores(count * number);
      expect(!tinyvit_decode(decoder, prepared, &prompts, logits.data(), scores.data(), nullptr, &error), error.message);
      if (kind == 1) check_masks(decoder, prepared, prompts, number, height, width, logits);
      std::vector<float>& all = bits[threads - 1];
      all.insert(all.end(), logits.begin(), logits.end()), all.insert(all.end(), scores.begin(), scores.end());
    }
    tinyvit_prepared_destroy(prepared);
    e.channels = 64;
    expect(tinyvit_prepare(decoder, &e, &prepared, &error) == TINYVIT_INVALID && !prepared, "channels");
    tinyvit_decoder_destroy(decoder);
  }
  for (float v : bits[0]) expect(std::isfinite(v), "a logit is not finite");
  expect(bits[0] == bits[1], std::string("the decoder's bits of ") + (isa ? isa : "best"));
}

void check_errors() {
  tinyvit_config c = small_config();
  const Weights w = make_weights(c);
  tinyvit_net* net = nullptr;
  tinyvit_error error;
  expect(tinyvit_create(&c, w.tensors.data(), w.tensors.size() / 2, &net, &error) == TINYVIT_INVALID, "missing tensors");
  expect(std::strstr(error.message, "is missing"), error.message);
  c.embed_dims[1] = 31;
  expect(tinyvit_create(&c, w.tensors.data(), w.tensors.size(), &net, &error) == TINYVIT_INVALID, "heads");
  c.struct_size = 1;
  expect(tinyvit_create(&c, w.tensors.data(), w.tensors.size(), &net, nullptr) == TINYVIT_INVALID, "struct_size");
  expect(net == nullptr, "a net after an error");
  tinyvit_destroy(nullptr);
}

}  // namespace

int main() {
  expect(tinyvit_abi_version() == TINYVIT_ABI_VERSION, "ABI version");
  for (const char* isa : {"generic", "avx2", "avx512", "avx512bf16", "amx"})
    for (int precision : {TINYVIT_FP32, TINYVIT_BF16}) check_isa(isa, precision, TINYVIT_END_SAM);
  check_isa(nullptr, TINYVIT_FP32, TINYVIT_END_SAM3);
  for (const char* isa : {"generic", "avx2", "avx512", "amx"})
    for (bool is_hq : {false, true}) check_decoder(isa, is_hq);
  check_errors();
  return failures != 0;
}
