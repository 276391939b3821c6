// Slots that two processes see: a memfd of fixed size, its memory reserved when it is made, so that
// neither side can meet a page that is not there.
#pragma once

#include "cpp/descriptor.h"
#include "cpp/staging_pool.h"

namespace pccheck {

class SharedSlots final : public SlotMemory {
 public:
  // New memory. Throws std::system_error.
  explicit SharedSlots(size_t bytes);
  // Memory that another process has made. Throws std::system_error, and std::runtime_error when it
  // could shrink under our feet.
  explicit SharedSlots(Descriptor memory);
  ~SharedSlots() override;

  std::span<std::byte> bytes() override { return slots_; }
  int descriptor() const { return memory_.get(); }  // to be passed on

 private:
  void map(size_t bytes);

  const Descriptor memory_;
  std::span<std::byte> slots_;
};

}  // namespace pccheck
