#include "cpp/layout.h"

#include <gtest/gtest.h>

#include <limits>
#include <map>
#include <set>

#include "cpp/safetensors.h"
#include "tests/cpp/state.h"

namespace pccheck::test {
namespace {

// How often each byte of each file is filled, by its header and by its runs.
std::vector<std::vector<uint8_t>> coverage(const Layout& layout) {
  std::vector<std::vector<uint8_t>> counts;
  for (const PayloadFile& file : layout.files()) {
    counts.emplace_back(file.size_bytes);
    for (size_t i = 0; i < file.data_begin(); ++i) ++counts.back()[i];
  }
  for (const LayerPlan& layer : layout.layers())
    for (const Run& run : layer.runs)
      for (uint64_t i = 0; i < run.bytes; ++i) ++counts[run.file].at(run.begin + i);
  return counts;
}

// The most blocks that are partly filled at the same time when the runs are staged in order.
size_t most_open(const Layout& layout) {
  std::map<std::pair<uint32_t, uint64_t>, uint64_t> open;  // block -> bytes still to come
  size_t most = 0;
  for (const LayerPlan& layer : layout.layers())
    for (const Run& run : layer.runs)
      for (uint64_t done = 0; done < run.bytes;) {
        const PayloadFile& file = layout.files()[run.file];
        const uint64_t at = run.begin + done;
        const uint64_t index = (at - file.grid_begin) / layout.block_bytes();
        const uint64_t begin = layout.block_offset(run.file, index);
        const uint64_t header = file.data_begin() > begin ? file.data_begin() - begin : 0;
        uint64_t& left =
            open.try_emplace({run.file, index}, layout.block_size(run.file, index) - header)
                .first->second;
        most = std::max(most, open.size());
        const uint64_t part =
            std::min(run.bytes - done, begin + layout.block_size(run.file, index) - at);
        left -= part;
        done += part;
        if (left == 0) open.erase({run.file, index});
      }
  EXPECT_TRUE(open.empty()) << "blocks never filled";
  return most;
}

std::string refusal(std::vector<FileSpec> files, LayoutOptions options) {
  try {
    Layout::make(std::move(files), options);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

constexpr LayoutOptions kOneLayer{.block_bytes = kBlockBytes, .layer_count = 1};

TEST(Layout, TensorsStandByWidthThenLayerThenAsGiven) {
  const auto layout = Layout::make({{"f",
                                     {},
                                     {{"u8 of 0", "U8", {3}, 0},
                                      {"f32 of 1", "F32", {3}, 1},
                                      {"f16 of 0", "F16", {3}, 0},
                                      {"f32 of 0", "F32", {3}, 0},
                                      {"i32 of 0", "I32", {3}, 0},
                                      {"f64 of 2", "F64", {3}, 2},
                                      {"bool of 0", "BOOL", {3}, 0}}}},
                                   {.block_bytes = kBlockBytes, .layer_count = 3});
  std::map<uint64_t, std::string> by_place;
  for (const TensorExtent& tensor : layout->files()[0].tensors)
    by_place[tensor.begin] = tensor.spec.name;
  std::vector<std::string> order;
  for (const auto& [begin, name] : by_place) order.push_back(name);
  EXPECT_EQ(order, (std::vector<std::string>{"f64 of 2", "f32 of 0", "i32 of 0", "f32 of 1",
                                             "f16 of 0", "u8 of 0", "bool of 0"}));
}

TEST(Layout, TensorsKeepTheOrderInWhichTheyWereGivenWithinTheirLayer) {
  const auto layout = Layout::make({{"f", {}, {{"small", "U8", {1}, 0}, {"wide", "F64", {1}, 0}}},
                                    {"g", {}, {{"other", "F32", {1}, 0}}}},
                                   kOneLayer);
  const LayerPlan& layer = layout->layers()[0];
  ASSERT_EQ(layer.tensors.size(), 3u);
  EXPECT_EQ(layout->tensor(layer.tensors[0]).spec.name, "small");
  EXPECT_EQ(layout->tensor(layer.tensors[1]).spec.name, "wide");
  EXPECT_EQ(layout->tensor(layer.tensors[2]).spec.name, "other");
  EXPECT_EQ(layer.source_bytes, (std::vector<uint64_t>{1, 8, 4}));
}

TEST(Layout, EveryByteOfEveryFileIsFilledOnceAndLiesInOneBlock) {
  Random random(1);
  for (int round = 0; round < 200; ++round) {
    const auto chunks = static_cast<uint32_t>(below(random, 3) == 0 ? 1 + below(random, 9) : 1);
    const auto layers = static_cast<uint32_t>(chunks > 1 ? 1 : 1 + below(random, 6));
    const auto layout =
        Layout::make(random_files(random, layers, 700),
                     {.block_bytes = kBlockBytes, .layer_count = layers, .chunk_count = chunks});
    const auto counts = coverage(*layout);
    uint64_t total = 0;
    for (size_t f = 0; f < counts.size(); ++f) {
      const PayloadFile& file = layout->files()[f];
      for (size_t i = 0; i < counts[f].size(); ++i)
        ASSERT_EQ(counts[f][i], 1) << "byte " << i << " of " << file.name << ", round " << round;
      uint64_t end = 0;
      for (uint64_t b = 0; b < layout->block_count(f); ++b) {
        ASSERT_EQ(layout->block_offset(f, b), end);
        const bool last = b + 1 == layout->block_count(f);
        ASSERT_TRUE(last || layout->block_size(f, b) == kBlockBytes);
        ASSERT_GT(layout->block_size(f, b), 0u);
        end += layout->block_size(f, b);
      }
      ASSERT_EQ(end, file.size_bytes);
      total += end;
      for (const TensorExtent& tensor : file.tensors)
        ASSERT_EQ((tensor.begin - file.data_begin()) % dtype_bytes(tensor.spec.dtype), 0u);
    }
    EXPECT_EQ(layout->total_bytes(), total);
  }
}

TEST(Layout, RunsTakeEachTensorWholeFromItsOwnPlace) {
  Random random(2);
  for (int round = 0; round < 100; ++round) {
    const auto chunks = static_cast<uint32_t>(1 + below(random, 5));
    const auto layout =
        Layout::make(random_files(random, 1, 2000),
                     {.block_bytes = kBlockBytes, .layer_count = 1, .chunk_count = chunks});
    const LayerPlan& layer = layout->layers()[0];
    std::vector<uint64_t> taken(layer.tensors.size());
    for (const auto& run : layer.runs) {
      const TensorExtent& tensor = layout->tensor(layer.tensors[run.source]);
      ASSERT_EQ(run.file, layer.tensors[run.source].file);
      ASSERT_EQ(run.begin, tensor.begin + run.source_offset);
      ASSERT_LE(run.source_offset + run.bytes, tensor.bytes);
      taken[run.source] += run.bytes;
    }
    EXPECT_EQ(taken, layer.source_bytes);
  }
}

TEST(Layout, NoMoreBlocksAreEverOpenThanItSays) {
  Random random(3);
  size_t reached = 0;
  for (int round = 0; round < 400; ++round) {
    const auto chunks = static_cast<uint32_t>(below(random, 3) == 0 ? 1 + below(random, 9) : 1);
    const auto layers = static_cast<uint32_t>(chunks > 1 ? 1 : 1 + below(random, 12));
    const auto layout =
        Layout::make(random_files(random, layers, 1 + below(random, 1200)),
                     {.block_bytes = kBlockBytes, .layer_count = layers, .chunk_count = chunks});
    const size_t most = most_open(*layout);
    ASSERT_LE(most, layout->open_blocks()) << "round " << round;
    reached += most == layout->open_blocks() ? 1 : 0;
  }
  EXPECT_GT(reached, 20u) << "the bound is never tight: the test shows nothing";
}

TEST(Layout, OneWidthInOneFileLeavesOneBlockOpen) {
  EXPECT_EQ(simple_state({10, 5000, 1, 0, 7}).layout->open_blocks(), 1u);
  EXPECT_EQ(simple_state({0, 0}).layout->open_blocks(), 0u);
}

TEST(Layout, ALayersRunsFollowTheFile) {
  Random random(4);
  for (int round = 0; round < 50; ++round) {
    const auto layout =
        Layout::make(random_files(random, 4, 900), {.block_bytes = kBlockBytes, .layer_count = 4});
    for (const LayerPlan& layer : layout->layers())
      for (size_t i = 1; i < layer.runs.size(); ++i) {
        const auto &a = layer.runs[i - 1], &b = layer.runs[i];
        ASSERT_TRUE(a.file < b.file || (a.file == b.file && a.begin + a.bytes <= b.begin));
      }
  }
}

TEST(Layout, ChunksChangeTheOrderOfStagingAndNothingElse) {
  Random random(5);
  bool order_changed = false;
  for (int round = 0; round < 40; ++round) {
    const std::vector<FileSpec> files = random_files(random, 1, 3000);
    const auto whole = Layout::make(files, kOneLayer);
    for (const uint32_t chunks : {2u, 3u, 7u, 1000u}) {
      const auto layout = Layout::make(
          files, {.block_bytes = kBlockBytes, .layer_count = 1, .chunk_count = chunks});
      for (size_t f = 0; f < files.size(); ++f) {
        ASSERT_EQ(layout->files()[f].header, whole->files()[f].header);
        ASSERT_EQ(layout->files()[f].size_bytes, whole->files()[f].size_bytes);
        for (size_t t = 0; t < files[f].tensors.size(); ++t)
          ASSERT_EQ(layout->files()[f].tensors[t].begin, whole->files()[f].tensors[t].begin);
      }
      const auto& runs = layout->layers()[0].runs;
      for (size_t i = 1; i < runs.size(); ++i)
        order_changed |= runs[i].file == runs[i - 1].file && runs[i].begin < runs[i - 1].begin;
    }
  }
  EXPECT_TRUE(order_changed);
}

TEST(Layout, ChunksAreVisitedInTurn) {
  // 8 blocks in 4 chunks of 2: first blocks 0 2 4 6, then 1 3 5 7.
  const auto layout =
      Layout::make({{"f", {}, {{"w", "U8", {8 * kBlockBytes}, 0}}}}, {.block_bytes = kBlockBytes,
                                                                      .layer_count = 1,
                                                                      .chunk_count = 4,
                                                                      .checksums_in_header = true});
  std::vector<uint64_t> blocks;
  for (const auto& run : layout->layers()[0].runs)
    blocks.push_back((run.begin - layout->files()[0].grid_begin) / kBlockBytes);
  EXPECT_EQ(blocks, (std::vector<uint64_t>{0, 2, 4, 6, 1, 3, 5, 7}));
}

TEST(Layout, AHeaderWithChecksumsStaysOutOfTheBlocks) {
  const auto layout =
      Layout::make({{"f", {}, {{"w", "F32", {3000}, 0}}}},
                   {.block_bytes = kBlockBytes, .layer_count = 1, .checksums_in_header = true});
  const PayloadFile& file = layout->files()[0];
  EXPECT_EQ(file.grid_begin, file.data_begin());
  EXPECT_EQ(layout->block_offset(0, 0), file.data_begin());
  EXPECT_EQ(layout->block_count(0), 3u);
  EXPECT_EQ(layout->block_size(0, 2), 12'000 - 2 * kBlockBytes);
}

TEST(Layout, WhatCannotBeLaidOutIsNamed) {
  const auto one = [](TensorSpec tensor) { return std::vector<FileSpec>{{"f", {}, {tensor}}}; };
  const auto contains = [](const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos ? testing::AssertionSuccess()
                                                : testing::AssertionFailure() << "'" << text << "'";
  };
  EXPECT_TRUE(contains(refusal(one({"w", "F31", {1}, 0}), kOneLayer), "'w' has dtype 'F31'"));
  EXPECT_TRUE(contains(refusal(one({"w", "F32", {1}, 1}), kOneLayer), "'w' is of layer 1 of 1"));
  EXPECT_TRUE(contains(refusal({{"f", {}, {{"w", "F32", {1}, 0}, {"w", "U8", {1}, 0}}}}, kOneLayer),
                       "called 'w'"));
  const uint64_t most = std::numeric_limits<uint64_t>::max();
  EXPECT_TRUE(contains(refusal(one({"w", "F32", {most, most}, 0}), kOneLayer), "'w' is larger"));
  EXPECT_TRUE(contains(refusal(one({"w", "U8", {uint64_t{1} << 63}, 0}), kOneLayer), "larger"));
  const TensorSpec third{"a", "U8", {(uint64_t{1} << 61) + 1}, 0};
  EXPECT_TRUE(contains(refusal({{"f", {}, {third, {"b", "U8", third.shape, 0}}}}, kOneLayer),
                       "f would be larger"));
  for (const size_t block : {size_t{0}, size_t{100}, kBlockBytes + 1, size_t{2} << 30})
    EXPECT_TRUE(contains(refusal(one({"w", "F32", {1}, 0}), {block, 1}), "block size"));
  EXPECT_TRUE(contains(refusal({}, {kBlockBytes, 1, 0}), "chunk count"));
  EXPECT_TRUE(contains(refusal({}, {kBlockBytes, 2, 2}), "chunks divide"));
}

TEST(Layout, FilesWithoutAnyLayerAreRefused) {
  // Their headers would belong to no layer and never be written.
  EXPECT_NE(refusal({{"f", {}, {}}}, {.block_bytes = kBlockBytes, .layer_count = 0}), "");
  EXPECT_EQ(refusal({}, {.block_bytes = kBlockBytes, .layer_count = 0}), "");
}

TEST(Layout, KnowsTheWidthOfWhatSafetensorsCanHold) {
  const std::vector<std::pair<const char*, size_t>> widths = {
      {"F64", 8},     {"I64", 8},  {"U64", 8}, {"C64", 8}, {"F32", 4},     {"I32", 4}, {"U32", 4},
      {"F16", 2},     {"BF16", 2}, {"I16", 2}, {"U16", 2}, {"F8_E4M3", 1}, {"I8", 1},  {"U8", 1},
      {"F8_E5M2", 1}, {"BOOL", 1}, {"f32", 0}, {"", 0},    {"F128", 0}};
  for (const auto& [name, bytes] : widths) EXPECT_EQ(dtype_bytes(name), bytes) << name;
}

}  // namespace
}  // namespace pccheck::test
