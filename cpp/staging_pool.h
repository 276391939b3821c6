// A fixed number of block-sized staging buffers ("slots") and the leases on them. The pool is the
// bound on host memory: when every slot is out, staging waits for the disk. Safe on any thread.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

namespace pccheck {

// One piece of memory that slots are cut from. Host memory here; memory a device can reach by DMA
// in cuda/.
class SlotMemory {
 public:
  virtual ~SlotMemory() = default;
  virtual std::span<std::byte> bytes() = 0;
};

// Page-aligned, in huge pages where the system grants them (they save a fifth of the processor time
// of a save), and left out of forked children. Throws std::system_error.
std::unique_ptr<SlotMemory> allocate_host_slots(size_t bytes);

// Whoever slots are leased from.
class SlotOwner {
 public:
  virtual ~SlotOwner() = default;
  virtual std::span<std::byte> slot(size_t index) = 0;
  virtual void release(size_t index) noexcept = 0;
};

// The right to one slot; returns it when destroyed.
class SlotLease {
 public:
  SlotLease() = default;
  SlotLease(SlotOwner& owner, size_t index) : owner_(&owner), index_(index) {}
  SlotLease(SlotLease&& other) noexcept;
  SlotLease& operator=(SlotLease&& other) noexcept;
  ~SlotLease() { release(); }

  std::span<std::byte> bytes() const;
  size_t index() const { return index_; }
  explicit operator bool() const { return owner_ != nullptr; }
  void release() noexcept;

 private:
  SlotOwner* owner_ = nullptr;
  size_t index_ = 0;
};

class StagingPool final : public SlotOwner {
 public:
  // `memory` must hold at least one slot; it outlives every lease with the pool. `on_release` is
  // called, outside the pool's lock, when a slot has come back to a pool that had none.
  StagingPool(std::unique_ptr<SlotMemory> memory, size_t slot_bytes,
              std::function<void()> on_release);

  std::optional<SlotLease> try_acquire();

  size_t slot_bytes() const { return slot_bytes_; }
  size_t slot_count() const { return slot_count_; }
  size_t free_slots() const;

 private:
  std::span<std::byte> slot(size_t index) override;
  void release(size_t index) noexcept override;

  const std::unique_ptr<SlotMemory> memory_;
  const size_t slot_bytes_;
  const size_t slot_count_;
  const std::function<void()> on_release_;
  mutable std::mutex mutex_;  // guards free_
  std::vector<size_t> free_;  // a stack: the slot used last is the likeliest to be cached
};

}  // namespace pccheck
