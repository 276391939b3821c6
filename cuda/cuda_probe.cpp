#include "cuda/cuda_probe.h"

#include <chrono>
#include <stdexcept>

#include "cuda/cuda_error.h"
#include "cuda/gather.h"
#include "cuda/pinned_memory.h"

namespace pccheck {
namespace {

constexpr std::chrono::seconds kLongestHold{30};

cudaStream_t as_stream(uint64_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

}  // namespace

void probe_gather(const std::vector<std::pair<uint64_t, size_t>>& ranges, uint64_t to,
                  uint64_t stream) {
  std::vector<GatherRange> views;
  for (const auto& [address, bytes] : ranges)
    views.push_back({reinterpret_cast<const std::byte*>(address), bytes});
  gather(views, reinterpret_cast<std::byte*>(to), as_stream(stream));
}

CopierProbe::CopierProbe(int device, size_t slots_bytes, size_t small_bytes, size_t scratch_bytes) {
  const DeviceScope scope(device);
  slots_ = allocate_pinned_slots(slots_bytes);
  copier_ = std::make_unique<D2hCopier>(
      device, D2hOptions{.small_bytes = small_bytes, .scratch_bytes = scratch_bytes});
}

uint64_t CopierProbe::submit(const std::vector<std::tuple<uint64_t, size_t, size_t>>& pieces,
                             std::optional<uint64_t> stream) {
  const std::span<std::byte> slots = slots_->bytes();
  std::vector<Piece> views;
  for (const auto& [address, offset, bytes] : pieces) {
    if (offset > slots.size() || bytes > slots.size() - offset)
      throw std::invalid_argument("a piece ends outside of the slots");
    views.push_back(
        {reinterpret_cast<const std::byte*>(address), slots.data() + offset, bytes, nullptr});
  }
  std::unique_ptr<ReadyMark> ready;
  if (stream) ready = copier_->mark_ready(as_stream(*stream));
  return copier_->submit(views, ready.get());
}

void CopierProbe::make_stream_wait(uint64_t submission, uint64_t stream) {
  copier_->make_stream_wait(submission, as_stream(stream));
}

uint64_t CopierProbe::slots_address() const {
  return reinterpret_cast<uint64_t>(slots_->bytes().data());
}

StreamGate::StreamGate(uint64_t stream) {
  check_cuda(
      cudaLaunchHostFunc(
          as_stream(stream), [](void* gate) { static_cast<StreamGate*>(gate)->pass(); }, this),
      "cudaLaunchHostFunc");
}

StreamGate::~StreamGate() {
  open();
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return passed_; });
}

void StreamGate::open() {
  {
    const std::lock_guard lock(mutex_);
    open_ = true;
  }
  changed_.notify_all();
}

bool StreamGate::timed_out() const {
  const std::lock_guard lock(mutex_);
  return timed_out_;
}

void StreamGate::pass() {
  std::unique_lock lock(mutex_);
  timed_out_ = !changed_.wait_for(lock, kLongestHold, [&] { return open_; });
  passed_ = true;
  changed_.notify_all();  // with the lock held: whoever sees passed_ may destroy the gate
}

}  // namespace pccheck
