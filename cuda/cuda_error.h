// Turns the CUDA runtime's status codes into exceptions. Any thread.
#pragma once

#include <cuda_runtime_api.h>

#include <source_location>

namespace pccheck {

// Throws std::runtime_error naming the call, CUDA's words for what went wrong, and the line of the
// call. A failure is also taken off the thread's record, so that the next launch does not report it
// as its own.
void check_cuda(cudaError_t status, const char* call,
                std::source_location where = std::source_location::current());

// For destructors, where a failure can be neither reported nor mended.
void ignore_cuda(cudaError_t status) noexcept;

}  // namespace pccheck
