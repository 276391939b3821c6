#include "cpp/digest.h"

#include <bit>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pccheck {
namespace {

using detail::DigestFold;
using Lanes = detail::DigestLanes;

constexpr uint64_t kPrime32_1 = 0x9E3779B1, kPrime32_2 = 0x85EBCA77, kPrime32_3 = 0xC2B2AE3D;
constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87, kPrime64_2 = 0xC2B2AE3D27D4EB4F,
                   kPrime64_3 = 0x165667B19E3779F9, kPrime64_4 = 0x85EBCA77C2B2AE63,
                   kPrime64_5 = 0x27D4EB2F165667C5;
constexpr uint64_t kMix1 = 0x165667919E3779F9, kMix2 = 0x9FB21C651E98DF25;

// The specification's default secret, its 192 bytes read as little-endian words.
constexpr std::array<uint64_t, 24> kSecret{
    0xbe4ba423396cfeb8, 0x1cad21f72c81017c, 0xdb979083e96dd4de, 0x1f67b3b7a4a44072,
    0x78e5c0cc4ee679cb, 0x2172ffcc7dd05a82, 0x8e2443f7744608b8, 0x4c263a81e69035e0,
    0xcb00c391bb52283c, 0xa32e531b8b65d088, 0x4ef90da297486471, 0xd8acdea946ef1938,
    0x3f349ce33f76faa8, 0x1d4f0bc7c7bbdcf9, 0x3159b4cd4be0518a, 0x647378d9c97e9fc8,
    0xc3ebd33483acc5ea, 0xeb6313faffa081c5, 0x49daf0b751dd0d17, 0x9e68d429265516d3,
    0xfca1477d58be162b, 0xce31d07ad1b8f88f, 0x280416958f3acb45, 0x7e404bbbcafbd7af};
constexpr size_t kSecretBytes = 8 * kSecret.size();

// The word that starts at any byte of the secret.
constexpr uint64_t secret_u64(size_t offset) {
  const size_t word = offset / 8, bits = 8 * (offset % 8);
  if (bits == 0) return kSecret[word];
  return (kSecret[word] >> bits) | (kSecret[word + 1] << (64 - bits));
}

constexpr Lanes secret_lanes(size_t offset) {
  Lanes words{};
  for (size_t i = 0; i < words.size(); ++i) words[i] = secret_u64(offset + 8 * i);
  return words;
}

constexpr uint32_t low_half(uint64_t word) { return static_cast<uint32_t>(word); }
constexpr uint64_t high_half(uint64_t word) { return word >> 32; }

uint64_t load_u64(const std::byte* at) {
  uint64_t word;
  std::memcpy(&word, at, sizeof word);
  return std::endian::native == std::endian::big ? __builtin_bswap64(word) : word;
}

uint32_t load_u32(const std::byte* at) {
  uint32_t word;
  std::memcpy(&word, at, sizeof word);
  return std::endian::native == std::endian::big ? __builtin_bswap32(word) : word;
}

__extension__ using U128 = unsigned __int128;

struct Halves {
  uint64_t low, high;
};

Halves multiply(uint64_t a, uint64_t b) {
  const U128 product = U128{a} * b;
  return {static_cast<uint64_t>(product), static_cast<uint64_t>(product >> 64)};
}

uint64_t multiply_and_xor(uint64_t a, uint64_t b) {
  const Halves product = multiply(a, b);
  return product.low ^ product.high;
}

uint64_t avalanche(uint64_t x) {
  x ^= x >> 37;
  x *= kMix1;
  return x ^ (x >> 32);
}

uint64_t avalanche_xxh64(uint64_t x) {
  x ^= x >> 33;
  x *= kPrime64_2;
  x ^= x >> 29;
  x *= kPrime64_3;
  return x ^ (x >> 32);
}

// --- Up to 240 bytes -----------------------------------------------------------------------------
constexpr size_t kShortBytes = 240;

Digest digest_0() {
  return {avalanche_xxh64(secret_u64(64) ^ secret_u64(72)),
          avalanche_xxh64(secret_u64(80) ^ secret_u64(88))};
}

Digest digest_1_to_3(const std::byte* at, size_t bytes) {
  const auto byte = [at](size_t i) { return std::to_integer<uint32_t>(at[i]); };
  const uint32_t all =
      byte(bytes - 1) | static_cast<uint32_t>(bytes << 8) | byte(0) << 16 | byte(bytes / 2) << 24;
  const uint64_t low = low_half(secret_u64(0)) ^ high_half(secret_u64(0));
  const uint64_t high = low_half(secret_u64(8)) ^ high_half(secret_u64(8));
  return {avalanche_xxh64(low ^ all),
          avalanche_xxh64(high ^ std::rotl(__builtin_bswap32(all), 13))};
}

Digest digest_4_to_8(const std::byte* at, size_t bytes) {
  const uint64_t both = load_u32(at) | uint64_t{load_u32(at + bytes - 4)} << 32;
  auto [low, high] =
      multiply(secret_u64(16) ^ secret_u64(24) ^ both, kPrime64_1 + (uint64_t{bytes} << 2));
  high += low << 1;
  low ^= high >> 3;
  low ^= low >> 35;
  low *= kMix2;
  low ^= low >> 28;
  return {low, avalanche(high)};
}

Digest digest_9_to_16(const std::byte* at, size_t bytes) {
  const uint64_t first = load_u64(at), last = load_u64(at + bytes - 8);
  const uint64_t a = secret_u64(32) ^ secret_u64(40) ^ first ^ last;
  const uint64_t b = secret_u64(48) ^ secret_u64(56) ^ last;
  auto [low, high] = multiply(a, kPrime64_1);
  low += uint64_t{bytes - 1} << 54;
  high += (high_half(b) << 32) + low_half(b) * kPrime32_2;
  low ^= __builtin_bswap64(high);
  const Halves product = multiply(low, kPrime64_2);
  return {avalanche(product.low), avalanche(product.high + high * kPrime64_2)};
}

// Two times 16 bytes, with 32 bytes of the secret from `offset` on.
void mix(Halves& sums, const std::byte* a, const std::byte* b, size_t offset) {
  const uint64_t a0 = load_u64(a), a1 = load_u64(a + 8);
  const uint64_t b0 = load_u64(b), b1 = load_u64(b + 8);
  sums.low += multiply_and_xor(a0 ^ secret_u64(offset), a1 ^ secret_u64(offset + 8));
  sums.high += multiply_and_xor(b0 ^ secret_u64(offset + 16), b1 ^ secret_u64(offset + 24));
  sums.low ^= b0 + b1;
  sums.high ^= a0 + a1;
}

Digest digest_17_to_240(const std::byte* at, size_t bytes) {
  const std::byte* const end = at + bytes;
  Halves sums{bytes * kPrime64_1, 0};
  if (bytes <= 128) {  // from both ends to the middle
    for (size_t i = (bytes - 1) / 32 + 1; i-- > 0;)
      mix(sums, at + 16 * i, end - 16 * (i + 1), 32 * i);
  } else {
    for (size_t i = 0; i < 4; ++i) mix(sums, at + 32 * i, at + 32 * i + 16, 32 * i);
    sums = {avalanche(sums.low), avalanche(sums.high)};
    for (size_t i = 4; i < bytes / 32; ++i)
      mix(sums, at + 32 * i, at + 32 * i + 16, 32 * (i - 4) + 3);
    mix(sums, end - 16, end - 32, 103);
  }
  const uint64_t high = sums.low * kPrime64_1 + sums.high * kPrime64_4 + bytes * kPrime64_2;
  return {avalanche(sums.low + sums.high), uint64_t{0} - avalanche(high)};
}

Digest digest_short(const std::byte* at, size_t bytes) {
  if (bytes == 0) return digest_0();
  if (bytes <= 3) return digest_1_to_3(at, bytes);
  if (bytes <= 8) return digest_4_to_8(at, bytes);
  if (bytes <= 16) return digest_9_to_16(at, bytes);
  return digest_17_to_240(at, bytes);
}

// --- More than 240 bytes -------------------------------------------------------------------------
//
// A stripe is eight words, one for each lane. A round (the specification's block) is 16 stripes,
// each with a part of the secret that starts a word further on; then the lanes are scrambled.
constexpr size_t kStripeBytes = 64;
constexpr size_t kRoundStripes = 16;
constexpr size_t kRoundBytes = kRoundStripes * kStripeBytes;

constexpr Lanes kFirstLanes{kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
                            kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};

// Each stripe's part in a line of its own: seven of eight would otherwise lie across two.
struct Keys {
  alignas(64) std::array<Lanes, kRoundStripes> of_stripe{};
  alignas(64) Lanes of_scramble = secret_lanes(kSecretBytes - 64);
};

constexpr Keys make_keys() {
  Keys keys;
  for (size_t i = 0; i < kRoundStripes; ++i) keys.of_stripe[i] = secret_lanes(8 * i);
  return keys;
}

constexpr Keys kKeys = make_keys();

void fold_stripe(Lanes& lanes, const std::byte* at, const Lanes& key) {
  for (size_t i = 0; i < lanes.size(); ++i) {
    const uint64_t word = load_u64(at + 8 * i);
    const uint64_t keyed = word ^ key[i];
    lanes[i ^ 1] += word;
    lanes[i] += low_half(keyed) * high_half(keyed);
  }
}

void fold_portable(Lanes& lanes, const std::byte* from, size_t rounds) {
  for (; rounds > 0; --rounds, from += kRoundBytes) {
    for (size_t i = 0; i < kRoundStripes; ++i)
      fold_stripe(lanes, from + kStripeBytes * i, kKeys.of_stripe[i]);
    for (size_t i = 0; i < lanes.size(); ++i)
      lanes[i] = (lanes[i] ^ (lanes[i] >> 47) ^ kKeys.of_scramble[i]) * kPrime32_1;
  }
}

#if defined(__x86_64__)

// What a stripe adds does not depend on the lanes, so that only one addition for each stripe and
// the scramble, once a round, wait for what was before.

__attribute__((target("avx2"))) void fold_avx2(Lanes& lanes, const std::byte* from, size_t rounds) {
  const auto vector = [](auto* at) { return reinterpret_cast<const __m256i*>(at); };
  const __m256i prime = _mm256_set1_epi64x(static_cast<int64_t>(kPrime32_1));
  __m256i sums[2];
  for (size_t half = 0; half < 2; ++half) sums[half] = _mm256_loadu_si256(vector(&lanes[4 * half]));
  for (; rounds > 0; --rounds, from += kRoundBytes) {
    for (size_t i = 0; i < kRoundStripes; ++i)
      for (size_t half = 0; half < 2; ++half) {
        const __m256i words = _mm256_loadu_si256(vector(from + kStripeBytes * i + 32 * half));
        const __m256i key = _mm256_load_si256(vector(&kKeys.of_stripe[i][4 * half]));
        const __m256i keyed = _mm256_xor_si256(words, key);
        const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
        const __m256i swapped = _mm256_shuffle_epi32(words, _MM_SHUFFLE(1, 0, 3, 2));
        sums[half] = _mm256_add_epi64(sums[half], _mm256_add_epi64(product, swapped));
      }
    for (size_t half = 0; half < 2; ++half) {
      const __m256i key = _mm256_load_si256(vector(&kKeys.of_scramble[4 * half]));
      const __m256i keyed =
          _mm256_xor_si256(_mm256_xor_si256(sums[half], _mm256_srli_epi64(sums[half], 47)), key);
      const __m256i upper = _mm256_mul_epu32(_mm256_srli_epi64(keyed, 32), prime);
      sums[half] = _mm256_add_epi64(_mm256_mul_epu32(keyed, prime), _mm256_slli_epi64(upper, 32));
    }
  }
  std::memcpy(lanes.data(), sums, sizeof sums);
}

// The masks take every word. Of the forms without one, GCC 12 warns that they read what nobody set.
__attribute__((target("avx512f"))) void fold_avx512(Lanes& lanes, const std::byte* from,
                                                    size_t rounds) {
  constexpr __mmask8 kAll = 0xff;
  constexpr __mmask16 kAllHalves = 0xffff;
  constexpr int kXorOfThree = 0x96;
  const __m512i prime = _mm512_set1_epi64(static_cast<int64_t>(kPrime32_1));
  const __m512i scramble_key = _mm512_load_si512(kKeys.of_scramble.data());
  __m512i sums = _mm512_loadu_si512(lanes.data());
  for (; rounds > 0; --rounds, from += kRoundBytes) {
    for (size_t i = 0; i < kRoundStripes; ++i) {
      const __m512i words = _mm512_loadu_si512(from + kStripeBytes * i);
      const __m512i key = _mm512_load_si512(kKeys.of_stripe[i].data());
      const __m512i keyed = _mm512_xor_si512(words, key);
      const __m512i high = _mm512_maskz_srli_epi64(kAll, keyed, 32);
      const __m512i product = _mm512_maskz_mul_epu32(kAll, keyed, high);
      const __m512i swapped = _mm512_maskz_shuffle_epi32(kAllHalves, words, _MM_PERM_BADC);
      sums = _mm512_add_epi64(sums, _mm512_add_epi64(product, swapped));
    }
    const __m512i shifted = _mm512_maskz_srli_epi64(kAll, sums, 47);
    const __m512i keyed = _mm512_ternarylogic_epi64(sums, shifted, scramble_key, kXorOfThree);
    const __m512i high = _mm512_maskz_srli_epi64(kAll, keyed, 32);
    const __m512i upper = _mm512_maskz_mul_epu32(kAll, high, prime);
    sums = _mm512_add_epi64(_mm512_maskz_mul_epu32(kAll, keyed, prime),
                            _mm512_maskz_slli_epi64(kAll, upper, 32));
  }
  _mm512_storeu_si512(lanes.data(), sums);
}

#endif

uint64_t merge(const Lanes& lanes, uint64_t sum, size_t secret_offset) {
  const Lanes key = secret_lanes(secret_offset);
  for (size_t i = 0; i < lanes.size(); i += 2)
    sum += multiply_and_xor(lanes[i] ^ key[i], lanes[i + 1] ^ key[i + 1]);
  return avalanche(sum);
}

std::vector<DigestFold> find_folds() {
  std::vector<DigestFold> found{{"portable", fold_portable}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) found.push_back({"avx2", fold_avx2});
  if (__builtin_cpu_supports("avx512f")) found.push_back({"avx512", fold_avx512});
#endif
  return found;
}

}  // namespace

