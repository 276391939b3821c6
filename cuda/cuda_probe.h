// The CUDA part's pieces with addresses and stream handles as plain integers, for tests to be bound
// to. Streams are torch.cuda.Stream.cuda_stream, of the device that is current on the thread; all
// of it may be called without the interpreter's lock.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cpp/staging_pool.h"
#include "cuda/d2h_copier.h"

namespace pccheck {

// Packs the (address, bytes) ranges end to end from address `to` on; runs on `stream`, and returns
// before it has.
void probe_gather(const std::vector<std::pair<uint64_t, size_t>>& ranges, uint64_t to,
                  uint64_t stream);

// A copier with pinned slots to copy into.
class CopierProbe {
 public:
  CopierProbe(int device, size_t slots_bytes, size_t small_bytes, size_t scratch_bytes);

  // Pieces are (address, offset in the slots, bytes). They are ready when what `stream` has been
  // given up to now has run; without one, at once.
  uint64_t submit(const std::vector<std::tuple<uint64_t, size_t, size_t>>& pieces,
                  std::optional<uint64_t> stream);
  bool done(uint64_t submission) { return copier_->done(submission); }
  void wait(uint64_t submission) { copier_->wait(submission); }
  void make_stream_wait(uint64_t submission, uint64_t stream);

  uint64_t slots_address() const;
  size_t slots_bytes() const { return slots_->bytes().size(); }

 private:
  std::unique_ptr<SlotMemory> slots_;  // outlives the copier, which writes to it
  std::unique_ptr<D2hCopier> copier_;
};

// Holds a stream back until it is opened: a device as late as a test likes. It opens by itself
// after half a minute, and says so, lest a call that waits for the device never returns.
class StreamGate {
 public:
  explicit StreamGate(uint64_t stream);
  // Opens, and waits until the stream has come through.
  ~StreamGate();
  StreamGate(const StreamGate&) = delete;
  StreamGate& operator=(const StreamGate&) = delete;

  void open();
  bool timed_out() const;

 private:
  void pass();  // on a thread of the driver's

  mutable std::mutex mutex_;  // guards everything below
  std::condition_variable changed_;
  bool open_ = false;
  bool passed_ = false;
  bool timed_out_ = false;
};

}  // namespace pccheck
