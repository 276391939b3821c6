#include "cpp/staging_pool.h"

#include <sys/mman.h>

#include <cerrno>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

namespace pccheck {
namespace {

constexpr size_t kHugePageBytes = size_t{2} << 20;

size_t rounded_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

class HostSlots final : public SlotMemory {
 public:
  explicit HostSlots(size_t bytes)
      // One huge page more than asked for, so that the slots can begin on a huge page's border.
      : mapped_bytes_(rounded_up(bytes, kHugePageBytes) + kHugePageBytes) {
    mapped_ =
        ::mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped_ == MAP_FAILED)
      throw std::system_error(errno, std::generic_category(),
                              "mmap of " + std::to_string(mapped_bytes_) + " staging bytes");
    const size_t skip = rounded_up(reinterpret_cast<size_t>(mapped_), kHugePageBytes) -
                        reinterpret_cast<size_t>(mapped_);
    slots_ = {static_cast<std::byte*>(mapped_) + skip, bytes};
    // Advice only: without huge pages everything works, a little slower.
    ::madvise(slots_.data(), rounded_up(bytes, kHugePageBytes), MADV_HUGEPAGE);
    ::madvise(mapped_, mapped_bytes_, MADV_DONTFORK);
  }

  ~HostSlots() override { ::munmap(mapped_, mapped_bytes_); }

  std::span<std::byte> bytes() override { return slots_; }

 private:
  const size_t mapped_bytes_;
  void* mapped_ = nullptr;
  std::span<std::byte> slots_;
};

}  // namespace

std::unique_ptr<SlotMemory> allocate_host_slots(size_t bytes) {
  return std::make_unique<HostSlots>(bytes);
}

SlotLease::SlotLease(SlotLease&& other) noexcept
    : owner_(std::exchange(other.owner_, nullptr)), index_(other.index_) {}

SlotLease& SlotLease::operator=(SlotLease&& other) noexcept {
  if (this != &other) {
    release();
    owner_ = std::exchange(other.owner_, nullptr);
    index_ = other.index_;
  }
  return *this;
}

std::span<std::byte> SlotLease::bytes() const { return owner_->slot(index_); }

void SlotLease::release() noexcept {
  if (SlotOwner* owner = std::exchange(owner_, nullptr)) owner->release(index_);
}

StagingPool::StagingPool(std::unique_ptr<SlotMemory> memory, size_t slot_bytes,
                         std::function<void()> on_release)
    : memory_(std::move(memory)),
      slot_bytes_(slot_bytes),
      slot_count_(slot_bytes == 0 ? 0 : memory_->bytes().size() / slot_bytes),
      on_release_(std::move(on_release)) {
  if (slot_count_ == 0)
    throw std::invalid_argument("staging memory of " + std::to_string(memory_->bytes().size()) +
                                " bytes holds no block of " + std::to_string(slot_bytes));
  free_.reserve(slot_count_);  // release() must not allocate
  for (size_t i = slot_count_; i > 0; --i) free_.push_back(i - 1);
}

std::optional<SlotLease> StagingPool::try_acquire() {
  const std::lock_guard lock(mutex_);
  if (free_.empty()) return std::nullopt;
  const size_t index = free_.back();
  free_.pop_back();
  return SlotLease(*this, index);
}

size_t StagingPool::free_slots() const {
  const std::lock_guard lock(mutex_);
  return free_.size();
}

std::span<std::byte> StagingPool::slot(size_t index) {
  return memory_->bytes().subspan(index * slot_bytes_, slot_bytes_);
}

void StagingPool::release(size_t index) noexcept {
  bool was_empty;
  {
    const std::lock_guard lock(mutex_);
    was_empty = free_.empty();
    free_.push_back(index);
  }
  if (was_empty) on_release_();
}

}  // namespace pccheck