namespace detail {

const std::vector<DigestFold>& digest_folds() {
  static const std::vector<DigestFold> found = find_folds();
  return found;
}

const DigestFold& fastest_digest_fold() {
  static const DigestFold& chosen = digest_folds().back();
  return chosen;
}

}  // namespace detail

Digester::Digester(const DigestFold& fold) : fold_(&fold), lanes_(kFirstLanes) {}

// The last round is not scrambled, and the last 64 bytes of all, which may begin in the round
// before it, are folded once more. So the lanes take a round only when 64 bytes follow it: what the
// end needs is then always in `rest_`.
void Digester::update(std::span<const std::byte> bytes) {
  constexpr size_t kAhead = kRoundBytes + kStripeBytes;
  static_assert(sizeof rest_ == kAhead);
  const auto take_rest = [&](size_t count) {
    if (count == 0) return;  // of no bytes, a span may point nowhere
    std::memcpy(rest_.data() + rest_bytes_, bytes.data(), count);
    rest_bytes_ += count;
    bytes = bytes.subspan(count);
  };
  total_bytes_ += bytes.size();
  while (rest_bytes_ > 0 && rest_bytes_ + bytes.size() >= kAhead) {
    if (rest_bytes_ < kRoundBytes) take_rest(kRoundBytes - rest_bytes_);
    fold_rest();
  }
  if (bytes.size() >= kAhead) {
    const size_t rounds = (bytes.size() - kStripeBytes) / kRoundBytes;
    fold_->fold(lanes_, bytes.data(), rounds);
    bytes = bytes.subspan(rounds * kRoundBytes);
  }
  take_rest(bytes.size());
}

