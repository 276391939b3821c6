#include "cuda/cuda_error.h"

#include <stdexcept>
#include <string>

namespace pccheck {
namespace {

const char* hint(cudaError_t status) {
  switch (status) {
    case cudaErrorInsufficientDriver:
    case cudaErrorNoDevice:
      return "; is a GPU visible here, and is its driver new enough for this CUDA?";
    case cudaErrorMemoryAllocation:
      return "; the GPU, or the memory that may be locked, is used up";
    default:
      return "";
  }
}

}  // namespace

void check_cuda(cudaError_t status, const char* call, std::source_location where) {
  if (status == cudaSuccess) return;
  ignore_cuda(status);
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ") at " + where.file_name() + ":" +
                           std::to_string(where.line()) + hint(status));
}

void ignore_cuda(cudaError_t status) noexcept {
  if (status != cudaSuccess) static_cast<void>(cudaGetLastError());
}

}  // namespace pccheck
