// Sends many small pieces of device memory into a slot as one copy: a kernel packs them into one
// half of a scratch buffer while the copy engine empties the other half. Called by one thread at a
// time, with the device current on which it was made. Never waits.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <span>

#include "cpp/copier.h"
#include "cuda/gather_plan.h"
#include "cuda/handles.h"
#include "cuda/place.h"
#include "cuda/ready_mark.h"

namespace pccheck {

class Packer {
 public:
  static constexpr size_t kLeastBytes = 4096;

  // On the current device. Takes twice `half_bytes` of its memory, at least kLeastBytes.
  explicit Packer(size_t half_bytes);

  // Pieces packed from now on are read after the mark is reached.
  void hold_back(const CudaReadyMark& ready) { ready.hold_back(packing_.get()); }

  static bool can_pack(const Piece& piece, Place place) {
    return place == Place::kThisDevice ||
           (place == Place::kHost && piece.bytes <= GatherBatch::kMaxValueBytes);
  }

  // Pieces that can_pack(), with their places; each goes to where the one before it ends. Device
  // sources are read by a stream of the packer's own, host sources before this returns. The slot is
  // written by `copies`: what that is given afterwards runs when all of this has ended.
  void pack(std::span<const Piece> pieces, std::span<const Place> places, cudaStream_t copies);

  // Waits until nothing of it runs any more, whatever became of it.
  void settle() noexcept;

 private:
  struct Half {
    DeviceMemory memory;  // written by packing_, read by pack()'s `copies`
    Event packed;         // recorded on packing_
    Event copied;         // recorded on `copies`; before the first time it holds nothing back
  };

  void begin_half();
  void append(const Piece& piece, cudaStream_t copies);
  void append_value(const Piece& piece, cudaStream_t copies);
  void launch();
  void send(cudaStream_t copies);

  const size_t half_bytes_;
  std::array<Half, 2> halves_;
  size_t filling_ = 0;       // the half that is being filled
  size_t filled_ = 0;        // bytes of it
  std::byte* to_ = nullptr;  // where in the slot they go
  GatherBatch batch_;        // ends where the half is filled up to
  Stream packing_;           // last: no kernel of it outlives the scratch memory's owner unnoticed
};

}  // namespace pccheck
