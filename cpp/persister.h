// The seam behind the queue of full blocks: what makes blocks durable and ends checkpoints, in the
// order in which they were begun. In this process it is the writers and the committer
// (local_persister); in monitor mode it sends all of it to the process that has them
// (monitor_client).
//
// Safe on any thread but for start().
#pragma once

#include <exception>
#include <memory>
#include <optional>
#include <string>

#include "cpp/block.h"
#include "cpp/committer.h"

namespace pccheck {

class Persister {
 public:
  // Ends its threads; the engine sees to it that nothing is in flight then.
  virtual ~Persister() = default;

  // Called once, before anything else: `full` is where blocks come from, `pushed` rings when one
  // has come.
  virtual void start(BlockQueue& full, Doorbell& pushed) = 0;

  virtual void add(std::shared_ptr<Checkpoint> checkpoint) = 0;
  virtual size_t in_flight() const = 0;
  virtual CommitCounts counts() const = 0;

  // With nothing in flight: waits until this process has nothing left to clear up. False when
  // `until` has passed first.
  virtual bool wait_settled(Clock::time_point /*until*/) const { return true; }

  // The stager's thread: instead of staging a file of a layer, makes it what a committed checkpoint
  // has, see Checkpoint::link. Waits for the outcome. False where that cannot be: then it is
  // staged. Throws what is to fail the checkpoint.
  virtual bool link(const std::shared_ptr<Checkpoint>& /*checkpoint*/, uint32_t /*file*/,
                    const std::string& /*from*/, const FileDigest& /*digest*/) {
    return false;
  }

  // Something of a checkpoint has changed that may give this one something to do. Never waits.
  virtual void look() = 0;

  // Why nothing more may be begun; null if it may.
  virtual std::exception_ptr refusal() const = 0;

  // What went wrong in clearing up since the last call: nothing was lost by it, but space was.
  virtual std::optional<std::string> take_complaint() = 0;
};

}  // namespace pccheck
