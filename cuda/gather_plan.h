// How a gather is cut up: which bytes each warp moves, in words of which width. Arithmetic only,
// without CUDA, so that the kernel and a test on the processor run the same functions. nvcc needs
// --expt-relaxed-constexpr to call them on a device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace pccheck {

// What one warp moves: at most eight 16-byte words a lane, all of them under way at once.
inline constexpr uint32_t kGatherTileBytes = 4096;

struct GatherTile {
  uint64_t from;  // an address, or the value
  uint64_t to;    // an address
  uint32_t bytes;
  bool is_value;
};

// Up to 252 ranges that are packed end to end by one kernel. A range is device memory, or a value
// of up to eight bytes that comes with the batch: an optimizer's step count in host memory, between
// moments on the device, would otherwise tear every run of them apart. The batch travels as the
// kernel's parameter, copied by the launch: no buffer to keep until the kernel has run, and 4 KiB
// is what every launch path takes.
struct GatherBatch {
  static constexpr uint32_t kMaxRanges = 252;
  static constexpr uint32_t kMaxBytes = uint32_t{1} << 30;  // keeps 32-bit sums from overflowing
  static constexpr uint32_t kMaxValueBytes = 8;

  struct Range {
    uint64_t from;  // an address, or the value
    uint32_t to;    // bytes after GatherBatch::to, which is also where the range before ends
    uint32_t first_tile : 31;
    uint32_t is_value : 1;
  };

  uint64_t to;
  uint32_t bytes;
  uint32_t tiles;
  uint32_t ranges;
  Range range[kMaxRanges];  // no range is empty

  constexpr void start(uint64_t to_address) {
    to = to_address;
    bytes = tiles = ranges = 0;
  }

  // Appends as much of a range as there is room for; returns how much that was. Nothing of it: the
  // batch is full (or the range empty).
  constexpr size_t add(uint64_t from, size_t range_bytes) {
    if (ranges == kMaxRanges || range_bytes == 0) return 0;
    const uint32_t room = kMaxBytes - bytes;
    const uint32_t taken = range_bytes < room ? static_cast<uint32_t>(range_bytes) : room;
    if (taken > 0) append(from, taken, false);
    return taken;
  }

  // Appends the first bytes, in memory, of a value. False: the batch is full.
  constexpr bool add_value(uint64_t value, uint32_t value_bytes) {
    if (ranges == kMaxRanges || kMaxBytes - bytes < value_bytes) return false;
    if (value_bytes > 0) append(value, value_bytes, true);
    return true;
  }

  // The bytes that tile `index` < `tiles` moves. Tiles begin every kGatherTileBytes of a range.
  constexpr GatherTile tile(uint32_t index) const {
    uint32_t low = 0;  // the last range whose first tile is not behind `index` is in [low, high)
    uint32_t high = ranges;
    while (high - low > 1) {
      const uint32_t middle = (low + high) / 2;
      if (range[middle].first_tile <= index)
        low = middle;
      else
        high = middle;
    }
    const Range& found = range[low];
    const uint32_t end = low + 1 < ranges ? range[low + 1].to : bytes;
    const uint32_t offset = (index - found.first_tile) * kGatherTileBytes;
    const uint32_t left = end - found.to - offset;
    return {found.from + offset, to + found.to + offset,
            left < kGatherTileBytes ? left : kGatherTileBytes, found.is_value != 0};
  }

 private:
  constexpr void append(uint64_t from, uint32_t range_bytes, bool is_value) {
    range[ranges++] = {from, bytes, tiles, is_value};
    bytes += range_bytes;
    tiles += (range_bytes + kGatherTileBytes - 1) / kGatherTileBytes;
  }
};

static_assert(std::is_trivially_copyable_v<GatherBatch>);
static_assert(sizeof(GatherBatch) <= 4096);

// A copy as single bytes up to the first word border, whole words, and single bytes after them.
struct WordSplit {
  uint32_t word_bytes;  // 16, 8, 4, 2 or 1
  uint32_t head_bytes;  // fewer than a word
  uint32_t words;
  uint32_t tail_bytes;  // fewer than a word
};

// In the widest words whose borders fall together in both places. They fall together nowhere if the
// addresses differ by less than a word: then the words are narrower.
constexpr WordSplit split_into_words(uint64_t from, uint64_t to, uint32_t bytes) {
  uint32_t word_bytes = 16;
  while (((from ^ to) & (word_bytes - 1)) != 0) word_bytes /= 2;
  const uint32_t past_border = static_cast<uint32_t>(to & (word_bytes - 1));
  uint32_t head_bytes = past_border == 0 ? 0 : word_bytes - past_border;
  if (head_bytes > bytes) head_bytes = bytes;
  const uint32_t rest = bytes - head_bytes;
  return {word_bytes, head_bytes, rest / word_bytes, rest % word_bytes};
}

}  // namespace pccheck
