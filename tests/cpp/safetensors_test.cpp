// Headers as they are written, and read back. Hostile ones: safetensors_hostile_test.cpp.
#include "cpp/safetensors.h"

#include <gtest/gtest.h>

#include <numeric>

#include "cpp/crc32c.h"
#include "cpp/little_endian.h"
#include "tests/cpp/state.h"

namespace pccheck::test {
namespace {

using safetensors::Header;
using safetensors::Malformed;

safetensors::Entry entry_of(const Header& header, const std::string& name) {
  const auto found = header.tensors.find(name);
  EXPECT_NE(found, header.tensors.end()) << name;
  return found == header.tensors.end() ? safetensors::Entry{} : found->second;
}

Header parsed(const PayloadFile& file) {
  return safetensors::parse_header(std::as_bytes(std::span(file.header)), file.size_bytes);
}

PayloadFile planned(FileSpec spec, bool checksums = false, size_t block_bytes = kBlockBytes) {
  spec.name = "model.safetensors";
  return Layout::make(
             {spec},
             {.block_bytes = block_bytes, .layer_count = 1, .checksums_in_header = checksums})
      ->files()[0];
}

std::string refusal_of_sums(const Bytes& header, uint64_t file_bytes) {
  try {
    const Header parsed = safetensors::parse_header(header, file_bytes);
    safetensors::read_checksums(header, parsed, file_bytes);
  } catch (const Malformed& error) {
    return error.what();
  }
  return "";
}

TEST(Safetensors, WhatIsWrittenIsReadBack) {
  Random random(1);
  for (int round = 0; round < 300; ++round) {
    const auto layout =
        Layout::make(random_files(random, 3, 500), {.block_bytes = kBlockBytes, .layer_count = 3});
    for (const PayloadFile& file : layout->files()) {
      const Header header = parsed(file);
      EXPECT_EQ(header.data_begin, file.data_begin());
      ASSERT_EQ(header.tensors.size(), file.tensors.size());
      for (const TensorExtent& tensor : file.tensors) {
        const safetensors::Entry entry = entry_of(header, tensor.spec.name);
        EXPECT_EQ(entry.dtype, tensor.spec.dtype);
        EXPECT_EQ(entry.shape, tensor.spec.shape);
        EXPECT_EQ(entry.begin, tensor.begin);
        EXPECT_EQ(entry.bytes, tensor.bytes);
      }
    }
  }
}

TEST(Safetensors, AHeaderIsLengthJsonAndSpaces) {
  const PayloadFile file = planned({"", {{"format", "pt"}}, {{"w", "F32", {2, 3}, 0}}});
  const std::string json = R"({"__metadata__":{"format":"pt"},)"
                           R"("w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}})";
  EXPECT_EQ(get_uint(std::as_bytes(std::span(file.header)).first(8)), file.header.size() - 8);
  EXPECT_EQ(file.header.substr(8, json.size()), json);
  EXPECT_EQ(file.header.find_first_not_of(' ', 8 + json.size()), std::string::npos);
}

TEST(Safetensors, TheFileEndsOnAPageWhereTheDataKeepTheirAlignmentElseTheDataBeginOnOne) {
  for (uint64_t elements = 0; elements < 9000; elements += 1 + elements % 7) {
    const PayloadFile file = planned({"", {}, {{"w", "U8", {elements}, 0}}});
    if (elements % 8 == 0) {
      EXPECT_EQ(file.size_bytes % kDirectAlignment, 0u) << elements;
    } else {
      EXPECT_EQ(file.data_begin() % kDirectAlignment, 0u) << elements;
    }
    EXPECT_EQ(file.data_begin() % 8, 0u) << elements;
    EXPECT_EQ(parsed(file).data_begin, file.data_begin()) << elements;
    // Padding never costs more than a page.
    EXPECT_LT(file.header.size() - file.header.find_last_not_of(' '), kDirectAlignment + 1);
  }
}

TEST(Safetensors, HeadersOfEveryLengthArePadded) {
  for (size_t length = 0; length < 4200; length += 1 + length % 5) {
    const PayloadFile file =
        planned({"", {{"k", std::string(length, 'v')}}, {{"w", "F64", {3}, 0}}});
    ASSERT_EQ(file.size_bytes % kDirectAlignment, 0u) << length;
    ASSERT_EQ(parsed(file).metadata.at("k").size(), length);
  }
}

TEST(Safetensors, NamesWithQuotesControlCharactersAndUtf8ComeBackUnchanged) {
  std::string every_ascii;
  for (char c = 0; c < 127; ++c) every_ascii += c;
  const std::vector<std::string> names = {
      every_ascii, "quote\"s", "back\\slash", "new\nline",    "\x01\x1f\x7f",
      "größe",     "層.重み",  "\U0001F600",  "\\u0041",      " leading",
      "",          "a/b/../c", "\"},{\"x\"",  "__metadata__ "};
  FileSpec spec;
  for (const std::string& name : names) {
    spec.metadata.emplace_back(name + "?", name);
    spec.tensors.push_back({name, "I16", {1}, 0});
  }
  const Header header = parsed(planned(spec));
  EXPECT_EQ(header.tensors.size(), names.size());
  for (const std::string& name : names) {
    EXPECT_TRUE(header.tensors.contains(name)) << name;
    EXPECT_EQ(header.metadata.at(name + "?"), name);
  }
}

