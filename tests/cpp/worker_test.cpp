#include "cpp/worker.h"

#include <gtest/gtest.h>
#include <pthread.h>
#include <signal.h>
#include <time.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <latch>
#include <vector>

namespace pccheck::test {
namespace {

using namespace std::chrono_literals;

constexpr auto kLong = 60s;  // nothing here waits so long unless it is broken

class CountingWorker final : public Worker {
 public:
  bool run_one() noexcept override {
    const std::lock_guard lock(mutex_);
    ++calls_;
    changed_.notify_all();
    if (pending_ == 0) return false;
    --pending_;
    ++done_;
    return true;
  }

  void add(int count) {
    const std::lock_guard lock(mutex_);
    pending_ += count;
  }

  bool wait_done(int count) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, kLong, [&] { return done_ >= count; });
  }

  bool wait_calls(int count) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, kLong, [&] { return calls_ >= count; });
  }

  // Waits for something that does not happen.
  void watch_for(std::chrono::milliseconds time) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, time, [] { return false; });
  }

  int done() {
    const std::lock_guard lock(mutex_);
    return done_;
  }

  int calls() {
    const std::lock_guard lock(mutex_);
    return calls_;
  }

 private:
  std::mutex mutex_;  // guards everything below
  std::condition_variable changed_;
  int pending_ = 0;
  int done_ = 0;
  int calls_ = 0;
};

class FunctionWorker final : public Worker {
 public:
  explicit FunctionWorker(std::function<bool()> run, std::function<bool()> outside = {})
      : run_(std::move(run)), outside_(std::move(outside)) {}
  bool run_one() noexcept override { return run_(); }
  bool awaits_outside() const noexcept override { return outside_ ? outside_() : false; }

 private:
  const std::function<bool()> run_, outside_;
};

TEST(Doorbell, ARingForOneWakesAtLeastOneAndARingAll) {
  Doorbell bell;
  std::atomic<int> woken = 0;
  const uint64_t seen = bell.rings();
  std::vector<std::jthread> waiting;
  for (int i = 0; i < 3; ++i)
    waiting.emplace_back([&] {
      bell.wait_past(seen);
      ++woken;
      woken.notify_one();
    });
  bell.ring_for_one();
  woken.wait(0);
  bell.ring();
  waiting.clear();
  EXPECT_EQ(woken, 3);
}

TEST(Doorbell, ARingBetweenLookingAndWaitingIsNotLost) {
  Doorbell bell;
  const uint64_t seen = bell.rings();
  bell.ring();
  bell.wait_past(seen);  // returns
  EXPECT_EQ(bell.rings(), seen + 1);
}

TEST(Worker, NoRingIsEverLost) {
  CountingWorker worker;
  Doorbell bell;
  WorkerThread thread(worker, bell, "count");
  // One at a time: each ring meets the thread at another point of its way to sleep.
  for (int i = 1; i <= 5000; ++i) {
    worker.add(1);
    bell.ring();
    ASSERT_TRUE(worker.wait_done(i)) << "asleep with work to do, after " << i;
  }
}

TEST(Worker, ThreadsThatShareABellDoEachPieceOnce) {
  CountingWorker worker;
  Doorbell bell;
  {
    std::vector<std::unique_ptr<WorkerThread>> threads;
    for (int i = 0; i < 4; ++i)
      threads.push_back(std::make_unique<WorkerThread>(worker, bell, "count"));
    for (int i = 0; i < 500; ++i) {
      worker.add(3);
      bell.ring();
    }
    EXPECT_TRUE(worker.wait_done(1500));
  }
  EXPECT_EQ(worker.done(), 1500);
}

TEST(Worker, StopLetsThePieceUnderWayEndAndStartsNoOther) {
  std::latch begun(1), may_end(1);
  std::atomic<int> ended = 0;
  FunctionWorker worker([&] {
    begun.count_down();
    may_end.wait();
    ++ended;
    return true;
  });
  Doorbell bell;
  WorkerThread thread(worker, bell, "gate");
  begun.wait();
  std::latch stopping(1);
  std::jthread stopper([&] {
    stopping.count_down();
    thread.stop();
    EXPECT_GE(ended.load(), 1);
  });
  stopping.wait();
  EXPECT_EQ(ended.load(), 0);
  may_end.count_down();
  stopper.join();
  const int after = ended.load();
  bell.ring();
  thread.stop();  // may be called again
  EXPECT_EQ(ended.load(), after);
}

TEST(Worker, AnIdleThreadStopsAtOnce) {
  for (int i = 0; i < 200; ++i) {
    CountingWorker worker;
    Doorbell bell;
    WorkerThread thread(worker, bell, "idle");
    if (i % 2 == 0) {
      ASSERT_TRUE(worker.wait_calls(1));
    }
  }
}

TEST(Worker, AnIdleThreadTakesNoProcessorTime) {
  CountingWorker worker;
  std::atomic<pthread_t> self{};
  FunctionWorker noting([&] {
    self = ::pthread_self();
    return worker.run_one();
  });
  Doorbell bell;
  WorkerThread thread(noting, bell, "idle");
  ASSERT_TRUE(worker.wait_calls(1));
  clockid_t clock{};
  ASSERT_EQ(::pthread_getcpuclockid(self.load(), &clock), 0);
  const auto used = [&] {
    timespec time{};
    EXPECT_EQ(::clock_gettime(clock, &time), 0);
    return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
  };
  const auto before = used();
  worker.watch_for(300ms);
  EXPECT_LT(used() - before, 30ms);
  EXPECT_LE(worker.calls(), 2);
}

TEST(Worker, LooksAgainWithoutARingWhileSomethingIsUnderWayOutside) {
  std::latch looked(4);
  std::atomic<int> looks = 0;
  FunctionWorker worker(
      [&] {
        if (++looks <= 4) looked.count_down();
        return false;
      },
      [&] { return looks < 4; });
  Doorbell bell;
  {
    const WorkerThread thread(worker, bell, "outside");
    looked.wait();  // nobody rings
  }
  EXPECT_LE(looks.load(), 5) << "went on looking when nothing was under way any more";
}

TEST(Worker, SignalsStayWithTheProgramsOwnThreads) {
  std::latch looked(1);
  sigset_t in_worker, before, after;
  FunctionWorker worker([&] {
    ::pthread_sigmask(SIG_SETMASK, nullptr, &in_worker);
    looked.count_down();
    return false;
  });
  Doorbell bell;
  ::pthread_sigmask(SIG_SETMASK, nullptr, &before);
  {
    const WorkerThread thread(worker, bell, "signals");
    looked.wait();
  }
  ::pthread_sigmask(SIG_SETMASK, nullptr, &after);
  for (const int signal : {SIGINT, SIGTERM, SIGUSR1, SIGCHLD, SIGURG}) {
    EXPECT_TRUE(sigismember(&in_worker, signal)) << signal;
    EXPECT_EQ(sigismember(&before, signal), sigismember(&after, signal)) << signal;
  }
}

}  // namespace
}  // namespace pccheck::test
