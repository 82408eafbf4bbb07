#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace jnorm {

// XLA's own threads. The caller takes tasks too, and waits for those only that another thread has taken: it never waits for a thread to be
// free, of which there may be none.
class XlaPool : public Pool {
 public:
  explicit XlaPool(xla::ffi::ThreadPool threads) : threads_(threads) {}

  void run(int64_t n, const std::function<void(int64_t)>& task) override {
    const int64_t helpers = std::min(n - 1, threads_.num_threads() - 1);
    if (helpers <= 0) {
      for (int64_t i = 0; i < n; i++) task(i);
      return;
    }
    // A thread that comes late finds nothing left, and touches only this.
    auto state = std::make_shared<State>();
    state->n = n;
    state->task = &task;
    for (int64_t i = 0; i < helpers; i++) threads_.Schedule([state] { state->work(); });
    state->work();
    std::unique_lock<std::mutex> lock(state->mutex);
    state->all_done.wait(lock, [&] { return state->done == n; });
  }

 private:
  struct State {
    int64_t n = 0, done = 0;
    const std::function<void(int64_t)>* task = nullptr;
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable all_done;

    void work() {
      int64_t finished = 0;
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n; finished++) (*task)(i);
      if (!finished) return;
      const std::lock_guard<std::mutex> lock(mutex);
      done += finished;
      if (done == n) all_done.notify_one();
    }
  };
  xla::ffi::ThreadPool threads_;
};

}  // namespace jnorm
