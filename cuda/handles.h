// Owners of CUDA's handles, and scopes that set a thread's CUDA state. Owners may be destroyed on
// any thread, scopes on the thread that made them. Nothing here synchronises a device, but the end
// of a DeviceMemory, which is why one lives as long as its copier.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

namespace pccheck {

struct StreamCloser {
  void operator()(cudaStream_t stream) const noexcept;
};
struct EventCloser {
  void operator()(cudaEvent_t event) const noexcept;
};
struct DeviceMemoryCloser {
  void operator()(std::byte* memory) const noexcept;
};

using Stream = std::unique_ptr<CUstream_st, StreamCloser>;
using Event = std::unique_ptr<CUevent_st, EventCloser>;
using DeviceMemory = std::unique_ptr<std::byte, DeviceMemoryCloser>;

// On the thread's current device. The stream does not wait for the default stream, nor that for it,
// and its kernels go before those of other streams.
Stream make_stream();
// Without timing, and waits for it sleep.
Event make_event();
DeviceMemory allocate_device(size_t bytes);

// Makes `device` current while it lives, then puts back the one before.
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// While it lives, this thread's calls neither break a CUDA graph that another thread is capturing
// nor are refused because of it.
class RelaxedCapture {
 public:
  RelaxedCapture();
  ~RelaxedCapture();
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // then: the one before
};

// Throws std::runtime_error if `stream` is being captured: what is recorded there runs when the
// graph is replayed, not now, and drags every stream that waits for it into the graph.
void refuse_capture(cudaStream_t stream, const char* what);

// Events of one device, kept for use again: every hand-over on the training thread needs one. Any
// thread.
class EventPool {
 public:
  explicit EventPool(int device) : device_(device) {}

  int device() const { return device_; }
  Event take();
  // Whatever waits for the event's latest record goes on doing so.
  void put_back(Event event) noexcept;

 private:
  const int device_;
  std::mutex mutex_;  // guards the two below
  std::vector<Event> spare_;
  size_t made_ = 0;
};

}  // namespace pccheck
