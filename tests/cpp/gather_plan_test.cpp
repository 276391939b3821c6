// The gather's arithmetic, walked the way the kernel walks it: no address here is ever touched.
#include "cuda/gather_plan.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <vector>

namespace pccheck {
namespace {

constexpr uint64_t kOutput = uint64_t{1} << 40;

// Which source byte, or byte of a value, ended up at each place; fails where two did.
std::vector<uint64_t> written(const GatherBatch& batch) {
  constexpr uint64_t kNothing = ~uint64_t{0};
  std::vector<uint64_t> result(batch.bytes, kNothing);
  const auto put = [&](uint64_t to, uint64_t what) {
    ASSERT_GE(to, batch.to);
    ASSERT_LT(to - batch.to, result.size());
    ASSERT_EQ(result[to - batch.to], kNothing) << "written twice: " << to - batch.to;
    result[to - batch.to] = what;
  };
  for (uint32_t i = 0; i < batch.tiles; ++i) {
    const GatherTile tile = batch.tile(i);
    EXPECT_GT(tile.bytes, 0u);
    EXPECT_LE(tile.bytes, kGatherTileBytes);
    if (tile.is_value) {
      for (uint32_t k = 0; k < tile.bytes; ++k) put(tile.to + k, (tile.from >> (8 * k)) & 0xff);
      continue;
    }
    const WordSplit split = split_into_words(tile.from, tile.to, tile.bytes);
    EXPECT_LT(split.head_bytes, split.word_bytes);
    EXPECT_LT(split.tail_bytes, split.word_bytes);
    uint64_t at = 0;
    for (uint32_t k = 0; k < split.head_bytes; ++k, ++at) put(tile.to + at, tile.from + at);
    for (uint32_t word = 0; word < split.words; ++word) {
      EXPECT_EQ((tile.from + at) % split.word_bytes, 0u);
      EXPECT_EQ((tile.to + at) % split.word_bytes, 0u);
      for (uint32_t k = 0; k < split.word_bytes; ++k, ++at) put(tile.to + at, tile.from + at);
    }
    for (uint32_t k = 0; k < split.tail_bytes; ++k, ++at) put(tile.to + at, tile.from + at);
    EXPECT_EQ(at, tile.bytes);
  }
  return result;
}

TEST(GatherPlan, EveryByteIsWrittenOnceFromWhereItBelongs) {
  std::mt19937_64 random(7);
  for (int round = 0; round < 40; ++round) {
    GatherBatch batch;
    batch.start(kOutput + random() % 64);
    std::vector<uint64_t> expected;
    const uint64_t most = 1 + random() % 20'000;
    for (uint64_t ranges = random() % (GatherBatch::kMaxRanges + 1); ranges > 0; --ranges) {
      if (random() % 4 == 0) {
        const uint64_t value = random();
        const auto bytes = static_cast<uint32_t>(random() % 9);
        ASSERT_TRUE(batch.add_value(value, bytes));
        for (uint32_t k = 0; k < bytes; ++k) expected.push_back((value >> (8 * k)) & 0xff);
      } else {
        const uint64_t from = (uint64_t{1} << 30) + random() % 100'000;
        const uint64_t bytes = random() % 3 == 0 ? random() % 18 : random() % most;
        ASSERT_EQ(batch.add(from, bytes), bytes);
        for (uint64_t k = 0; k < bytes; ++k) expected.push_back(from + k);
      }
    }
    ASSERT_EQ(written(batch), expected) << "round " << round;
  }
}

TEST(GatherPlan, WordsAreAsWideAsBothAddressesAllow) {
  for (uint64_t from = 1024; from < 1056; ++from)
    for (uint64_t to = 4096; to < 4128; ++to)
      for (uint32_t bytes : {0u, 1u, 15u, 16u, 17u, 31u, 100u}) {
        const WordSplit split = split_into_words(from, to, bytes);
        EXPECT_EQ((to - from) % split.word_bytes, 0u);
        EXPECT_TRUE(split.word_bytes == 16 || (to - from) % (2 * split.word_bytes) != 0);
        EXPECT_EQ(split.head_bytes + split.words * split.word_bytes + split.tail_bytes, bytes);
        EXPECT_TRUE(split.words == 0 || (to + split.head_bytes) % split.word_bytes == 0);
      }
}

TEST(GatherPlan, AlignedTensorsMoveInWholeWordsOnly) {
  const WordSplit split = split_into_words(512, 4096, kGatherTileBytes);
  EXPECT_EQ(split.word_bytes, 16u);
  EXPECT_EQ(split.head_bytes, 0u);
  EXPECT_EQ(split.words, kGatherTileBytes / 16);
  EXPECT_EQ(split.tail_bytes, 0u);
}

TEST(GatherPlan, AFullBatchTakesNothingMore) {
  GatherBatch batch;
  batch.start(kOutput);
  for (uint32_t i = 0; i < GatherBatch::kMaxRanges; ++i) ASSERT_EQ(batch.add(4096, 3), 3u);
  EXPECT_EQ(batch.add(4096, 3), 0u);
  EXPECT_FALSE(batch.add_value(1, 1));
  EXPECT_EQ(batch.bytes, GatherBatch::kMaxRanges * 3);
}

TEST(GatherPlan, EmptyRangesTakeNoRoom) {
  GatherBatch batch;
  batch.start(kOutput);
  EXPECT_EQ(batch.add(4096, 0), 0u);
  EXPECT_TRUE(batch.add_value(1, 0));
  EXPECT_EQ(batch.ranges, 0u);
  EXPECT_EQ(batch.tiles, 0u);
}

TEST(GatherPlan, ARangeLongerThanABatchIsTakenInParts) {
  GatherBatch batch;
  batch.start(kOutput);
  ASSERT_EQ(batch.add(4096, 5), 5u);
  EXPECT_EQ(batch.add(8192, uint64_t{5} << 30), GatherBatch::kMaxBytes - 5);
  EXPECT_EQ(batch.add(8192, 1), 0u);
  EXPECT_FALSE(batch.add_value(1, 1));
  const GatherTile last = batch.tile(batch.tiles - 1);
  EXPECT_EQ(last.to + last.bytes, kOutput + GatherBatch::kMaxBytes);
  EXPECT_EQ(last.from + last.bytes, 8192 + GatherBatch::kMaxBytes - 5);
}

}  // namespace
}  // namespace pccheck
