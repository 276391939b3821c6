#include "cpp/crc32c.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <thread>

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
    for (const auto& one : detail::crc32c_implementations())
      EXPECT_EQ(one.sum(0, bytes), sum) << one.name;
  }
}

TEST(Crc32c, EveryImplementationFollowsTheDefinition) {
  Random random(1);
  for (size_t bytes = 0; bytes < 1100; ++bytes) {
    const Bytes text = random_bytes(random, bytes);
    const uint32_t expected = crc_by_definition(static_cast<uint32_t>(bytes), text);
    for (const auto& one : detail::crc32c_implementations())
      ASSERT_EQ(one.sum(static_cast<uint32_t>(bytes), text), expected) << one.name << ", " << bytes;
  }
}

TEST(Crc32c, AllImplementationsAgreeAtEveryLengthAndMisalignment) {
  Random random(2);
  const Bytes text = random_bytes(random, 10'100);
  const std::span<const std::byte> all(text);
  for (const auto& one : detail::crc32c_implementations()) {
    for (size_t bytes = 0; bytes <= 10'000; ++bytes) {
      const auto part = all.subspan(bytes % 17, bytes);
      ASSERT_EQ(one.sum(7, part), detail::crc32c_portable(7, part)) << one.name << ", " << bytes;
    }
    for (size_t offset = 0; offset < 64; ++offset)
      for (const size_t bytes :
           {1u, 8u, 63u, 511u, 513u, 767u, 1023u, 3071u, 3073u, 6144u, 9217u}) {
        const auto part = all.subspan(offset, bytes);
        ASSERT_EQ(one.sum(0, part), detail::crc32c_portable(0, part))
            << one.name << ", " << bytes << " at " << offset;
      }
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
  for (const auto& one : detail::crc32c_implementations()) {
    Random random(4);
    const Bytes from = random_bytes(random, 40'000);
    for (int round = 0; round < 400; ++round) {
      const size_t bytes = below(random, round < 200 ? 1200 : 39'000);
      const size_t source = below(random, 64), target = 1 + below(random, 64);
      Bytes to(target + bytes + 64, std::byte{0xA5});
      const auto seed = static_cast<uint32_t>(random());
      const Stores stores = round % 2 ? Stores::cached : Stores::streamed;
      const uint32_t crc = one.copy(seed, to.data() + target, from.data() + source, bytes, stores);
      const auto copied = std::span(from).subspan(source, bytes);
      ASSERT_EQ(crc, detail::crc32c_portable(seed, copied)) << one.name << ", " << bytes;
      for (size_t i = 0; i < to.size(); ++i) {
        const bool inside = i >= target && i < target + bytes;
        ASSERT_EQ(to[i], inside ? copied[i - target] : std::byte{0xA5})
            << one.name << ", " << i << " of " << bytes;
      }
    }
  }
}

#if !defined(__SANITIZE_THREAD__)  // the race is the subject
// A layer that is updated while it is copied is a torn one, which the tripwire tells of; a sum that
// does not fit what was written would be a checkpoint that nobody can load.
TEST(Crc32c, ASourceThatChangesMeanwhileCannotMakeCopyAndSumDiffer) {
  for (const auto& one : detail::crc32c_implementations()) {
    std::vector<std::atomic<uint64_t>> from(4096);
    Bytes to(from.size() * sizeof from[0]);
    std::jthread scribbler([&](const std::stop_token& stop) {
      for (uint64_t n = 1; !stop.stop_requested(); ++n)
        for (auto& word : from) word.store(n, std::memory_order_relaxed);
    });
    for (int round = 0; round < 300; ++round) {
      const uint32_t crc = one.copy(0, to.data(), reinterpret_cast<const std::byte*>(from.data()),
                                    to.size(), round % 2 ? Stores::cached : Stores::streamed);
      ASSERT_EQ(crc, detail::crc32c_portable(0, to)) << one.name;
    }
  }
}
#endif

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
