#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/cuda_error.h"
#include "cuda/gather.h"

namespace pccheck {
namespace {

constexpr uint32_t kLanes = 32;
constexpr uint32_t kWarps = 8;
constexpr uint32_t kUnderWay = 8;  // loads a lane issues before it waits for the first

// Copies `words` words, the lanes of a warp side by side.
template <class Word>
__device__ void copy_words(uint64_t from, uint64_t to, uint32_t words, uint32_t lane) {
  const auto* source = reinterpret_cast<const Word*>(from);
  auto* target = reinterpret_cast<Word*>(to);
  for (uint32_t first = lane; first < words; first += kUnderWay * kLanes) {
    Word held[kUnderWay];
#pragma unroll
    for (uint32_t i = 0; i < kUnderWay; ++i)
      if (first + i * kLanes < words) held[i] = source[first + i * kLanes];
#pragma unroll
    for (uint32_t i = 0; i < kUnderWay; ++i)
      if (first + i * kLanes < words) target[first + i * kLanes] = held[i];
  }
}

// One warp a tile. Tiles come from the parameter itself, which all lanes read at the same place.
__global__ void __launch_bounds__(kLanes* kWarps)
    gather_kernel(const __grid_constant__ GatherBatch batch) {
  const uint32_t index = blockIdx.x * kWarps + threadIdx.x / kLanes;
  const uint32_t lane = threadIdx.x % kLanes;
  if (index >= batch.tiles) return;
  const GatherTile tile = batch.tile(index);
  if (tile.is_value) {
    if (lane < tile.bytes)
      reinterpret_cast<uint8_t*>(tile.to)[lane] = static_cast<uint8_t>(tile.from >> (8 * lane));
    return;
  }
  const WordSplit split = split_into_words(tile.from, tile.to, tile.bytes);

  copy_words<uint8_t>(tile.from, tile.to, split.head_bytes, lane);
  const uint64_t from = tile.from + split.head_bytes;
  const uint64_t to = tile.to + split.head_bytes;
  switch (split.word_bytes) {
    case 16:
      copy_words<uint4>(from, to, split.words, lane);
      break;
    case 8:
      copy_words<uint64_t>(from, to, split.words, lane);
      break;
    case 4:
      copy_words<uint32_t>(from, to, split.words, lane);
      break;
    case 2:
      copy_words<uint16_t>(from, to, split.words, lane);
      break;
    default:
      copy_words<uint8_t>(from, to, split.words, lane);
  }
  const uint32_t copied = split.words * split.word_bytes;
  copy_words<uint8_t>(from + copied, to + copied, split.tail_bytes, lane);
}

}  // namespace

void launch_gather(const GatherBatch& batch, cudaStream_t stream) {
  if (batch.tiles == 0) return;
  const uint32_t blocks = (batch.tiles + kWarps - 1) / kWarps;
  gather_kernel<<<blocks, kLanes * kWarps, 0, stream>>>(batch);
  check_cuda(cudaGetLastError(), "launch of the gather kernel");
}

void gather(std::span<const GatherRange> ranges, std::byte* to, cudaStream_t stream) {
  uint64_t next = reinterpret_cast<uint64_t>(to);
  GatherBatch batch;
  batch.start(next);
  for (const GatherRange& range : ranges) {
    uint64_t from = reinterpret_cast<uint64_t>(range.from);
    size_t left = range.bytes;
    while (left > 0) {
      const size_t taken = batch.add(from, left);
      if (taken == 0) {
        launch_gather(batch, stream);
        batch.start(next);
      }
      from += taken;
      next += taken;
      left -= taken;
    }
  }
  launch_gather(batch, stream);
}

void load_gather() {
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, gather_kernel), "loading the gather kernel");
}

}  // namespace pccheck
