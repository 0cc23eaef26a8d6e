// Threads that share the items of a job.
//
// A worker that finds nothing to do looks for 50 microseconds and then sleeps, so that processes
// that share cores do not fight. A worker that wakes up late finds the job closed and is not waited
// for. After fork() the child has no threads: the first job there makes new ones.
#include "pool.hpp"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>
#ifdef _WIN32
#include <process.h>
#define TINYVIT_GETPID _getpid
#else
#include <unistd.h>
#define TINYVIT_GETPID getpid
#endif

namespace tinyvit {
namespace {

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

const auto kSpin = std::chrono::microseconds(50);

// Looks for `done` for a while; whether it came.
template <class F>
bool spin(const F& done) {
  const auto until = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < until);
  return false;
}

}  // namespace

struct Pool::State {
  // generation << 32 | open << 16 | workers inside the job
  std::atomic<uint64_t> ticket{0};
  std::atomic<int> next{0}, sleepers{0};
  std::atomic<bool> is_waiting{false}, is_busy{false}, is_over{false};
  int count = 0;
  Call call = nullptr;
  const void* work = nullptr;
  std::mutex mutex;
  std::condition_variable wake, done;
  std::vector<std::thread> workers;
  long pid = TINYVIT_GETPID();

  static constexpr uint64_t kOpen = 1u << 16, kInside = kOpen - 1;

  void take(int worker) {
    for (;;) {
      const int i = next.fetch_add(1, std::memory_order_relaxed);
      if (i >= count) return;
      call(work, i, worker);
    }
  }

  void serve(int worker) {
    uint64_t seen = 0;
    for (;;) {
      const auto is_new = [&] {
        const uint64_t t = ticket.load(std::memory_order_acquire);
        return is_over.load(std::memory_order_relaxed) || ((t >> 32) != seen && (t & kOpen));
      };
      if (!spin(is_new)) {
        std::unique_lock<std::mutex> lock(mutex);
        sleepers.fetch_add(1);
        wake.wait(lock, is_new);
        sleepers.fetch_sub(1);
      }
      if (is_over.load(std::memory_order_relaxed)) return;
      uint64_t t = ticket.load(std::memory_order_acquire);
      bool is_in = false;
      while ((t & kOpen) && (t >> 32) != seen && !is_in)
        is_in = ticket.compare_exchange_weak(t, t + 1, std::memory_order_acq_rel);
      if (!is_in) continue;
      seen = t >> 32;
      take(worker);
      const uint64_t left = ticket.fetch_sub(1, std::memory_order_acq_rel) - 1;
      if ((left & (kInside | kOpen)) == 0 && is_waiting.load()) {
        std::lock_guard<std::mutex> lock(mutex);
        done.notify_one();
      }
    }
  }

  explicit State(int threads) {
    try {
      for (int i = 1; i < threads; ++i) workers.emplace_back([this, i] { serve(i); });
    } catch (const std::system_error&) {  // fewer threads give the same result
    }
  }

  ~State() {
    is_over.store(true);
    {
      std::lock_guard<std::mutex> lock(mutex);
      wake.notify_all();
    }
    for (auto& w : workers) w.join();
  }
};

Pool::Pool(int threads) : threads_(threads), state_(new State(threads)) {}

Pool::~Pool() {
  if (state_->pid == TINYVIT_GETPID()) delete state_;  // else its threads stayed in the parent
}

void Pool::revive() {
  if (state_->pid != TINYVIT_GETPID()) state_ = new State(threads_);  // the old one cannot be freed
}

bool Pool::acquire() {
  revive();
  return !state_->is_busy.exchange(true, std::memory_order_acquire);
}

void Pool::release() { state_->is_busy.store(false, std::memory_order_release); }

void Pool::run_erased(int count, Call call, const void* work) {
  State& s = *state_;
  s.count = count, s.call = call, s.work = work;
  s.next.store(0, std::memory_order_relaxed);
  const uint64_t generation = (s.ticket.load(std::memory_order_relaxed) >> 32) + 1;
  s.ticket.store((generation << 32) | State::kOpen);
  if (s.sleepers.load() > 0) {
    std::lock_guard<std::mutex> lock(s.mutex);
    s.wake.notify_all();
  }
  s.take(0);
  s.ticket.fetch_and(~State::kOpen, std::memory_order_acq_rel);
  const auto is_empty = [&] {
    return (s.ticket.load(std::memory_order_acquire) & State::kInside) == 0;
  };
  if (!spin(is_empty)) {
    std::unique_lock<std::mutex> lock(s.mutex);
    s.is_waiting.store(true);
    s.done.wait(lock, is_empty);
    s.is_waiting.store(false);
  }
}

}  // namespace tinyvit
