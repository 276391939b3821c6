#include "cuda/d2h_copier.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/cuda_error.h"

namespace pccheck {
namespace {

// Tensors on the device that are worth packing: it takes six calls to the runtime, a copy one.
constexpr ptrdiff_t kFewestPacked = 4;

// On the stager's thread. The device stays current: putting back the one before would make a
// context on one that this thread has never used.
void use_device(int device) { check_cuda(cudaSetDevice(device), "cudaSetDevice"); }

}  // namespace

D2hCopier::D2hCopier(int device, D2hOptions options)
    : options_(options), events_(std::make_shared<EventPool>(device)) {
  const DeviceScope scope(device);
  const RelaxedCapture relaxed;
  copies_ = make_stream();
  if (options_.scratch_bytes > 0) packer_.emplace(options_.scratch_bytes);
}

D2hCopier::~D2hCopier() {
  try {
    const DeviceScope scope(device());
    const RelaxedCapture relaxed;
    settle();
  } catch (const std::exception&) {
    // The runtime is gone already, and no copy is running.
  }
}

uint64_t D2hCopier::submit(std::span<const Piece> pieces, ReadyMark* ready) {
  const auto* mark = dynamic_cast<const CudaReadyMark*>(ready);
  if (ready != nullptr && mark == nullptr)
    throw std::invalid_argument("a CUDA copier was given the ready mark of another device");
  use_device(device());
  const RelaxedCapture relaxed;
  Event end = events_->take();
  try {
    enqueue(pieces, mark);
    check_cuda(cudaEventRecord(end.get(), copies_.get()), "cudaEventRecord of a submission");
    const std::lock_guard lock(mutex_);
    in_flight_.push_back(std::move(end));
    return ended_ + in_flight_.size();
  } catch (...) {
    settle();  // the caller takes its slots back, and no copy may still write to them
    throw;
  }
}

bool D2hCopier::done(uint64_t submission) {
  if (submission <= ended_) return true;
  use_device(device());
  const RelaxedCapture relaxed;
  const cudaError_t status = cudaEventQuery(end_of(submission));
  if (status == cudaErrorNotReady) {
    ignore_cuda(status);  // or the thread's next launch would report it
    return false;
  }
  check_cuda(status, "cudaEventQuery of a submission");
  retire(submission);
  return true;
}

void D2hCopier::wait(uint64_t submission) {
  if (submission <= ended_) return;
  use_device(device());
  const RelaxedCapture relaxed;
  check_cuda(cudaEventSynchronize(end_of(submission)), "cudaEventSynchronize of a submission");
  retire(submission);
}

std::unique_ptr<ReadyMark> D2hCopier::mark_ready(cudaStream_t stream) const {
  return std::make_unique<CudaReadyMark>(events_, stream);
}

void D2hCopier::make_stream_wait(uint64_t submission, cudaStream_t stream) {
  const DeviceScope scope(device());
  const RelaxedCapture relaxed;
  refuse_capture(stream, "waiting for a checkpoint's copy");
  // Held during the call, so that the event is not meanwhile put to use for a later submission.
  const std::lock_guard lock(mutex_);
  if (submission <= ended_) return;
  check_cuda(cudaStreamWaitEvent(stream, end_of(submission), 0),
             "cudaStreamWaitEvent for a submission");
}

void D2hCopier::enqueue(std::span<const Piece> pieces, const CudaReadyMark* ready) {
  places_.clear();
  bool on_device = false;
  for (const Piece& piece : pieces) {
    // Empty tensors may point nowhere.
    places_.push_back(piece.bytes == 0 ? Place::kHost : place_of(piece.from, device()));
    on_device |= places_.back() >= Place::kThisDevice;
  }
  if (ready != nullptr && on_device) {
    ready->hold_back(copies_.get());
    if (packer_) packer_->hold_back(*ready);
  }
  for (size_t i = 0; i < pieces.size();) {
    const size_t run = run_length(pieces, i);
    const std::span<const Place> places(places_.data() + i, run);
    if (std::count(places.begin(), places.end(), Place::kThisDevice) >= kFewestPacked) {
      packer_->pack(pieces.subspan(i, run), places, copies_.get());
    } else {
      for (size_t k = i; k < i + run; ++k) copy_one(pieces[k], places_[k], ready);
    }
    i += run;
  }
}

bool D2hCopier::is_small(const Piece& piece, Place place) const {
  return packer_ && piece.bytes < options_.small_bytes && Packer::can_pack(piece, place);
}

// How many pieces from `first` on could be packed together; 1 where that one cannot be.
size_t D2hCopier::run_length(std::span<const Piece> pieces, size_t first) const {
  if (!is_small(pieces[first], places_[first])) return 1;
  size_t end = first + 1;
  while (end < pieces.size() && is_small(pieces[end], places_[end]) &&
         pieces[end].to == pieces[end - 1].to + pieces[end - 1].bytes)
    ++end;
  return end - first;
}

void D2hCopier::copy_one(const Piece& piece, Place place, const CudaReadyMark* ready) {
  if (piece.bytes == 0) return;
  if (place == Place::kHost || place == Place::kPinnedHost) {
    if (place == Place::kPinnedHost && ready != nullptr) ready->wait();
    std::memcpy(piece.to, piece.from, piece.bytes);
    return;
  }
  check_cuda(cudaMemcpyAsync(piece.to, piece.from, piece.bytes, cudaMemcpyDefault, copies_.get()),
             "cudaMemcpyAsync of a tensor");
}

cudaEvent_t D2hCopier::end_of(uint64_t submission) const {
  const uint64_t index = submission - ended_ - 1;
  if (index >= in_flight_.size())
    throw std::invalid_argument("submission " + std::to_string(submission) + " has not been made");
  return in_flight_[index].get();
}

void D2hCopier::retire(uint64_t submission) {
  const std::lock_guard lock(mutex_);
  for (; ended_ < submission; ++ended_) {
    events_->put_back(std::move(in_flight_.front()));
    in_flight_.pop_front();
  }
}

void D2hCopier::settle() noexcept {
  if (packer_) packer_->settle();
  ignore_cuda(cudaStreamSynchronize(copies_.get()));
}

}  // namespace pccheck
