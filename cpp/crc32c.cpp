#include "cpp/crc32c.h"

#include <algorithm>
#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
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

// Copies a piece at a time, then sums the copy while it is in the nearest cache.
template <uint32_t (*kFold)(uint32_t, const std::byte*, size_t)>
uint32_t copy_then_fold(uint32_t crc, std::byte* to, const std::byte* from, size_t bytes) {
  // Whole stripes, and small enough that copy and source stay in a 32 KiB first-level cache.
  constexpr size_t kPieceBytes = 4 * 3 * 1024;
  while (bytes > 0) {
    const size_t piece = std::min(bytes, kPieceBytes);
    std::memcpy(to, from, piece);
    crc = kFold(crc, to, piece);
    to += piece;
    from += piece;
    bytes -= piece;
  }
  return crc;
}

#if defined(__x86_64__)

// --- SSE4.2: the instruction ---------------------------------------------------------------------
//
// It takes three cycles and one can start every cycle, so three independent lanes run side by side;
// their registers are then joined by moving the earlier ones over the later lanes' bytes. Moving a
// register over n zero bytes is linear, hence four 256-entry tables.
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

// --- AVX-512: carry-less multiplication ----------------------------------------------------------
//
// A message is a polynomial over GF(2) and its CRC what is left of it modulo P, so 16 bytes that
// stand D bits before others may be replaced by anything of the same remainder added to those
// others: the two halves, each times x to its distance, modulo P. Sixteen such lanes in four
// registers go over the message 256 bytes at a time; the instruction sums what they hold at the
// end.
constexpr size_t kFoldBytes = 256;

// x^n modulo P, bits reversed as the format has it: bit 31 is x^0.
constexpr uint32_t power_of_x(size_t n) {
  uint32_t power = 0x80000000u;
  for (; n > 0; --n) power = (power >> 1) ^ ((power & 1) ? kPolynomial : 0);
  return power;
}

// The product of two reversed 64-bit polynomials comes out one bit to the right; shifting the
// constant, which has 31 bits to spare, makes up for it. The lower half of a lane stands for the
// higher powers: it is 64 bits farther from the end.
constexpr auto kLowerFactor =
    static_cast<long long>(uint64_t{power_of_x(8 * kFoldBytes + 32)} << 1);
constexpr auto kUpperFactor =
    static_cast<long long>(uint64_t{power_of_x(8 * kFoldBytes - 32)} << 1);

#define PCCHECK_AVX512 __attribute__((target("avx512f,vpclmulqdq,sse4.2")))

enum class Does { fold, copy, stream };

// Who sums bytes is done with them: they are loaded past the outer caches, which then hold what is
// used again, and which a writer of the same memory need not clear.
constexpr size_t kLoadAheadBytes = 1024;

// Each word is loaded once, folded and stored: copy and sum cannot differ.
template <Does kDoes>
PCCHECK_AVX512 uint32_t run_avx512(uint32_t crc, std::byte* to, const std::byte* from,
                                   size_t bytes) {
  constexpr bool kCopies = kDoes != Does::fold;
  const auto store = [](std::byte* at, __m512i word) PCCHECK_AVX512 {
    if (kDoes == Does::copy) _mm512_storeu_si512(at, word);
    if (kDoes == Does::stream) _mm512_stream_si512(reinterpret_cast<__m512i*>(at), word);
  };
  if (kCopies) {
    const size_t head = std::min(bytes, -reinterpret_cast<uintptr_t>(to) % 64);  // to whole lines
    crc = copy_then_fold<fold_sse42>(crc, to, from, head);
    to += head;
    from += head;
    bytes -= head;
  }
  if (bytes >= 2 * kFoldBytes) {
    const __m512i factors =
        _mm512_set4_epi64(kUpperFactor, kLowerFactor, kUpperFactor, kLowerFactor);
    __m512i lanes[4];
    for (size_t i = 0; i < 4; ++i) {
      lanes[i] = _mm512_loadu_si512(from + 64 * i);
      if constexpr (kCopies) store(to + 64 * i, lanes[i]);
    }
    lanes[0] = _mm512_xor_si512(lanes[0],
                                _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(crc))));
    size_t done = kFoldBytes;
    for (; bytes - done >= kFoldBytes; done += kFoldBytes)
      for (size_t i = 0; i < 4; ++i) {
        _mm_prefetch(reinterpret_cast<const char*>(from + done + 64 * i + kLoadAheadBytes),
                     _MM_HINT_NTA);
        const __m512i next = _mm512_loadu_si512(from + done + 64 * i);
        if constexpr (kCopies) store(to + done + 64 * i, next);
        constexpr int kXorOfThree = 0x96;
        lanes[i] = _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(lanes[i], factors, 0x00),
                                             _mm512_clmulepi64_epi128(lanes[i], factors, 0x11),
                                             next, kXorOfThree);
      }
    // Before another thread is told of the copy: such stores are ordered by nothing else.
    if (kDoes == Does::stream) _mm_sfence();
    std::array<std::byte, kFoldBytes> rest;
    for (size_t i = 0; i < 4; ++i) _mm512_storeu_si512(rest.data() + 64 * i, lanes[i]);
    crc = fold_sse42(0, rest.data(), rest.size());
    from += done;
    bytes -= done;
    if (kCopies) to += done;
  }
  return kCopies ? copy_then_fold<fold_sse42>(crc, to, from, bytes) : fold_sse42(crc, from, bytes);
}

PCCHECK_AVX512 uint32_t fold_avx512(uint32_t crc, const std::byte* at, size_t bytes) {
  return run_avx512<Does::fold>(crc, nullptr, at, bytes);
}

#endif

using detail::Crc32c;

std::vector<Crc32c> find_implementations() {
  std::vector<Crc32c> found{
      {"portable", fold_portable, copy_then_fold<fold_portable>, copy_then_fold<fold_portable>}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.2")) {
    found.push_back({"sse4.2", fold_sse42, copy_then_fold<fold_sse42>, copy_then_fold<fold_sse42>});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq"))
      found.push_back({"avx512", fold_avx512, run_avx512<Does::copy>, run_avx512<Does::stream>});
  }
#endif
  return found;
}

const Crc32c& fastest() {
  static const Crc32c& chosen = detail::crc32c_implementations().back();
  return chosen;
}

}  // namespace

uint32_t crc32c(uint32_t crc, std::span<const std::byte> bytes) {
  return fastest().sum(crc, bytes);
}

uint32_t copy_with_crc32c(uint32_t crc, std::byte* to, const std::byte* from, size_t bytes,
                          Stores stores) {
  return fastest().copy(crc, to, from, bytes, stores);
}

namespace detail {

uint32_t Crc32c::sum(uint32_t crc, std::span<const std::byte> bytes) const {
  return ~fold_(~crc, bytes.data(), bytes.size());
}

uint32_t Crc32c::copy(uint32_t crc, std::byte* to, const std::byte* from, size_t bytes,
                      Stores stores) const {
  return ~(stores == Stores::streamed ? streamed_ : cached_)(~crc, to, from, bytes);
}

const std::vector<Crc32c>& crc32c_implementations() {
  static const std::vector<Crc32c> found = find_implementations();
  return found;
}

uint32_t crc32c_portable(uint32_t crc, std::span<const std::byte> bytes) {
  return ~fold_portable(~crc, bytes.data(), bytes.size());
}

}  // namespace detail
}  // namespace pccheck
