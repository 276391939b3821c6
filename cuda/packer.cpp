#include "cuda/packer.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/cuda_error.h"
#include "cuda/gather.h"

namespace pccheck {

Packer::Packer(size_t half_bytes) : half_bytes_(half_bytes) {
  if (half_bytes < kLeastBytes)
    throw std::invalid_argument("copy scratch memory must be at least " +
                                std::to_string(kLeastBytes) + " bytes, not " +
                                std::to_string(half_bytes));
  for (Half& half : halves_) half = {allocate_device(half_bytes), make_event(), make_event()};
  packing_ = make_stream();
  load_gather();
}

void Packer::pack(std::span<const Piece> pieces, std::span<const Place> places,
                  cudaStream_t copies) {
  if (pieces.empty()) return;
  to_ = pieces.front().to;
  begin_half();
  for (size_t i = 0; i < pieces.size(); ++i) {
    if (places[i] == Place::kHost)
      append_value(pieces[i], copies);
    else
      append(pieces[i], copies);
  }
  send(copies);
}

void Packer::append(const Piece& piece, cudaStream_t copies) {
  uint64_t from = reinterpret_cast<uint64_t>(piece.from);
  for (size_t left = piece.bytes; left > 0;) {
    if (filled_ == half_bytes_) {
      send(copies);
      begin_half();
    }
    const size_t taken = batch_.add(from, std::min(left, half_bytes_ - filled_));
    if (taken == 0) launch();
    filled_ += taken;
    from += taken;
    left -= taken;
  }
}

void Packer::append_value(const Piece& piece, cudaStream_t copies) {
  if (piece.bytes == 0) return;
  uint64_t value = 0;
  std::memcpy(&value, piece.from, piece.bytes);
  if (half_bytes_ - filled_ < piece.bytes) {
    send(copies);
    begin_half();
  }
  const auto bytes = static_cast<uint32_t>(piece.bytes);
  if (!batch_.add_value(value, bytes)) {
    launch();
    batch_.add_value(value, bytes);
  }
  filled_ += bytes;
}

void Packer::begin_half() {
  filling_ = 1 - filling_;
  filled_ = 0;
  const Half& half = halves_[filling_];
  check_cuda(cudaStreamWaitEvent(packing_.get(), half.copied.get(), 0),
             "cudaStreamWaitEvent for scratch memory to be emptied");
  batch_.start(reinterpret_cast<uint64_t>(half.memory.get()));
}

// Packs what the batch holds, and goes on behind it.
void Packer::launch() {
  launch_gather(batch_, packing_.get());
  batch_.start(batch_.to + batch_.bytes);
}

void Packer::send(cudaStream_t copies) {
  if (filled_ == 0) return;
  const Half& half = halves_[filling_];
  launch();
  check_cuda(cudaEventRecord(half.packed.get(), packing_.get()), "cudaEventRecord of packing");
  check_cuda(cudaStreamWaitEvent(copies, half.packed.get(), 0), "cudaStreamWaitEvent for packing");
  check_cuda(cudaMemcpyAsync(to_, half.memory.get(), filled_, cudaMemcpyDeviceToHost, copies),
             "cudaMemcpyAsync of packed tensors");
  check_cuda(cudaEventRecord(half.copied.get(), copies), "cudaEventRecord of a packed copy");
  to_ += filled_;
}

void Packer::settle() noexcept { ignore_cuda(cudaStreamSynchronize(packing_.get())); }

}  // namespace pccheck
