// Slots that a GPU reaches by DMA: copies into them leave the processor idle and run at the link's
// speed. Safe on any thread.
#pragma once

#include <cstddef>
#include <memory>

#include "cpp/staging_pool.h"

namespace pccheck {

// Host slots (huge pages, left out of forked children), locked in memory and known to every CUDA
// device. The calling thread's current device is used for it, so make the copier's device current:
// otherwise a context is made on one that nobody asked for. Takes as long as faulting the memory
// in. Throws std::system_error or std::runtime_error.
std::unique_ptr<SlotMemory> allocate_pinned_slots(size_t bytes);

// The same for host slots that are there already, such as those shared with a monitor.
std::unique_ptr<SlotMemory> pin_slots(std::unique_ptr<SlotMemory> host);

}  // namespace pccheck
