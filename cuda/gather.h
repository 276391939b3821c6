// The gather kernel: packs many byte ranges of device memory end to end into one buffer, so that
// they leave in one copy. Ranges may have any alignment and size. Any thread; the thread's current
// device is the stream's. Nothing here waits, allocates or synchronises.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <span>

#include "cuda/gather_plan.h"

namespace pccheck {

struct GatherRange {
  const std::byte* from;
  size_t bytes;
};

// Enqueues one kernel on `stream`, which reads the batch's ranges and writes from `batch.to` on
// when its turn comes; the ranges must not overlap what is written. The batch itself may change as
// soon as this returns. Throws std::runtime_error when the launch is refused.
void launch_gather(const GatherBatch& batch, cudaStream_t stream);

// The same for any number of ranges, in as many kernels as it takes.
void gather(std::span<const GatherRange> ranges, std::byte* to, cudaStream_t stream);

// Brings the kernel to the current device. Otherwise its first launch does, and may have to wait
// for everything that is running there.
void load_gather();

}  // namespace pccheck
