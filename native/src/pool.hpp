// Threads that share the items of a job. Knows nothing of what an item is.
#pragma once
#include <memory>

namespace tinyvit {

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  int threads() const { return threads_; }

  // Calls work(item, worker) for each item in [0, count), worker in [0, threads). Which worker gets
  // which item is not defined. One job at a time: see `acquire`.
  template <class F>
  void run(int count, const F& work) {
    run_erased(count, [](const void* f, int item, int worker) {
      (*static_cast<const F*>(f))(item, worker);
    }, &work);
  }

  // Whether the caller may run jobs now; false while another thread does. Call release after true.
  bool acquire();
  void release();

 private:
  typedef void (*Call)(const void*, int, int);
  void run_erased(int count, Call call, const void* work);
  struct State;
  void revive();
  int threads_;
  State* state_;
};

// A pool, or only the calling thread in the place of one worker.
class Team {
 public:
  Team(Pool* pool, int worker) : pool_(pool), worker_(worker) {}
  template <class F>
  void run(int count, const F& work) const {
    if (pool_ && count > 1) {
      pool_->run(count, work);
    } else {
      for (int i = 0; i < count; ++i) work(i, worker_);
    }
  }
  int threads() const { return pool_ ? pool_->threads() : 1; }

 private:
  Pool* pool_;
  int worker_;
};

}  // namespace tinyvit
