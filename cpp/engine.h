// The engine: one pool, one stager, what persists (writers and a committer here, or a monitor), and
// the checkpoints in flight.
//
//   begin -> hand_over(layer) ... -> seal -> committed | failed
//
// Calls come from one thread at a time (the trainer's); the waits may come from any. Checkpoints
// are staged and published in the order in which they were begun. Staging that somebody waits for
// needs nothing but free slots and, to link what has not changed, the run's directory; nothing
// waits for a checkpoint that is not sealed, so there is no deadlock as long as the pool holds
// Layout::open_blocks() + 1 slots: begin() refuses less.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "cpp/block.h"
#include "cpp/checkpoint.h"
#include "cpp/local_persister.h"
#include "cpp/persister.h"
#include "cpp/stager.h"
#include "cpp/staging_pool.h"
#include "cpp/worker.h"

namespace pccheck {

struct EngineOptions {
  size_t block_bytes;
  size_t max_in_flight;  // checkpoints; one more waits
};

class Engine {
 public:
  // Starts the threads. Throws std::invalid_argument naming the option that cannot be.
  Engine(EngineOptions options, std::unique_ptr<Copier> copier, std::unique_ptr<SlotMemory> memory,
         std::unique_ptr<Persister> persister,
         std::shared_ptr<Book> book = std::make_shared<Book>());
  // Checkpoints that were never sealed fail; the others are finished first.
  ~Engine();

  // False when `until` has passed and still `max_in_flight` checkpoints are in flight.
  bool wait_room(Clock::time_point until) const;

  // `during_update`: until update_ended() the optimizer needs the processor. It is not spared where
  // training has lately had to wait for the staging.
  //
  // Throws std::logic_error when there is no room (see wait_room) or the one before is not sealed,
  // std::invalid_argument when the layout needs more slots than the pool has, and what the
  // persister refuses with, such as OutcomeUnknown after a publication whose result is unknown.
  // `target` is null where another process has it.
  std::shared_ptr<Checkpoint> begin(Identity identity, std::string name,
                                    std::shared_ptr<const Layout> layout,
                                    std::unique_ptr<Target> target, bool during_update = false);

  // Fails the checkpoint that was begun last if it was never sealed; nobody may wait for it then.
  void abandon_unsealed();

  bool wait_idle(Clock::time_point until) const;  // nothing in flight
  // Nor anything to clear up: the engine's end waits for nothing then.
  bool wait_settled(Clock::time_point until) const;

  size_t in_flight() const { return persister_->in_flight(); }
  CommitCounts counts() const { return persister_->counts(); }
  std::optional<std::string> take_complaint() { return persister_->take_complaint(); }
  size_t staging_bytes() const { return pool_.slot_bytes() * pool_.slot_count(); }
  size_t free_slots() const { return pool_.free_slots(); }
  size_t slot_count() const { return pool_.slot_count(); }
  uint64_t links_refused() const { return stager_.links_refused(); }  // files staged after all
  Copier& copier() { return *copier_; }

 private:
  void something_ended();

  const EngineOptions options_;

  Doorbell stager_bell_, persister_bell_;
  mutable std::mutex mutex_;  // guards nothing but the waiting on progress_
  mutable std::condition_variable progress_;

  StagingPool pool_;
  const std::unique_ptr<Copier> copier_;  // ends before the slots it may still be copying into
  BlockQueue full_{persister_bell_, stager_bell_};
  const std::shared_ptr<Book> book_;
  Stager stager_;
  const std::unique_ptr<Persister> persister_;
  std::shared_ptr<Checkpoint> newest_;  // both the caller's thread only
  unsigned unspared_ = 0;               // checkpoints to come that are not held back by updates

  std::unique_ptr<WorkerThread> thread_;  // last: it stops before anything it uses goes away
};

}  // namespace pccheck