void Digester::fold_rest() {
  fold_->fold(lanes_, rest_.data(), 1);
  rest_bytes_ -= kRoundBytes;
  std::memcpy(rest_.data(), rest_.data() + kRoundBytes, rest_bytes_);
}

Digest Digester::finish() const {
  if (total_bytes_ <= kShortBytes) return digest_short(rest_.data(), rest_bytes_);
  Lanes lanes = lanes_;
  size_t done = 0;
  if (rest_bytes_ > kRoundBytes) {
    fold_->fold(lanes, rest_.data(), 1);
    done = kRoundBytes;
  }
  for (size_t i = 0; done + kStripeBytes < rest_bytes_; ++i, done += kStripeBytes)
    fold_stripe(lanes, rest_.data() + done, kKeys.of_stripe[i]);
  fold_stripe(lanes, rest_.data() + rest_bytes_ - kStripeBytes, secret_lanes(kSecretBytes - 71));
  return {merge(lanes, total_bytes_ * kPrime64_1, 11),
          merge(lanes, ~(total_bytes_ * kPrime64_2), kSecretBytes - 75)};
}

Digest digest(std::span<const std::byte> bytes) {
  Digester digester;
  digester.update(bytes);
  return digester.finish();
}

std::string to_hex(const Digest& digest) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string hex;
  for (const uint64_t word : {digest.high, digest.low})
    for (int bit = 60; bit >= 0; bit -= 4) hex += kDigits[(word >> bit) & 0xf];
  return hex;
}

}  // namespace pccheck
