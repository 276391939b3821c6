// CRC32C (Castagnoli, reflected polynomial 0x82F63B78, as in iSCSI and ext4).
//
// The checksum of a concatenation is computed by passing the first part's result on:
//   crc32c(crc32c(0, a), b) == crc32c(0, a + b)
// Pure functions, safe on any thread. The processor's own instruction is used where there is one,
// a table otherwise; both give the same values.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace pccheck {

uint32_t crc32c(uint32_t crc, std::span<const std::byte> bytes);

// Copies `bytes` bytes and folds them into `crc` while they are still in the nearest cache. What is
// summed is the copy, not the source: a source that changes meanwhile cannot make the two differ.
uint32_t copy_with_crc32c(uint32_t crc, std::byte* to, const std::byte* from, size_t bytes);

namespace detail {
// The portable path, reachable on every machine so that tests can compare the two.
uint32_t crc32c_portable(uint32_t crc, std::span<const std::byte> bytes);
bool crc32c_is_hardware();
}  // namespace detail

}  // namespace pccheck
