#include "cuda/ready_mark.h"

#include <utility>

#include "cuda/cuda_error.h"

namespace pccheck {

CudaReadyMark::CudaReadyMark(std::shared_ptr<EventPool> events, cudaStream_t stream)
    : events_(std::move(events)) {
  const DeviceScope scope(events_->device());  // the default stream is the current device's
  const RelaxedCapture relaxed;
  refuse_capture(stream, "handing tensors over to a checkpoint");
  reached_ = events_->take();
  check_cuda(cudaEventRecord(reached_.get(), stream), "cudaEventRecord of a hand-over");
}

CudaReadyMark::~CudaReadyMark() { events_->put_back(std::move(reached_)); }

void CudaReadyMark::hold_back(cudaStream_t stream) const {
  check_cuda(cudaStreamWaitEvent(stream, reached_.get(), 0), "cudaStreamWaitEvent for a hand-over");
}

void CudaReadyMark::wait() const {
  check_cuda(cudaEventSynchronize(reached_.get()), "cudaEventSynchronize of a hand-over");
}

}  // namespace pccheck
