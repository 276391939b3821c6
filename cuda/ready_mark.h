// The point a CUDA stream had been given work up to when tensors were handed over.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "cpp/copier.h"
#include "cuda/handles.h"

namespace pccheck {

class CudaReadyMark final : public ReadyMark {
 public:
  // Caller's thread: everything enqueued on `stream` (of the pool's device) before now has been run
  // once the mark is reached. Returns at once. Throws std::runtime_error, also where the stream is
  // being captured into a graph.
  CudaReadyMark(std::shared_ptr<EventPool> events, cudaStream_t stream);
  ~CudaReadyMark() override;
  CudaReadyMark(const CudaReadyMark&) = delete;
  CudaReadyMark& operator=(const CudaReadyMark&) = delete;

  // Any thread. What `stream` is given from now on runs after the mark is reached; the mark itself
  // need not outlive this call.
  void hold_back(cudaStream_t stream) const;

  // Any thread. Returns, asleep until then, when the mark is reached.
  void wait() const;

 private:
  const std::shared_ptr<EventPool> events_;
  Event reached_;
};

}  // namespace pccheck
