// CRC32C (Castagnoli, reflected polynomial 0x82F63B78, as in iSCSI and ext4).
//
// The checksum of a concatenation is computed by passing the first part's result on:
//   crc32c(crc32c(0, a), b) == crc32c(0, a + b)
// Pure functions, safe on any thread. The fastest implementation that the processor can run is
// used; all give the same values.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace pccheck {

uint32_t crc32c(uint32_t crc, std::span<const std::byte> bytes);

// How a copy is stored: in the caches as usual, or past them. Advice: not every processor has both.
enum class Stores { cached, streamed };

// Copies `bytes` bytes and folds them into `crc` on the way. What is summed is what was stored: a
// source that changes meanwhile cannot make the two differ.
uint32_t copy_with_crc32c(uint32_t crc, std::byte* to, const std::byte* from, size_t bytes,
                          Stores stores = Stores::cached);

namespace detail {

// One way to compute it; tests compare all that run here.
class Crc32c {
 public:
  using Fold = uint32_t (*)(uint32_t, const std::byte*, size_t);
  using FoldCopy = uint32_t (*)(uint32_t, std::byte*, const std::byte*, size_t);

  Crc32c(const char* name, Fold fold, FoldCopy cached, FoldCopy streamed)
      : name(name), fold_(fold), cached_(cached), streamed_(streamed) {}

  uint32_t sum(uint32_t crc, std::span<const std::byte> bytes) const;
  uint32_t copy(uint32_t crc, std::byte* to, const std::byte* from, size_t bytes,
                Stores stores) const;

  const char* name;

 private:
  Fold fold_;  // all on the inverted register, as the instruction keeps it
  FoldCopy cached_, streamed_;
};

// The portable one first, the fastest last.
const std::vector<Crc32c>& crc32c_implementations();

uint32_t crc32c_portable(uint32_t crc, std::span<const std::byte> bytes);

}  // namespace detail

}  // namespace pccheck
