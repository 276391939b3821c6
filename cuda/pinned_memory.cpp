#include "cuda/pinned_memory.h"

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/cuda_error.h"
#include "cuda/handles.h"

namespace pccheck {
namespace {

class PinnedSlots final : public SlotMemory {
 public:
  explicit PinnedSlots(std::unique_ptr<SlotMemory> memory) : memory_(std::move(memory)) {
    check_cuda(cudaGetDevice(&device_), "cudaGetDevice for pinned staging memory");
    const RelaxedCapture relaxed;
    const std::span<std::byte> slots = memory_->bytes();
    const std::string call =
        "cudaHostRegister of " + std::to_string(slots.size()) + " staging bytes";
    check_cuda(cudaHostRegister(slots.data(), slots.size(), cudaHostRegisterPortable),
               call.c_str());
  }

  // Before the memory is unmapped: a registration of addresses that are gone would be met again by
  // whoever maps them next.
  ~PinnedSlots() override {
    try {
      const DeviceScope scope(device_);
      const RelaxedCapture relaxed;
      ignore_cuda(cudaHostUnregister(memory_->bytes().data()));
    } catch (const std::exception&) {
      // The runtime is gone already, and the registration with it.
    }
  }

  std::span<std::byte> bytes() override { return memory_->bytes(); }

 private:
  const std::unique_ptr<SlotMemory> memory_;
  int device_ = 0;
};

}  // namespace

std::unique_ptr<SlotMemory> allocate_pinned_slots(size_t bytes) {
  if (bytes == 0) throw std::invalid_argument("pinned staging memory of 0 bytes");
  return pin_slots(allocate_host_slots(bytes));
}

std::unique_ptr<SlotMemory> pin_slots(std::unique_ptr<SlotMemory> host) {
  return std::make_unique<PinnedSlots>(std::move(host));
}

}  // namespace pccheck
