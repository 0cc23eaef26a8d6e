// Prompts on an image, one for each thread or one for all: the order of things for each.
#include <algorithm>
#include <cstring>

#include "decoder_space.hpp"

namespace tinyvit {
// Calls work for each prompt: many go to one thread each, one is shared by all.
void Decoder::run(int count, const std::function<void(int, const Team&, Space&)>& work) {
  std::lock_guard<std::mutex> lock(mutex_);
  const bool is_ours = pool_.acquire();
  std::string fault;
  bool is_memory = false;
  std::mutex fault_mutex;
  const auto guarded = [&](int i, const Team& team, Space& space) {
    try {
      work(i, team, space);
    } catch (const std::bad_alloc&) {
      std::lock_guard<std::mutex> guard(fault_mutex);
      is_memory = true;
    } catch (const std::exception& e) {
      std::lock_guard<std::mutex> guard(fault_mutex);
      fault = *e.what() ? e.what() : "fault";
    }
  };
  if (is_ours && count > 1) {
    pool_.run(count, [&](int i, int worker) { guarded(i, Team(nullptr, 0), *spaces_[worker]); });
  } else {
    for (int i = 0; i < count; ++i) guarded(i, Team(is_ours ? &pool_ : nullptr, 0), *spaces_[0]);
  }
  if (is_ours) pool_.release();
  if (is_memory) throw std::bad_alloc();
  if (!fault.empty()) throw Error(TINYVIT_INTERNAL, fault);
}

void Decoder::decode(const ImageTokens& image, const tinyvit_prompts& prompts, float* logits, float* scores) {
  const int count = masks(prompts.multimask != 0);
  const size_t each = static_cast<size_t>(count) * image.count() * 16;
  run(prompts.count, [&](int i, const Team& team, Space& space) {
    decode_one(image, prompts, i, team, space, logits + i * each, scores + static_cast<size_t>(i) * count);
  });
}

std::vector<Region> Decoder::find(const ImageTokens& image, const tinyvit_prompts& prompts,
                                  const tinyvit_placement& placement, const tinyvit_search& search, float* scores) {
  const int count = masks(prompts.multimask != 0);
  const size_t plane = static_cast<size_t>(image.count()) * 16;
  const Enlarger enlarger(k_, 4 * image.height, 4 * image.width, placement);
  std::vector<std::vector<Region>> found(prompts.count);
  run(prompts.count, [&](int i, const Team& team, Space& space) {
    std::vector<float> own(count), logits(plane * count);
    const std::vector<bool> wanted = decode_one(image, prompts, i, team, space, logits.data(), own.data());
    if (scores) std::copy(own.begin(), own.end(), scores + static_cast<size_t>(i) * count);
    for (int m = 0; m < count; ++m) {
      if (!wanted[m]) continue;
      Region r;
      r.prompt = i, r.mask = m, r.score = own[m];
      enlarger.find(logits.data() + m * plane, search, r);
      found[i].push_back(std::move(r));
    }
  });
  std::vector<Region> all;
  for (auto& some : found) std::move(some.begin(), some.end(), std::back_inserter(all));
  return all;
}

Decoder::Floats Decoder::transform(const ImageTokens& image, const tinyvit_prompts& prompts, int index,
                                   Prompt& p) const {
  const int c = channels_;
  const Floats prompt = prompt_tokens(prompts, index);
  const int count = p.count = static_cast<int>(prompt.size()) / c;
  Floats masked;
  if (prompts.masks) {
    masked = masked_tokens(image, prompts.masks + static_cast<size_t>(index) * image.count() * 16);
    p.source = masked.data();
  }
  const int shared = prompts.masks ? 0 : group(count);
  int columns = round_up(count * heads_, kChannelStep);
  if (shared) columns = std::max(columns, heads_ / shared * kGroupColumns);
  p.reserve(c, scratch_bytes(columns), columns);
  Floats tokens = prompt;
  std::unique_ptr<Update> update;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    const TwoWayBlock& b = blocks_[i];
    if (i == 0) tokens = self_attention(b, tokens, tokens, count);
    else add_to(tokens, self_attention(b, sum_of(tokens, prompt), tokens, count));
    normalize(tokens, count, b.norm1);
    const Floats placed = sum_of(tokens, prompt);
    add_to(tokens, i == 0 && shared ? attend_shared(b.to_image, placed, count, p)
                                    : attend_image(b.to_image, placed, count, p, update.get()));
    normalize(tokens, count, b.norm2);
    Floats hidden = linear(b.hidden, tokens, count);
    for (float& v : hidden) v = v > 0 ? v : 0;
    add_to(tokens, linear(b.shrink, hidden, count));
    normalize(tokens, count, b.norm3);
    update.reset(new Update(b.to_tokens, b.norm4, *k_, linear(b.to_tokens.key, sum_of(tokens, prompt), count),
                            linear(b.to_tokens.value, tokens, count), count, heads_, c, i == 0 ? shared : 0));
  }
  add_to(tokens, attend_image(last_, sum_of(tokens, prompt), count, p, update.get()));
  normalize(tokens, count, last_norm_);
  return tokens;
}

std::vector<bool> Decoder::decode_one(const ImageTokens& image, const tinyvit_prompts& prompts, int index,
                                      const Team& team, Space& space, float* logits, float* scores) const {
  const int c = channels_;
  Prompt p{image, team, space, reinterpret_cast<const float*>(image.tokens.data()), nullptr, 0};
  const Floats tokens = transform(image, prompts, index, p);
  const Floats iou = run_mlp(iou_head_, tokens.data(), num_masks_);
  const bool many = prompts.multimask != 0;
  std::vector<int> which;  // of the mask tokens
  if (is_hq_) which = {many ? static_cast<int>(std::max_element(iou.begin() + 1, iou.end()) - iou.begin()) : 0};
  else
    for (int m = 0; m < masks(many); ++m) which.push_back(many ? m + 1 : 0);
  std::vector<bool> wanted(which.size());
  std::vector<int> slots;
  Floats filters;
  for (size_t m = 0; m < which.size(); ++m) {
    scores[m] = iou[which[m]];
    wanted[m] = !prompts.min_score || scores[m] > *prompts.min_score;
    if (!wanted[m]) continue;
    const Floats f = run_mlp(hyper_[which[m]], &tokens[static_cast<size_t>(1 + which[m]) * c], c / 8);
    filters.insert(filters.end(), f.begin(), f.end());
    slots.push_back(static_cast<int>(m));
  }
  if (slots.empty()) return wanted;
  float* map = nullptr;
  if (is_hq_) {
    const size_t bytes = (4 * image.height + 2) * static_cast<size_t>(4 * image.width + 2) * (c / 8) * sizeof(float);
    map = reinterpret_cast<float*>(Space::grown(space.map, bytes));
  }
  upscale(p, filters.data(), static_cast<int>(slots.size()), logits, map);
  if (is_hq_) {
    const Floats f = run_mlp(hq_mlp_, &tokens[static_cast<size_t>(1 + num_masks_) * c], c / 8);
    refine(p, map, f, !prompts.hq_only, logits);
  }
  const size_t plane = static_cast<size_t>(image.count()) * 16;
  for (size_t k = slots.size(); k-- > 0;)  // from the last to its place on
    if (static_cast<size_t>(slots[k]) != k) std::memcpy(logits + slots[k] * plane, logits + k * plane, plane * sizeof(float));
  return wanted;
}

}  // namespace tinyvit
