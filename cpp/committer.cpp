#include "cpp/committer.h"

#include <utility>

namespace pccheck {

void Committer::add(std::shared_ptr<Checkpoint> checkpoint) {
  const std::lock_guard lock(mutex_);
  in_flight_.push_back(std::move(checkpoint));
}

size_t Committer::in_flight() const {
  const std::lock_guard lock(mutex_);
  return in_flight_.size();
}

CommitCounts Committer::counts() const {
  const std::lock_guard lock(mutex_);
  return counts_;
}

bool Committer::wait_settled(Clock::time_point until) const {
  std::unique_lock lock(mutex_);
  return settled_.wait_until(lock, until, [&] { return in_flight_.empty() && !clearing_up_; });
}

std::exception_ptr Committer::outcome_unknown() const {
  const std::lock_guard lock(mutex_);
  return outcome_unknown_;
}

std::optional<std::string> Committer::take_complaint() {
  const std::lock_guard lock(mutex_);
  return std::exchange(complaint_, std::nullopt);
}

bool Committer::run_one() noexcept {
  std::shared_ptr<Checkpoint> oldest;
  {
    const std::lock_guard lock(mutex_);
    if (in_flight_.empty()) return false;
    oldest = in_flight_.front();
  }
  if (oldest->manifest_is_due()) {
    try {
      oldest->persist_manifest();
    } catch (...) {
      oldest->fail(std::current_exception());
    }
    return true;
  }
  if (oldest->ready_to_publish()) {
    publish(*oldest);
    return true;
  }
  if (oldest->ready_to_discard()) {
    housekeeping([&] { oldest->discard(); });
    end(*oldest, Checkpoint::State::failed);
    return true;
  }
  return false;
}

void Committer::publish(Checkpoint& checkpoint) {
  try {
    if (const std::exception_ptr unknown = outcome_unknown()) std::rethrow_exception(unknown);
    checkpoint.publish();
  } catch (const OutcomeUnknown&) {
    {
      const std::lock_guard lock(mutex_);
      outcome_unknown_ = std::current_exception();
    }
    checkpoint.fail(std::current_exception());
  } catch (...) {
    checkpoint.fail(std::current_exception());
  }
  if (checkpoint.error()) return;  // discarded at the next call
  // Acknowledged, and out of the way of the next, before the clearing up that nobody waits for.
  end(checkpoint, Checkpoint::State::committed);
  housekeeping([&] { checkpoint.retire(); });
  {
    const std::lock_guard lock(mutex_);
    clearing_up_ = false;
  }
  settled_.notify_all();
}

void Committer::end(Checkpoint& checkpoint, Checkpoint::State state) {
  {
    const std::lock_guard lock(mutex_);
    in_flight_.pop_front();
    if (state == Checkpoint::State::failed) {
      ++counts_.failed;
    } else {
      clearing_up_ = true;
      ++counts_.committed;
      const uint64_t linked = checkpoint.linked_bytes();
      counts_.bytes += checkpoint.payload_bytes() - linked;
      counts_.bytes_linked += linked;
      counts_.last_durable_seconds = checkpoint.durable_seconds();
      counts_.durable_seconds += counts_.last_durable_seconds;
      counts_.last_committed_step = checkpoint.identity().step;
    }
    // Under the lock: who finds it ended finds it counted and out of the way, who finds nothing in
    // flight finds it ended.
    checkpoint.end(state);
  }
  checkpoint.announce_end();
  settled_.notify_all();
}

template <typename Work>
void Committer::housekeeping(Work work) {
  try {
    work();
  } catch (const std::exception& error) {
    const std::lock_guard lock(mutex_);
    if (!complaint_) complaint_ = error.what();
  }
}

}  // namespace pccheck