TEST(Safetensors, EmptyTensorsAndThoseWithoutDimensionsHaveTheirPlace) {
  const PayloadFile file = planned({"",
                                    {},
                                    {{"scalar", "F64", {}, 0},
                                     {"none", "F32", {0}, 0},
                                     {"huge but empty", "F32", {uint64_t{1} << 62, 0, 99}, 0},
                                     {"one", "F16", {1, 1, 1}, 0}}});
  const Header header = parsed(file);
  EXPECT_EQ(entry_of(header, "scalar").bytes, 8u);
  EXPECT_TRUE(entry_of(header, "scalar").shape.empty());
  EXPECT_EQ(entry_of(header, "none").bytes, 0u);
  EXPECT_EQ(entry_of(header, "huge but empty").bytes, 0u);
  EXPECT_EQ(entry_of(header, "huge but empty").shape,
            (std::vector<uint64_t>{uint64_t{1} << 62, 0, 99}));
  EXPECT_EQ(entry_of(header, "one").bytes, 2u);
  EXPECT_EQ(parsed(planned({})).tensors.size(), 0u);
}

TEST(Safetensors, AHeaderLargerThanTheFormatAllowsIsRefused) {
  FileSpec spec{"", {{"k", std::string(safetensors::kMaxHeaderBytes, 'v')}}, {}};
  EXPECT_THROW(planned(spec), std::invalid_argument);
}

TEST(Safetensors, ChecksumsInTheHeaderComeBack) {
  Random random(2);
  for (const uint64_t elements : {0u, 1u, 4095u, 4096u, 4097u, 50'000u}) {
    const PayloadFile file = planned(
        {"", {{"pccheck.note", "\"pccheck.crc32c\":\"00"}}, {{"w", "U8", {elements}, 0}}}, true);
    EXPECT_EQ(file.data_begin() % kDirectAlignment, 0u);
    EXPECT_EQ(file.grid_begin, file.data_begin());
    std::vector<uint32_t> sums((elements + kBlockBytes - 1) / kBlockBytes);
    for (uint32_t& sum : sums) sum = static_cast<uint32_t>(random());
    std::string header = file.header;
    safetensors::put_checksums(header, sums);
    ASSERT_EQ(header.size(), file.header.size());
    const auto bytes = std::as_bytes(std::span(header));
    const Header read = safetensors::parse_header(bytes, file.size_bytes);
    const safetensors::Checksums found = safetensors::read_checksums(bytes, read, file.size_bytes);
    EXPECT_EQ(found.block_bytes, kBlockBytes);
    EXPECT_EQ(found.block_sums, sums);
    EXPECT_EQ(read.metadata.at("pccheck.note"), "\"pccheck.crc32c\":\"00");
  }
}

TEST(Safetensors, EverySingleBitFlipInAHeaderWithChecksumsIsRefused) {
  const PayloadFile file = planned({"", {{"format", "pt"}}, {{"w", "U8", {9000}, 0}}}, true);
  std::string text = file.header;
  safetensors::put_checksums(text, std::vector<uint32_t>{0x01234567, 0x89abcdef, 0xffffffff});
  Bytes header = to_bytes(text);
  ASSERT_EQ(refusal_of_sums(header, file.size_bytes), "");
  for (size_t bit = 0; bit < 8 * header.size(); ++bit) {
    flip_bit(header, bit);
    ASSERT_NE(refusal_of_sums(header, file.size_bytes), "") << "bit " << bit;
    flip_bit(header, bit);
  }
}

TEST(Safetensors, ChecksumsThatCannotBeAreRefused) {
  // {what takes the place of the three values, what the refusal speaks of}
  struct Case {
    std::string block_bytes, block_sums, header_sum, speaks_of;
  };
  const std::string two_sums = "0000000100000002";
  const std::vector<Case> cases = {
      {"0", two_sums, "00000000", "block size"},
      {"", two_sums, "00000000", "block size"},
      {"-1", two_sums, "00000000", "block size"},
      {"4096x", two_sums, "00000000", "block size"},
      {"1073741825", two_sums, "00000000", "block size"},
      {"99999999999999999999", two_sums, "00000000", "block size"},
      {"4096", "00000001", "00000000", "number of checksums"},
      {"4096", two_sums + "00000003", "00000000", "number of checksums"},
      {"4096", "0000000100000002 ", "00000000", "number of checksums"},
      {"4096", "000000010000000G", "00000000", "hexadecimal"},
      {"4096", two_sums, "0000000", "own checksum"},
      {"4096", two_sums, "0000000x", "hexadecimal"},
      {"4096", two_sums, "00000000", "does not match"},
  };
  for (const Case& given : cases) {
    FileSpec spec{"",
                  {{safetensors::kHeaderSumKey, given.header_sum},
                   {safetensors::kBlockSumsKey, given.block_sums},
                   {safetensors::kBlockBytesKey, given.block_bytes}},
                  {{"w", "U8", {5000}, 0}}};
    const PayloadFile file = planned(spec);
    EXPECT_NE(refusal_of_sums(to_bytes(file.header), file.size_bytes).find(given.speaks_of),
              std::string::npos)
        << given.speaks_of << ": " << refusal_of_sums(to_bytes(file.header), file.size_bytes);
  }
  const PayloadFile bare = planned({"", {}, {{"w", "U8", {5000}, 0}}});
  EXPECT_NE(refusal_of_sums(to_bytes(bare.header), bare.size_bytes).find("no checksums"),
            std::string::npos);
}

}  // namespace
}  // namespace pccheck::test
