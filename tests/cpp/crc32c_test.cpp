#include "cpp/crc32c.h"

#include <gtest/gtest.h>

#include <array>

#include "tests/cpp/bytes.h"

namespace pccheck::test {
namespace {

// One bit at a time, as the polynomial's definition has it.
uint32_t crc_by_definition(uint32_t crc, std::span<const std::byte> bytes) {
  crc = ~crc;
  for (const std::byte byte : bytes) {
    crc ^= std::to_integer<uint32_t>(byte);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0x82F63B78u : 0);
  }
  return ~crc;
}

TEST(Crc32c, GivesTheValuesOfTheStandard) {
  Bytes ascending(32), descending(32);
  for (size_t i = 0; i < 32; ++i) {
    ascending[i] = static_cast<std::byte>(i);
    descending[i] = static_cast<std::byte>(31 - i);
  }
  const std::vector<std::pair<Bytes, uint32_t>> vectors = {{Bytes(32, std::byte{0}), 0x8A9136AA},
                                                           {Bytes(32, std::byte{0xFF}), 0x62A8AB43},
                                                           {ascending, 0x46DD794E},
                                                           {descending, 0x113FDB5C},
                                                           {to_bytes("123456789"), 0xE3069283},
                                                           {{}, 0}};
  for (const auto& [bytes, sum] : vectors) {
    EXPECT_EQ(crc32c(0, bytes), sum);
    EXPECT_EQ(detail::crc32c_portable(0, bytes), sum);
  }
}

TEST(Crc32c, BothPathsFollowTheDefinition) {
  Random random(1);
  for (size_t bytes = 0; bytes < 700; ++bytes) {
    const Bytes text = random_bytes(random, bytes);
    const uint32_t expected = crc_by_definition(static_cast<uint32_t>(bytes), text);
    ASSERT_EQ(crc32c(static_cast<uint32_t>(bytes), text), expected) << bytes << " bytes";
    ASSERT_EQ(detail::crc32c_portable(static_cast<uint32_t>(bytes), text), expected) << bytes;
  }
}

TEST(Crc32c, BothPathsAgreeAtEveryLengthAndMisalignment) {
  Random random(2);
  const Bytes text = random_bytes(random, 10'100);
  const std::span<const std::byte> all(text);
  for (size_t bytes = 0; bytes <= 10'000; ++bytes) {
    const auto part = all.subspan(bytes % 17, bytes);
    ASSERT_EQ(crc32c(7, part), detail::crc32c_portable(7, part)) << bytes << " bytes";
  }
  for (size_t offset = 0; offset < 64; ++offset)
    for (const size_t bytes : {1u, 7u, 8u, 9u, 63u, 1023u, 3071u, 3072u, 3073u, 6144u, 9217u}) {
      const auto part = all.subspan(offset, bytes);
      ASSERT_EQ(crc32c(0, part), detail::crc32c_portable(0, part)) << bytes << " at " << offset;
    }
}

TEST(Crc32c, TheSumOfAConcatenationComesFromTheSumsOfItsParts) {
  Random random(3);
  const Bytes text = random_bytes(random, 20'000);
  const std::span<const std::byte> all(text);
  const uint32_t whole = crc32c(0, all);
  for (int round = 0; round < 200; ++round) {
    uint32_t crc = 0;
    for (size_t at = 0; at < all.size();) {
      const size_t part = std::min(all.size() - at, static_cast<size_t>(below(random, 9000)));
      crc = crc32c(crc, all.subspan(at, part));
      at += part;
    }
    ASSERT_EQ(crc, whole);
  }
}

TEST(Crc32c, CopyingMovesExactlyTheBytesAndSumsThem) {
  Random random(4);
  const Bytes from = random_bytes(random, 40'000);
  for (int round = 0; round < 400; ++round) {
    const size_t bytes = below(random, round < 200 ? 40 : 39'000);
    const size_t source = below(random, 64), target = 1 + below(random, 64);
    Bytes to(target + bytes + 64, std::byte{0xA5});
    const auto seed = static_cast<uint32_t>(random());
    const uint32_t crc = copy_with_crc32c(seed, to.data() + target, from.data() + source, bytes);
    const auto copied = std::span(from).subspan(source, bytes);
    ASSERT_EQ(crc, detail::crc32c_portable(seed, copied)) << bytes << " bytes";
    for (size_t i = 0; i < to.size(); ++i) {
      const bool inside = i >= target && i < target + bytes;
      ASSERT_EQ(to[i], inside ? copied[i - target] : std::byte{0xA5}) << i << " of " << bytes;
    }
  }
}

TEST(Crc32c, EverySingleBitFlipChangesTheSum) {
  Random random(5);
  Bytes text = random_bytes(random, 4096);
  const uint32_t sum = crc32c(0, text);
  for (size_t bit = 0; bit < 8 * text.size(); bit += 1 + bit % 3) {
    flip_bit(text, bit);
    ASSERT_NE(crc32c(0, text), sum) << "bit " << bit;
    flip_bit(text, bit);
  }
}

}  // namespace
}  // namespace pccheck::test
