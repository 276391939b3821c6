// Integers as they stand in files: little endian, whatever the machine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace pccheck {

template <typename Byte>
void put_u64(std::span<Byte, 8> at, uint64_t value) {
  for (size_t i = 0; i < 8; ++i) at[i] = static_cast<Byte>(value >> (8 * i));
}

inline uint64_t get_uint(std::span<const std::byte> bytes) {
  uint64_t value = 0;
  for (size_t i = 0; i < bytes.size(); ++i) value |= std::to_integer<uint64_t>(bytes[i]) << (8 * i);
  return value;
}

}  // namespace pccheck
