// Publishes checkpoints in the order they were begun, retires what they replace, and clears failed
// ones away. In order: a checkpoint never becomes visible before an older one has ended.
#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "cpp/checkpoint.h"
#include "cpp/worker.h"

namespace pccheck {

struct CommitCounts {
  uint64_t committed = 0;
  uint64_t failed = 0;
  uint64_t bytes = 0;          // of payload, written
  uint64_t bytes_linked = 0;   // of payload, shared with older checkpoints instead
  double durable_seconds = 0;  // summed, begin to commit
  double last_durable_seconds = 0;
  uint64_t last_committed_step = 0;
};

class Committer final : public Worker {
 public:
  void add(std::shared_ptr<Checkpoint> checkpoint);  // any thread
  size_t in_flight() const;                          // any thread
  CommitCounts counts() const;                       // any thread

  // False when `until` has passed and still something is in flight or being cleared up. Any thread.
  bool wait_settled(Clock::time_point until) const;

  // The checkpoint whose publication has an unknown outcome, if that has happened. Any thread.
  std::exception_ptr outcome_unknown() const;

  // What went wrong in clearing up since the last call: nothing was lost by it, but space was. Any
  // thread.
  std::optional<std::string> take_complaint();

  bool run_one() noexcept override;

 private:
  void publish(Checkpoint& checkpoint);
  void end(Checkpoint& checkpoint, Checkpoint::State state);
  template <typename Work>
  void housekeeping(Work work);

  mutable std::mutex mutex_;  // guards everything below
  mutable std::condition_variable settled_;
  std::deque<std::shared_ptr<Checkpoint>> in_flight_;
  bool clearing_up_ = false;  // after the one that was committed last
  CommitCounts counts_;
  std::exception_ptr outcome_unknown_;
  std::optional<std::string> complaint_;
};

}  // namespace pccheck
