#include "cpp/worker.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>

namespace pccheck {
namespace {

// Signals belong to the program's own threads: a handler run here would be run at a moment Python
// does not expect.
class AllSignalsBlocked {
 public:
  AllSignalsBlocked() {
    sigset_t all;
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~AllSignalsBlocked() { ::pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

// Short beside the time a block takes to cross a bus or reach a disk, long beside a wake-up.
constexpr std::chrono::microseconds kLookAgainAfter{100};

// Training comes first where processors are scarce: an optimizer's update on the CPU must not be
// shared half and half with the copying of the layer before, nor be interrupted by a wake-up, which
// a batch thread does not do. Not the lowest priority, so that busy data loaders cannot keep a gate
// shut. Advice: where it is refused, everything works the same.
void give_way() {
  constexpr int kNicer = 10;
  const sched_param none{};
  ::pthread_setschedparam(::pthread_self(), SCHED_BATCH, &none);
  const auto thread = static_cast<id_t>(::gettid());
  errno = 0;
  const int now = ::getpriority(PRIO_PROCESS, thread);
  if (errno == 0) ::setpriority(PRIO_PROCESS, thread, now + kNicer);
}

void work(const std::stop_token& stop, Worker& worker, Doorbell& bell) {
  while (true) {
    const uint64_t seen = bell.rings();
    if (stop.stop_requested()) return;
    if (worker.run_one()) continue;
    if (worker.awaits_outside())
      bell.wait_past(seen, kLookAgainAfter);
    else
      bell.wait_past(seen);
  }
}

}  // namespace

std::jthread start_thread(std::string name, std::function<void(const std::stop_token&)> body) {
  const AllSignalsBlocked blocked;  // a new thread inherits its maker's mask
  return std::jthread(
      [name = std::move(name), body = std::move(body)](const std::stop_token& stop) {
        ::pthread_setname_np(::pthread_self(), name.substr(0, 15).c_str());
        give_way();
        body(stop);
      });
}

WorkerThread::WorkerThread(Worker& worker, Doorbell& bell, std::string name)
    : bell_(bell),
      thread_(start_thread(std::move(name), [&worker, &bell](const std::stop_token& stop) {
        work(stop, worker, bell);
      })) {}

void WorkerThread::stop() {
  if (!thread_.joinable()) return;
  thread_.request_stop();
  bell_.ring();
  thread_.join();
}

}  // namespace pccheck
