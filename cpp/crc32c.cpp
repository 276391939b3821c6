#include "cpp/crc32c.h"

#include <algorithm>
#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace pccheck {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78u;

using Table = std::array<uint32_t, 256>;

// kBytewise[k][b]: the effect of byte b standing k bytes before the end of an 8-byte word.
constexpr std::array<Table, 8> make_bytewise_tables() {
  std::array<Table, 8> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? kPolynomial : 0);
    tables[0][byte] = crc;
  }
  for (size_t k = 1; k < 8; ++k)
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[k - 1][byte];
      tables[k][byte] = (before >> 8) ^ tables[0][before & 0xff];
    }
  return tables;
}

constexpr std::array<Table, 8> kBytewise = make_bytewise_tables();

uint64_t load_u64(const std::byte* at) {
  uint64_t word;
  std::memcpy(&word, at, sizeof word);
  return word;
}

// `crc` here and below is the inverted register, as the instruction keeps it.
uint32_t fold_portable(uint32_t crc, const std::byte* at, size_t bytes) {
  for (; bytes >= 8; at += 8, bytes -= 8) {
    const uint64_t word = load_u64(at) ^ crc;
    crc = kBytewise[7][word & 0xff] ^ kBytewise[6][(word >> 8) & 0xff] ^
          kBytewise[5][(word >> 16) & 0xff] ^ kBytewise[4][(word >> 24) & 0xff] ^
          kBytewise[3][(word >> 32) & 0xff] ^ kBytewise[2][(word >> 40) & 0xff] ^
          kBytewise[1][(word >> 48) & 0xff] ^ kBytewise[0][word >> 56];
  }
  for (; bytes > 0; ++at, --bytes)
    crc = (crc >> 8) ^ kBytewise[0][(crc ^ std::to_integer<uint32_t>(*at)) & 0xff];
  return crc;
}

#if defined(__x86_64__)

// The instruction takes three cycles and one can start every cycle, so three independent lanes run
// side by side; their registers are then joined by moving the earlier ones over the later lanes'
// bytes. Moving a register over n zero bytes is linear, hence four 256-entry tables.
constexpr size_t kLaneBytes = 1024;
constexpr size_t kStripeBytes = 3 * kLaneBytes;

constexpr uint32_t over_zero_bytes(uint32_t crc, size_t count) {
  for (size_t i = 0; i < count; ++i) crc = (crc >> 8) ^ kBytewise[0][crc & 0xff];
  return crc;
}

std::array<Table, 4> make_lane_shift() {
  std::array<Table, 4> shift{};
  for (size_t k = 0; k < 4; ++k)
    for (uint32_t byte = 0; byte < 256; ++byte)
      shift[k][byte] = over_zero_bytes(byte << (8 * k), kLaneBytes);
  return shift;
}

uint32_t over_one_lane(const std::array<Table, 4>& shift, uint32_t crc) {
  return shift[0][crc & 0xff] ^ shift[1][(crc >> 8) & 0xff] ^ shift[2][(crc >> 16) & 0xff] ^
         shift[3][crc >> 24];
}

__attribute__((target("sse4.2"))) uint32_t fold_sse42(uint32_t crc, const std::byte* at,
                                                      size_t bytes) {
  static const std::array<Table, 4> shift = make_lane_shift();
  for (; bytes >= kStripeBytes; at += kStripeBytes, bytes -= kStripeBytes) {
    uint64_t first = crc, second = 0, third = 0;
    for (size_t i = 0; i < kLaneBytes; i += 8) {
      first = _mm_crc32_u64(first, load_u64(at + i));
      second = _mm_crc32_u64(second, load_u64(at + kLaneBytes + i));
      third = _mm_crc32_u64(third, load_u64(at + 2 * kLaneBytes + i));
    }
    crc = over_one_lane(shift, static_cast<uint32_t>(first)) ^ static_cast<uint32_t>(second);
    crc = over_one_lane(shift, crc) ^ static_cast<uint32_t>(third);
  }
  uint64_t tail = crc;
  for (; bytes >= 8; at += 8, bytes -= 8) tail = _mm_crc32_u64(tail, load_u64(at));
  crc = static_cast<uint32_t>(tail);
  for (; bytes > 0; ++at, --bytes) crc = _mm_crc32_u8(crc, std::to_integer<uint8_t>(*at));
  return crc;
}

#endif

using Fold = uint32_t (*)(uint32_t, const std::byte*, size_t);

Fold choose_fold() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.2")) return fold_sse42;
#endif
  return fold_portable;
}

Fold fold() {
  static const Fold chosen = choose_fold();
  return chosen;
}

}  // namespace

uint32_t crc32c(uint32_t crc, std::span<const std::byte> bytes) {
  return ~fold()(~crc, bytes.data(), bytes.size());
}

uint32_t copy_with_crc32c(uint32_t crc, std::byte* to, const std::byte* from, size_t bytes) {
  // Whole stripes, and small enough that copy and source stay in a 32 KiB first-level cache.
  constexpr size_t kPieceBytes = 4 * 3 * 1024;
  const Fold fold_piece = fold();
  uint32_t inverted = ~crc;
  while (bytes > 0) {
    const size_t piece = std::min(bytes, kPieceBytes);
    std::memcpy(to, from, piece);
    inverted = fold_piece(inverted, to, piece);
    to += piece;
    from += piece;
    bytes -= piece;
  }
  return ~inverted;
}

namespace detail {

uint32_t crc32c_portable(uint32_t crc, std::span<const std::byte> bytes) {
  return ~fold_portable(~crc, bytes.data(), bytes.size());
}

bool crc32c_is_hardware() { return fold() != fold_portable; }

}  // namespace detail
}  // namespace pccheck
