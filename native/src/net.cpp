// The walk of a batch through the network.
//
// Two ways to use threads: the pieces of each layer of one image, or, for a batch, one image for each
// thread with nothing to wait for, even where other work takes a core. Both give the same bits.
#include "net.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cpu.hpp"

namespace tinyvit {
namespace {

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Images of a batch go to threads whole while the maps of all threads are below this.
constexpr size_t kMostMaps = size_t(512) << 20;

// About how many tokens a patch of the perceptron has: its hidden values stay in the cache, and weights
// that do not are read once for all of them.
constexpr int kPatchTokens = 192, kPatchColumns = 128;

struct Patches {
  int columns, rows, across, down;  // of a patch; number of them

  // `most` columns and about `tokens` tokens at a time, but at least a piece for each thread
  Patches(const Map& map, int most, int tokens, int threads) {
    across = ceil_div(map.width, most);
    columns = ceil_div(map.width, across);
    rows = std::max(tokens / columns, 1);
    if (threads > 1) rows = std::min(rows, std::max(map.height * across / (2 * threads), 1));
    down = ceil_div(map.height, rows);
  }
  int count() const { return across * down; }
  template <class F>
  void at(int index, const Map& map, const F& f) const {
    const int top = index / across * rows, left = index % across * columns;
    if (top < map.height && left < map.width)
      f(top, std::min(top + rows, map.height), left, std::min(left + columns, map.width));
  }
};

}  // namespace

// What one call of encode shares between its images.
struct Net::Job {
  const tinyvit_images& images;
  const tinyvit_outputs& outputs;
  const Plan& plan;
  const float* values;  // of bytes
  int last_stage;       // nothing behind it is wanted
  bool wants_end;
};

Net::Net(const tinyvit_config& config, const Tensors& tensors)
    : config_(config),
      kernels_(choose_kernels(config.precision == TINYVIT_BF16, config.isa)),
      float_kernels_(choose_kernels(false, config.isa)),
      pack_(kernels_, true),
      float_pack_(float_kernels_),
      pool_(config.threads > 0 ? config.threads : cpus()) {
  config_.isa = nullptr;  // the caller's memory
  stem_.make(tensors, pack_, config.in_chans, config.embed_dims[0],
             config.stem == TINYVIT_STEM_POINTWISE);
  stages_.resize(config.num_stages);
  for (int s = 0; s < config.num_stages; ++s) {
    Stage& stage = stages_[s];
    const std::string name = "layers." + std::to_string(s);
    const int dim = config.embed_dims[s];
    stage.channels = dim, stage.padded = round_up(dim, kChannelStep);
    for (int i = 0; i < config.depths[s]; ++i) {
      const std::string block = name + ".blocks." + std::to_string(i);
      if (s == 0) {
        stage.convs.emplace_back();
        stage.convs.back().make(tensors, pack_, block, dim, dim, 1, true);
      } else {
        stage.tokens.emplace_back();
        stage.tokens.back().make(tensors, pack_, block, dim, config.num_heads[s],
                                 config.window_sizes[s]);
      }
    }
    stage.has_merge = s + 1 < config.num_stages;
    if (stage.has_merge)
      stage.merge.make(tensors, pack_, name + ".downsample", dim, config.embed_dims[s + 1],
                       config.strides[s], false);
  }
  const int last = config.embed_dims[config.num_stages - 1];
  if (config.end != TINYVIT_END_NONE) ending_.make(tensors, pack_, config.end, last);
  if (config.head) head_.make(tensors, float_pack_, last);
}

Plan Net::plan(int height, int width) const {
  Plan p;
  p.image = {height, width};
  p.stem = {stem_.reduced(height), stem_.reduced(width)};
  const Kernels& k = *kernels_;
  const int threads = pool_.threads();
  size_t scratch = stem_.scratch(k, width);
  const auto cover = [&](Size s, int padded) {
    p.map_bytes = std::max(p.map_bytes, static_cast<size_t>(s.height) * s.width * padded * k.element);
  };
  const auto border = [&](Size s, int padded, int by) {
    p.bordered_bytes =
        std::max(p.bordered_bytes, static_cast<size_t>(s.height + 2 * by) * (s.width + 2 * by) *
                                       padded * k.element);
  };
  Size size = p.stem;
  cover(size, stem_.out);
  for (const Stage& stage : stages_) {
    p.stages.push_back(size);
    cover(size, stage.padded);
    for (const Bottleneck& b : stage.convs) scratch = std::max(scratch, b.scratch(k));
    for (const TokenBlock& b : stage.tokens) {
      border(size, stage.padded, b.local.side / 2);
      const int across = ceil_div(size.width, b.side), down = ceil_div(size.height, b.side);
      const int windows = std::min(b.windows_at_once(k, across * down, threads), across);
      const Map map = dense_map(nullptr, size.height, size.width, 1);
      const Patches patches(map, kPatchColumns, kPatchTokens, 1);
      scratch = std::max(scratch, b.attend_scratch(k, std::min(b.windows_at_once(k, across * down, 1), across)));
      scratch = std::max(scratch, b.attend_scratch(k, windows));
      scratch = std::max(scratch, b.mix_scratch(k, patches.rows * patches.columns));
    }
    scratch = std::max(scratch, sizeof(void*) * size.width + size_t(1024));  // give_map
    if (!stage.has_merge) break;
    scratch = std::max(scratch, stage.merge.scratch(k));
    size = {stage.merge.reduced(size.height), stage.merge.reduced(size.width)};
  }
  p.embedding = size, p.embedding_channels = stages_.back().channels;
  if (ending_.kind != TINYVIT_END_NONE) {
    border(size, ending_.padded, 1);
    scratch = std::max(scratch, ending_.scratch(k, size.width) + sizeof(void*) * size.width + 1024);
    p.float_bytes = static_cast<size_t>(size.height) * size.width * ending_.padded * sizeof(float);
    p.embedding_channels = ending_.channels;
    if (ending_.kind == TINYVIT_END_SAM3) {
      p.embedding = {config_.end_size, config_.end_size};
      scratch = std::max(scratch, static_cast<size_t>(config_.end_size) *
                                      (ending_.padded * sizeof(float) + sizeof(void*)) + 1024);
    }
  }
  if (head_.is_there)
    scratch = std::max(scratch, head_.scratch(k, dense_map(nullptr, size.height, size.width, 1)));
  const auto round = [](size_t n) { return (n + kReadBeyond + 4095) / 4096 * 4096; };
  p.map_bytes = round(p.map_bytes), p.scratch_bytes = round(scratch);
  if (p.bordered_bytes) p.bordered_bytes = round(p.bordered_bytes);
  if (p.float_bytes) p.float_bytes = round(p.float_bytes);
  return p;
}

Map Net::run_merge(const Job& job, const Bottleneck& b, const Map& in, char* to, const Team& team,
                   char* scratch) const {
  const Map out = dense_map(to, b.reduced(in.height), b.reduced(in.width),
                            b.out * static_cast<long>(kernels_->element));
  // Long patches: each one computes two rows of its neighbours again.
  const Patches patches(out, Bottleneck::kColumns, out.height * Bottleneck::kColumns, team.threads());
  team.run(patches.count(), [&](int item, int worker) {
    patches.at(item, out, [&](int top, int bottom, int left, int right) {
      b.run(*kernels_, in, out, top, bottom, left, right, scratch + worker * job.plan.scratch_bytes);
    });
  });
  return out;
}

Map Net::run_stage(const Job& job, int s, Map in, Map spare, char* bordered, const Team& team,
                   char* scratch) const {
  const Kernels& k = *kernels_;
  const size_t each = job.plan.scratch_bytes;
  for (const Bottleneck& b : stages_[s].convs) {
    spare = run_merge(job, b, in, spare.data, team, scratch);
    std::swap(in, spare);
  }
  int border = -1;
  Map attended;
  for (const TokenBlock& b : stages_[s].tokens) {
    if (b.local.side / 2 != border) {
      border = b.local.side / 2;
      attended = bordered_map(bordered, in.height, in.width, in.pitch, border);
    }
    spare = dense_map(spare.data, in.height, in.width, in.pitch);
    const int across = ceil_div(in.width, b.side), down = ceil_div(in.height, b.side);
    const int at_once = std::min(b.windows_at_once(k, across * down, team.threads()), across);
    const int groups = ceil_div(across, at_once);
    team.run(down * groups, [&](int item, int worker) {
      const int first = item % groups * at_once, last = std::min(first + at_once, across);
      b.attend(k, in, attended, item / groups, first, last, scratch + worker * each);
    });
    const Patches patches(in, kPatchColumns, kPatchTokens, team.threads());
    team.run(patches.count(), [&](int item, int worker) {
      patches.at(item, in, [&](int top, int bottom, int left, int right) {
        b.mix(k, attended, spare, top, bottom, left, right, scratch + worker * each);
      });
    });
    std::swap(in, spare);
  }
  return in;
}

void Net::give_map(const Job& job, const Map& map, int channels, int layout, float* to,
                   const Team& team, char* scratch) const {
  const Kernels& k = *kernels_;
  const long area = static_cast<long>(map.height) * map.width;
  team.run(map.height, [&](int y, int worker) {
    const long first = static_cast<long>(y) * map.width;
    if (layout == TINYVIT_CHANNELS_LAST) {
      for (int x = 0; x < map.width; ++x) k.to_float(map.at(y, x), to + (first + x) * channels, channels);
      return;
    }
    Arena arena(scratch + worker * job.plan.scratch_bytes);
    const char** rows = arena.take<const char*>(map.width);
    for (int x = 0; x < map.width; ++x) rows[x] = map.at(y, x);
    k.to_planes(rows, map.width, channels, to + first, area);
  });
}

// Bilinear weights as torch's interpolate has them, align_corners=False.
static void source_of(int i, int from, int to, int& a, int& b, float& share) {
  const float scale = static_cast<float>(from) / static_cast<float>(to);
  const float x = std::max((static_cast<float>(i) + 0.5f) * scale - 0.5f, 0.0f);
  a = std::min(static_cast<int>(x), from - 1), b = std::min(a + 1, from - 1);
  share = std::min(x - static_cast<float>(a), 1.0f);
}

void Net::run_ending(const Job& job, int index, const Map& in, char* bordered, char* floats,
                     const Team& team, char* scratch) const {
  const Kernels& k = *kernels_;
  const size_t each = job.plan.scratch_bytes;
  const int channels = job.plan.embedding_channels, layout = job.outputs.layout;
  const Size out = job.plan.embedding;
  const long area = static_cast<long>(out.height) * out.width;
  float* to = job.outputs.embedding + index * area * channels;
  if (ending_.kind == TINYVIT_END_NONE) return give_map(job, in, channels, layout, to, team, scratch);
  const int padded = ending_.padded;
  const Map reduced = bordered_map(bordered, in.height, in.width, padded * static_cast<long>(k.element), 1);
  team.run(in.height, [&](int y, int worker) {
    ending_.reduce_row(k, in, reduced, y, scratch + worker * each);
  });
  float* map = reinterpret_cast<float*>(floats);  // [height][width][padded]
  const auto give_row = [&](const float* from, int y, int width, char* space) {
    if (layout == TINYVIT_CHANNELS_LAST) {
      for (int x = 0; x < width; ++x)
        std::memcpy(to + (static_cast<long>(y) * width + x) * channels, from + static_cast<long>(x) * padded,
                    sizeof(float) * channels);
      return;
    }
    const char** rows = reinterpret_cast<const char**>(space);
    for (int x = 0; x < width; ++x) rows[x] = reinterpret_cast<const char*>(from + static_cast<long>(x) * padded);
    float_kernels_->to_planes(rows, width, channels, to + static_cast<long>(y) * width, area);
  };
  team.run(in.height, [&](int y, int worker) {
    char* space = scratch + worker * each;
    float* row = map + static_cast<long>(y) * in.width * padded;
    ending_.conv_row(k, reduced, y, row, space);
    if (ending_.kind == TINYVIT_END_SAM) give_row(row, y, in.width, space);
  });
  if (ending_.kind != TINYVIT_END_SAM3) return;
  team.run(out.height, [&](int y, int worker) {
    Arena arena(scratch + worker * each);
    float* row = arena.take<float>(static_cast<size_t>(out.width) * padded);
    char* space = reinterpret_cast<char*>(arena.take<void*>(out.width));
    int y0, y1, x0, x1;
    float dy, dx;
    source_of(y, in.height, out.height, y0, y1, dy);
    for (int x = 0; x < out.width; ++x) {
      source_of(x, in.width, out.width, x0, x1, dx);
      const auto at = [&](int v, int u) { return map + (static_cast<long>(v) * in.width + u) * padded; };
      const float *a = at(y0, x0), *b = at(y0, x1), *c = at(y1, x0), *d = at(y1, x1);
      float* o = row + static_cast<long>(x) * padded;
      for (int i = 0; i < padded; ++i)
        o[i] = (1 - dy) * ((1 - dx) * a[i] + dx * b[i]) + dy * ((1 - dx) * c[i] + dx * d[i]);
    }
    give_row(row, y, out.width, space);
  });
}

void Net::run_image(const Job& job, int index, const Team& team, char* maps, char* scratch) const {
  const Kernels& k = *kernels_;
  const Plan& plan = job.plan;
  const tinyvit_images& images = job.images;
  char *a = maps, *b = a + plan.map_bytes, *bordered = b + plan.map_bytes;
  char* floats = bordered + plan.bordered_bytes;
  Picture picture;
  picture.channels = config_.in_chans, picture.height = images.height, picture.width = images.width;
  const size_t pixels = static_cast<size_t>(images.height) * images.width * config_.in_chans;
  picture.values = job.values;
  if (images.pixels == TINYVIT_BYTES) picture.bytes = static_cast<const uint8_t*>(images.data) + index * pixels;
  else picture.planes = static_cast<const float*>(images.data) + index * pixels;

  Map map = dense_map(a, plan.stem.height, plan.stem.width, stem_.out * static_cast<long>(k.element));
  const int rows = std::max(std::min(ceil_div(map.height, 4 * team.threads()), 64), 4);
  team.run(ceil_div(map.height, rows), [&](int item, int worker) {
    const int top = item * rows, bottom = std::min(top + rows, map.height);
    stem_.run(k, picture, plan.image.height, plan.image.width, map, top, bottom,
              scratch + worker * plan.scratch_bytes);
  });
  for (int s = 0; s <= job.last_stage; ++s) {
    Map spare = map;
    spare.data = map.data == a ? b : a;
    map = run_stage(job, s, map, spare, bordered, team, scratch);
    if (float* to = job.outputs.stages[s])
      give_map(job, map, stages_[s].channels, job.outputs.layout,
               to + index * static_cast<long>(map.height) * map.width * stages_[s].channels, team, scratch);
    const bool goes_on = s < job.last_stage || (s == 1 && job.outputs.early);
    if (!goes_on || !stages_[s].has_merge) continue;
    map = run_merge(job, stages_[s].merge, map, map.data == a ? b : a, team, scratch);
    if (s == 1 && job.outputs.early) {
      const int channels = stages_[2].channels;
      give_map(job, map, channels, TINYVIT_CHANNELS_LAST,
               job.outputs.early + index * static_cast<long>(map.height) * map.width * channels, team, scratch);
    }
  }
  if (!job.wants_end) return;
  if (job.outputs.logits)
    head_.run(k, *float_kernels_, map, job.outputs.logits + static_cast<long>(index) * head_.outputs, scratch);
  if (job.outputs.embedding) run_ending(job, index, map, bordered, floats, team, scratch);
}

void Net::check(const tinyvit_images& images, const tinyvit_outputs& outputs) const {
  const auto fail = [](const std::string& text) { throw Error(TINYVIT_INVALID, text); };
  const int stages = static_cast<int>(stages_.size());
  if (outputs.layout != TINYVIT_PLANES && outputs.layout != TINYVIT_CHANNELS_LAST)
    fail("unknown layout, got " + std::to_string(outputs.layout));
  if (outputs.logits && !head_.is_there) fail("logits are wanted and the net was made without a head");
  if (outputs.early && stages < 3)
    fail("the early map wants at least 3 stages, got " + std::to_string(stages));
  bool is_any = outputs.embedding || outputs.logits || outputs.early;
  for (int s = 0; s < TINYVIT_MAX_STAGES; ++s) {
    if (outputs.stages[s] && s >= stages)
      fail("stage " + std::to_string(s) + " is wanted of " + std::to_string(stages) + " stages");
    is_any = is_any || outputs.stages[s];
  }
  if (!is_any) fail("no output is wanted");
  if (!outputs.workspace) return;
  const Plan p = plan(std::max(images.padded_height, images.height), std::max(images.padded_width, images.width));
  if (outputs.workspace_bytes < workspace_bytes(p))
    fail("workspace must have " + std::to_string(workspace_bytes(p)) + " bytes, got " +
         std::to_string(outputs.workspace_bytes));
}

void Net::encode(const tinyvit_images& images, const tinyvit_outputs& outputs) {
  if (images.batch == 0) return;
  const Plan plan = this->plan(std::max(images.padded_height, images.height),
                               std::max(images.padded_width, images.width));
  std::vector<float> values;
  for (int c = 0; images.pixels == TINYVIT_BYTES && c < config_.in_chans; ++c)
    for (int v = 0; v < 256; ++v) values.push_back((static_cast<float>(v) - images.mean[c]) / images.std[c]);
  const int stages = static_cast<int>(stages_.size());
  const bool wants_end = outputs.embedding || outputs.logits;
  int last = wants_end ? stages - 1 : outputs.early ? 1 : 0;
  for (int s = 0; s < stages; ++s)
    if (outputs.stages[s]) last = std::max(last, s);
  const Job job{images, outputs, plan, values.data(), last, wants_end};

  const int threads = pool_.threads();
  const size_t single = plan.image_bytes() + plan.scratch_bytes;
  int whole = 0;  // images that go to threads whole
  if (threads > 1 && !outputs.workspace && single * threads <= kMostMaps)
    whole = images.batch / threads * threads;
  std::unique_lock<std::mutex> lock(mutex_, std::defer_lock);
  char* space = static_cast<char*>(outputs.workspace);
  if (!space) {
    lock.lock();
    const size_t wanted = whole ? std::max(single * threads, workspace_bytes(plan)) : workspace_bytes(plan);
    if (workspace_.bytes() < wanted) workspace_ = Block(), workspace_ = Block(wanted);
    space = workspace_.data();
  }
  struct Turn {  // the threads, if no other call has them
    Pool& pool;
    bool is_mine;
    explicit Turn(Pool& p) : pool(p), is_mine(p.threads() > 1 && p.acquire()) {}
    ~Turn() { if (is_mine) pool.release(); }
  } turn(pool_);
  if (!turn.is_mine) whole = 0;
  if (whole)
    pool_.run(whole, [&](int i, int worker) {
      char* mine = space + worker * single;
      // A team of one calls itself worker 0 of its own scratch.
      run_image(job, i, Team(nullptr, 0), mine, mine + plan.image_bytes());
    });
  for (int i = whole; i < images.batch; ++i)
    run_image(job, i, Team(turn.is_mine ? &pool_ : nullptr, 0), space, space + plan.image_bytes());
}

void Net::trim() {
  std::lock_guard<std::mutex> lock(mutex_);
  workspace_ = Block();
}

void Net::describe(tinyvit_info& info) const {
  std::memset(info.isa, 0, sizeof info.isa);
  std::strncpy(info.isa, kernels_->isa, sizeof info.isa - 1);
  info.precision = config_.precision;
  info.threads = pool_.threads();
  info.is_native = !kernels_->is_bf16 || multiplies_bf16(*kernels_);
  info.weight_bytes = pack_.bytes() + float_pack_.bytes();
  info.workspace_bytes = workspace_.bytes();
}

void Net::measure(const Plan& plan, tinyvit_sizes& sizes) const {
  const auto put = [](int32_t* to, int channels, Size s) {
    to[0] = channels, to[1] = s.height, to[2] = s.width;
  };
  put(sizes.embedding, plan.embedding_channels, plan.embedding);
  sizes.num_stages = static_cast<int>(stages_.size());
  for (int s = 0; s < TINYVIT_MAX_STAGES; ++s)
    if (s < sizes.num_stages) put(sizes.stages[s], stages_[s].channels, plan.stages[s]);
    else put(sizes.stages[s], 0, {0, 0});
  if (sizes.num_stages > 2) put(sizes.early, stages_[2].channels, plan.stages[2]);
  else put(sizes.early, 0, {0, 0});
  sizes.num_logits = head_.is_there ? head_.outputs : 0;
  sizes.workspace_bytes = workspace_bytes(plan);
}

}  // namespace tinyvit
