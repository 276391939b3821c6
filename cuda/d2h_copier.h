// Copies tensors from one GPU into slots, behind training's back: on streams of its own, ordered by
// events; nothing here synchronises the device. Sources are read by those streams once the ready
// mark is reached, slots are written by them until the submission is done.
//
// The stager's calls (those of Copier) make the device current on its thread and leave it so.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "cpp/copier.h"
#include "cuda/handles.h"
#include "cuda/packer.h"
#include "cuda/place.h"
#include "cuda/ready_mark.h"

namespace pccheck {

struct D2hOptions {
  // Smaller pieces, where several go end to end into the slot, are packed by a kernel first: each
  // copy costs about a microsecond of its own, in which the link would carry tens of kilobytes.
  size_t small_bytes = size_t{64} << 10;
  // Device memory for packing, twice this much, 4 KiB or more. 0: nothing is packed.
  size_t scratch_bytes = size_t{4} << 20;
};

class D2hCopier final : public Copier {
 public:
  // Any thread. Throws std::runtime_error where the device cannot be used.
  explicit D2hCopier(int device, D2hOptions options = {});
  // Waits for what is under way: slots may be freed afterwards.
  ~D2hCopier() override;

  bool sums_while_copying() const override { return false; }

  // `ready` is a mark made by mark_ready(), or null. Slots should be pinned: copies into other
  // memory hold up the calling thread. Pieces in host memory are copied before it returns, those in
  // pinned host memory, which a stream may be writing, when the mark has been reached; the others
  // are held back by the mark on the device alone. When it throws, nothing of the submission runs
  // any more.
  uint64_t submit(std::span<const Piece> pieces, ReadyMark* ready) override;
  bool done(uint64_t submission) override;
  void wait(uint64_t submission);  // returns once done(submission) would not be false

  int device() const { return events_->device(); }

  // Caller's thread: marks what `stream` of this device has been given up to now.
  std::unique_ptr<ReadyMark> mark_ready(cudaStream_t stream) const;

  // Any thread: what `stream` of this device is given from now on runs after the submission, which
  // submit() has returned, has ended. Returns at once.
  void make_stream_wait(uint64_t submission, cudaStream_t stream);

 private:
  void enqueue(std::span<const Piece> pieces, const CudaReadyMark* ready);
  bool is_small(const Piece& piece, Place place) const;
  size_t run_length(std::span<const Piece> pieces, size_t first) const;
  void copy_one(const Piece& piece, Place place, const CudaReadyMark* ready);
  cudaEvent_t end_of(uint64_t submission) const;
  void retire(uint64_t submission);
  void settle() noexcept;

  const D2hOptions options_;
  const std::shared_ptr<EventPool> events_;  // shared with marks, which may outlive the copier
  Stream copies_;                            // every submission ends on it, hence in order
  std::optional<Packer> packer_;
  std::vector<Place> places_;  // of the submission being made; kept for its memory

  // Guards the two below between the stager, which alone changes them and so reads them without it,
  // and make_stream_wait().
  mutable std::mutex mutex_;
  uint64_t ended_ = 0;           // submissions known to have ended
  std::deque<Event> in_flight_;  // the ends of submissions ended_ + 1, ended_ + 2, ...
};

}  // namespace pccheck
