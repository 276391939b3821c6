#include "cuda/handles.h"

#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/cuda_error.h"

namespace pccheck {

void StreamCloser::operator()(cudaStream_t stream) const noexcept {
  ignore_cuda(cudaStreamDestroy(stream));
}

void EventCloser::operator()(cudaEvent_t event) const noexcept {
  ignore_cuda(cudaEventDestroy(event));
}

void DeviceMemoryCloser::operator()(std::byte* memory) const noexcept {
  ignore_cuda(cudaFree(memory));
}

Stream make_stream() {
  int least = 0;
  int greatest = 0;
  check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest),
             "cudaDeviceGetStreamPriorityRange");
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest),
             "cudaStreamCreateWithPriority");
  return Stream(stream);
}

Event make_event() {
  cudaEvent_t event = nullptr;
  check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync),
             "cudaEventCreateWithFlags");
  return Event(event);
}

DeviceMemory allocate_device(size_t bytes) {
  void* memory = nullptr;
  check_cuda(cudaMalloc(&memory, bytes), "cudaMalloc of copy scratch memory");
  return DeviceMemory(static_cast<std::byte*>(memory));
}

DeviceScope::DeviceScope(int device) {
  check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
  if (before_ == device) return;
  check_cuda(cudaSetDevice(device), "cudaSetDevice");
  changed_ = true;
}

DeviceScope::~DeviceScope() {
  if (changed_) ignore_cuda(cudaSetDevice(before_));
}

RelaxedCapture::RelaxedCapture() {
  check_cuda(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode");
}

RelaxedCapture::~RelaxedCapture() { ignore_cuda(cudaThreadExchangeStreamCaptureMode(&mode_)); }

void refuse_capture(cudaStream_t stream, const char* what) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  if (status != cudaStreamCaptureStatusNone)
    throw std::runtime_error(std::string(what) +
                             ": the stream is being captured into a CUDA graph, and a checkpoint "
                             "cannot be part of one; take the step outside of the capture");
}

Event EventPool::take() {
  {
    const std::lock_guard lock(mutex_);
    if (!spare_.empty()) {
      Event event = std::move(spare_.back());
      spare_.pop_back();
      return event;
    }
    spare_.reserve(++made_);  // put_back() must not allocate
  }
  const DeviceScope scope(device_);
  return make_event();
}

void EventPool::put_back(Event event) noexcept {
  const std::lock_guard lock(mutex_);
  spare_.push_back(std::move(event));
}

}  // namespace pccheck
