// The C interface: checks what the caller gives, and turns exceptions into codes and texts.
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>

#include "cpu.hpp"
#include "decoder.hpp"
#include "error.hpp"
#include "masks.hpp"
#include "net.hpp"

using tinyvit::Error;

struct tinyvit_net {
  tinyvit::Net net;
};
struct tinyvit_decoder {
  tinyvit::Decoder decoder;
};
struct tinyvit_prepared {
  tinyvit::ImageTokens image;
};
struct tinyvit_regions {
  std::vector<tinyvit::Region> found;
  std::vector<tinyvit_region> list;
};

namespace {

tinyvit_status report(tinyvit_error* error, tinyvit_status status, const char* text) {
  if (error) {
    error->status = status;
    std::snprintf(error->message, sizeof error->message, "%s", text);
  }
  return status;
}

template <class F>
tinyvit_status guarded(tinyvit_error* error, const F& f) {
  try {
    f();
    return report(error, TINYVIT_OK, "");
  } catch (const Error& e) {
    return report(error, e.status, e.what());
  } catch (const std::bad_alloc&) {
    return report(error, TINYVIT_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& e) {
    return report(error, TINYVIT_INTERNAL, e.what());
  } catch (...) {
    return report(error, TINYVIT_INTERNAL, "unknown fault");
  }
}

void require(bool is_right, const std::string& text) {
  if (!is_right) throw Error(TINYVIT_INVALID, text);
}

template <class T>
void check_struct(const T* p, const char* name) {
  require(p != nullptr, std::string(name) + " is null");
  require(p->struct_size == sizeof(T),
          std::string(name) + ".struct_size must be " + std::to_string(sizeof(T)) + ", got " +
              std::to_string(p->struct_size) + ": header and library differ");
}

std::string got(const char* name, long value) { return std::string(name) + ", got " + std::to_string(value); }

void check(const tinyvit_config& c) {
  require(c.in_chans >= 1 && c.in_chans <= TINYVIT_MAX_CHANNELS, got("in_chans must be 1 to 16", c.in_chans));
  require(c.num_stages >= 1 && c.num_stages <= TINYVIT_MAX_STAGES, got("num_stages must be 1 to 8", c.num_stages));
  for (int s = 0; s < c.num_stages; ++s) {
    require(c.embed_dims[s] >= 1 && c.embed_dims[s] <= 1 << 16, got("embed_dims must be 1 to 65536", c.embed_dims[s]));
    require(c.depths[s] >= 0 && c.depths[s] <= 1 << 10, got("depths must be 0 to 1024", c.depths[s]));
    if (s && c.depths[s]) {
      require(c.num_heads[s] >= 1 && c.embed_dims[s] % c.num_heads[s] == 0,
              got("num_heads must divide embed_dims", c.num_heads[s]));
      require(c.window_sizes[s] >= 1 && c.window_sizes[s] <= 128, got("window_sizes must be 1 to 128", c.window_sizes[s]));
    }
    if (s + 1 < c.num_stages) require(c.strides[s] == 1 || c.strides[s] == 2, got("strides must be 1 or 2", c.strides[s]));
  }
  require(c.stem == TINYVIT_STEM_CONV || c.stem == TINYVIT_STEM_POINTWISE, got("unknown stem", c.stem));
  require(c.end >= TINYVIT_END_NONE && c.end <= TINYVIT_END_SAM3, got("unknown end", c.end));
  require(c.end != TINYVIT_END_SAM3 || (c.end_size >= 1 && c.end_size <= 4096), got("end_size must be 1 to 4096", c.end_size));
  require(c.precision == TINYVIT_FP32 || c.precision == TINYVIT_BF16, got("unknown precision", c.precision));
  require(c.threads >= 0 && c.threads <= 1024, got("threads must be 0 to 1024", c.threads));
}

void check_size(int height, int width) {
  const long kMost = 1 << 16;
  require(height >= 1 && width >= 1 && height <= kMost && width <= kMost,
          "height and width must be 1 to 65536, got " + std::to_string(height) + " and " + std::to_string(width));
}

void check(const tinyvit_images& i, int channels) {
  require(i.pixels == TINYVIT_FLOAT_PLANES || i.pixels == TINYVIT_BYTES, got("unknown pixels", i.pixels));
  require(i.batch >= 0, got("batch must not be negative", i.batch));
  check_size(i.height, i.width);
  require(i.data != nullptr || i.batch == 0, "images.data is null");
  const auto fits = [](int padded, int length) { return padded == 0 || padded >= length; };
  require(fits(i.padded_height, i.height) && fits(i.padded_width, i.width),
          "padded_height and padded_width must be 0 or at least height and width");
  if (i.padded_height || i.padded_width)
    check_size(i.padded_height ? i.padded_height : i.height, i.padded_width ? i.padded_width : i.width);
  for (int c = 0; i.pixels == TINYVIT_BYTES && c < channels; ++c)
    require(i.std[c] != 0.0f, "images.std must not be 0");
}

void check(const tinyvit_placement* p) {
  check_struct(p, "placement");
  check_size(p->covered_height, p->covered_width);
  check_size(p->resized_height, p->resized_width);
  check_size(p->original_height, p->original_width);
}

void check(const tinyvit_decoder& decoder, const tinyvit_prepared* prepared, const tinyvit_prompts& prompts) {
  require(prepared != nullptr, "prepared is null");
  require(prepared->image.channels == decoder.decoder.channels(), "prepared belongs to another decoder");
  require(!prompts.points || (prompts.labels && prompts.num_points >= 0 && prompts.num_points <= 1 << 12),
          got("points want labels, and at most 4096 of them", prompts.num_points));
  require(!prompts.hq_only || decoder.decoder.is_hq(), "hq_only wants Light HQ-SAM's decoder");
}

}  // namespace

extern "C" {

uint32_t tinyvit_abi_version(void) { return TINYVIT_ABI_VERSION; }

const char* tinyvit_version(void) { return TINYVIT_VERSION; }

int32_t tinyvit_has_bf16(void) {
  bool is_native = false;
  guarded(nullptr, [&] { is_native = tinyvit::multiplies_bf16(*tinyvit::choose_kernels(true, nullptr)); });
  return is_native;
}

tinyvit_status tinyvit_create(const tinyvit_config* config, const tinyvit_tensor* tensors, size_t count,
                              tinyvit_net** net, tinyvit_error* error) {
  return guarded(error, [&] {
    require(net != nullptr, "net is null");
    *net = nullptr;
    check_struct(config, "config");
    check(*config);
    require(tensors != nullptr || count == 0, "tensors is null");
    *net = new tinyvit_net{{*config, tinyvit::Tensors(tensors, count)}};
  });
}

void tinyvit_destroy(tinyvit_net* net) { delete net; }

tinyvit_status tinyvit_describe(const tinyvit_net* net, tinyvit_info* info, tinyvit_error* error) {
  return guarded(error, [&] {
    require(net != nullptr, "net is null");
    check_struct(info, "info");
    net->net.describe(*info);
  });
}

tinyvit_status tinyvit_measure(const tinyvit_net* net, int32_t height, int32_t width, tinyvit_sizes* sizes,
                               tinyvit_error* error) {
  return guarded(error, [&] {
    require(net != nullptr, "net is null");
    check_struct(sizes, "sizes");
    check_size(height, width);
    net->net.measure(net->net.plan(height, width), *sizes);
  });
}

tinyvit_status tinyvit_encode(tinyvit_net* net, const tinyvit_images* images, const tinyvit_outputs* outputs,
                              tinyvit_error* error) {
  return guarded(error, [&] {
    require(net != nullptr, "net is null");
    check_struct(images, "images");
    check_struct(outputs, "outputs");
    check(*images, net->net.in_chans());
    net->net.check(*images, *outputs);
    net->net.encode(*images, *outputs);
  });
}

void tinyvit_trim(tinyvit_net* net) {
  if (net) net->net.trim();
}

tinyvit_status tinyvit_decoder_create(const tinyvit_decoder_config* config, const tinyvit_tensor* tensors, size_t count,
                                      tinyvit_decoder** decoder, tinyvit_error* error) {
  return guarded(error, [&] {
    require(decoder != nullptr, "decoder is null");
    *decoder = nullptr;
    check_struct(config, "config");
    check_size(config->grid_height, config->grid_width);
    check_size(config->input_height, config->input_width);
    require(config->threads >= 0 && config->threads <= 1024, got("threads must be 0 to 1024", config->threads));
    require(tensors != nullptr || count == 0, "tensors is null");
    *decoder = new tinyvit_decoder{{*config, tinyvit::Tensors(tensors, count)}};
  });
}

void tinyvit_decoder_destroy(tinyvit_decoder* decoder) { delete decoder; }

tinyvit_status tinyvit_prepare(const tinyvit_decoder* decoder, const tinyvit_embedding* embedding,
                               tinyvit_prepared** prepared, tinyvit_error* error) {
  return guarded(error, [&] {
    require(decoder && prepared, "decoder or prepared is null");
    *prepared = nullptr;
    check_struct(embedding, "embedding");
    const tinyvit_embedding& e = *embedding;
    check_size(e.height, e.width);
    require(e.features != nullptr, "embedding.features is null");
    require(e.channels == decoder->decoder.channels(), got("the features have the wrong channels", e.channels));
    if (decoder->decoder.is_hq()) {
      require(e.early != nullptr, "Light HQ-SAM's decoder wants embedding.early");
      require(e.early_channels == decoder->decoder.early_channels(),
              got("the early map has the wrong channels", e.early_channels));
    }
    std::unique_ptr<tinyvit_prepared> p(new tinyvit_prepared());
    decoder->decoder.prepare(e.features, e.early, e.height, e.width, p->image);
    *prepared = p.release();
  });
}

void tinyvit_prepared_destroy(tinyvit_prepared* prepared) { delete prepared; }

uint64_t tinyvit_prepared_bytes(const tinyvit_prepared* prepared) {
  return prepared ? prepared->image.bytes() : 0;
}

tinyvit_status tinyvit_decode(tinyvit_decoder* decoder, const tinyvit_prepared* prepared, const tinyvit_prompts* prompts,
                              float* logits, float* scores, int32_t* num_masks, tinyvit_error* error) {
  return guarded(error, [&] {
    require(decoder != nullptr, "decoder is null");
    check_struct(prompts, "prompts");
    if (num_masks) *num_masks = decoder->decoder.masks(prompts->multimask != 0);
    require(prompts->count >= 0, got("count must not be negative", prompts->count));
    if (!prompts->count) return;
    require(logits && scores, "logits or scores is null");
    check(*decoder, prepared, *prompts);
    decoder->decoder.decode(prepared->image, *prompts, logits, scores);
  });
}

tinyvit_status tinyvit_enlarge(const float* logits, int32_t count, int32_t height, int32_t width,
                               const tinyvit_placement* placement, float threshold, uint8_t* masks, float* values,
                               tinyvit_error* error) {
  return guarded(error, [&] {
    require(count >= 0, got("count must not be negative", count));
    check_size(height, width);
    check(placement);
    if (!count) return;
    require(logits && (masks || values), "logits or the result is null");
    const tinyvit::Enlarger enlarger(tinyvit::choose_kernels(false, nullptr), height, width, *placement);
    const size_t each = static_cast<size_t>(placement->original_height) * placement->original_width;
    for (int i = 0; i < count; ++i)
      enlarger.enlarge(logits + static_cast<size_t>(i) * height * width, threshold, masks ? masks + i * each : nullptr,
                       values ? values + i * each : nullptr);
  });
}

tinyvit_status tinyvit_find(tinyvit_decoder* decoder, const tinyvit_prepared* prepared, const tinyvit_prompts* prompts,
                            const tinyvit_placement* placement, const tinyvit_search* search,
                            tinyvit_regions** regions, float* scores, tinyvit_error* error) {
  return guarded(error, [&] {
    require(decoder && regions, "decoder or regions is null");
    *regions = nullptr;
    check_struct(prompts, "prompts");
    check_struct(search, "search");
    check(placement);
    require(prompts->count >= 0, got("count must not be negative", prompts->count));
    check(*decoder, prepared, *prompts);
    const tinyvit_search& s = *search;
    require(s.offset >= 0, "search.offset must not be negative");
    check_size(s.frame_height, s.frame_width);
    require(s.top >= 0 && s.left >= 0 && s.top <= s.frame_height - placement->original_height &&
                s.left <= s.frame_width - placement->original_width,
            "the image does not lie within search's frame");
    std::unique_ptr<tinyvit_regions> r(new tinyvit_regions());
    r->found = decoder->decoder.find(prepared->image, *prompts, *placement, s, scores);
    for (const tinyvit::Region& f : r->found)
      r->list.push_back({f.prompt, f.mask, f.score, f.stability, {f.box[0], f.box[1], f.box[2], f.box[3]}, f.area,
                         f.counts.empty() ? nullptr : f.counts.data(), f.counts.size()});
    *regions = r.release();
  });
}

const tinyvit_region* tinyvit_regions_list(const tinyvit_regions* regions, uint64_t* count) {
  if (count) *count = regions ? regions->list.size() : 0;
  return regions ? regions->list.data() : nullptr;
}

void tinyvit_regions_destroy(tinyvit_regions* regions) { delete regions; }

}  // extern "C"
