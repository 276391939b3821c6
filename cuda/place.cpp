#include "cuda/place.h"

#include <cuda_runtime_api.h>

#include "cuda/cuda_error.h"

namespace pccheck {

Place place_of(const std::byte* memory, int this_device) {
  cudaPointerAttributes attributes;
  check_cuda(cudaPointerGetAttributes(&attributes, memory), "cudaPointerGetAttributes");
  switch (attributes.type) {
    case cudaMemoryTypeUnregistered:
      return Place::kHost;
    case cudaMemoryTypeHost:
      return Place::kPinnedHost;
    default:
      return attributes.device == this_device ? Place::kThisDevice : Place::kOtherDevice;
  }
}

}  // namespace pccheck
