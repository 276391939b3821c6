// Workers: objects that do one piece of work when asked and never wait. In production each gets
// threads of its own; the simulation calls them in a seeded order on one thread.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <stop_token>
#include <string>
#include <thread>

namespace pccheck {

class Worker {
 public:
  virtual ~Worker() = default;

  // Does one piece of work. False: nothing to do until somebody rings. Errors of the work go to the
  // checkpoint they belong to; nothing is thrown.
  virtual bool run_one() noexcept = 0;

  // Whether, after run_one() returned false, something is under way outside (a device's copy) that
  // will end without a ring: then the thread looks again every now and then.
  virtual bool awaits_outside() const noexcept { return false; }
};

// Counts rings, so that one between looking and waiting is not lost.
class Doorbell {
 public:
  uint64_t rings() const {
    const std::lock_guard lock(mutex_);
    return rings_;
  }

  void ring() {
    {
      const std::lock_guard lock(mutex_);
      ++rings_;
    }
    rung_.notify_all();
  }

  // Wakes one of those who wait. Whoever is about to wait sees the ring all the same.
  void ring_for_one() {
    {
      const std::lock_guard lock(mutex_);
      ++rings_;
    }
    rung_.notify_one();
  }

  void wait_past(uint64_t seen) const {
    std::unique_lock lock(mutex_);
    rung_.wait(lock, [&] { return rings_ != seen; });
  }

  // At most this long.
  void wait_past(uint64_t seen, std::chrono::microseconds at_most) const {
    std::unique_lock lock(mutex_);
    rung_.wait_for(lock, at_most, [&] { return rings_ != seen; });
  }

 private:
  mutable std::mutex mutex_;  // guards rings_
  mutable std::condition_variable rung_;
  uint64_t rings_ = 0;
};

// A thread of the engine: it takes no signals, gives way to training, and is known by its name.
std::jthread start_thread(std::string name, std::function<void(const std::stop_token&)> body);

// Calls a worker on a thread until stopped; idle it takes no processor time.
class WorkerThread {
 public:
  WorkerThread(Worker& worker, Doorbell& bell, std::string name);
  ~WorkerThread() { stop(); }

  // Returns once the piece of work under way has ended. May be called again.
  void stop();

 private:
  Doorbell& bell_;
  std::jthread thread_;
};

}  // namespace pccheck
