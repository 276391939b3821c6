#include "cpp/format.h"

#include <gtest/gtest.h>

#include "cpp/crc32c.h"
#include "cpp/little_endian.h"
#include "tests/cpp/bytes.h"

namespace pccheck::test {
namespace {

// Where the fields stand, as format.md has them.
constexpr size_t kVersionAt = 8;
constexpr size_t kBlockBytesAt = 12;
constexpr size_t kManifestBytesAt = 56;
constexpr size_t kFileCountAt = 68;
constexpr size_t kFirstFileAt = 72;

Checksums sample() {
  Checksums sums{};
  sums.identity.step = 0x0102030405060708;
  sums.identity.run.fill(std::byte{0x11});
  sums.identity.save.fill(std::byte{0x22});
  sums.block_bytes = 4096;
  sums.manifest_bytes = 99;
  sums.manifest_crc = 0xdeadbeef;
  sums.files = {{"model.safetensors", 10'000, {1, 2, 3}},
                {"empty.safetensors", 0, {}},
                {"full.safetensors", 8192, {0xffffffff, 4}}};
  return sums;
}

void put(Bytes& bytes, size_t at, uint64_t value, size_t width) {
  for (size_t i = 0; i < width; ++i) bytes[at + i] = static_cast<std::byte>(value >> (8 * i));
}

// Gives changed bytes the seal they need for the rules behind the seal to be reached.
Bytes resealed(Bytes bytes) {
  put(bytes, bytes.size() - 4, crc32c(0, std::span(bytes).first(bytes.size() - 4)), 4);
  return bytes;
}

std::string refusal(const Bytes& bytes) {
  try {
    decode_checksums(bytes);
  } catch (const CorruptCheckpoint& error) {
    return error.what();
  }
  return "";
}

TEST(Format, WhatIsEncodedIsDecoded) {
  const Checksums in = sample();
  const Checksums out = decode_checksums(encode(in));
  EXPECT_EQ(out.identity.step, in.identity.step);
  EXPECT_EQ(out.identity.run, in.identity.run);
  EXPECT_EQ(out.identity.save, in.identity.save);
  EXPECT_EQ(out.block_bytes, in.block_bytes);
  EXPECT_EQ(out.manifest_bytes, in.manifest_bytes);
  EXPECT_EQ(out.manifest_crc, in.manifest_crc);
  ASSERT_EQ(out.files.size(), in.files.size());
  for (size_t i = 0; i < in.files.size(); ++i) {
    EXPECT_EQ(out.files[i].name, in.files[i].name);
    EXPECT_EQ(out.files[i].size_bytes, in.files[i].size_bytes);
    EXPECT_EQ(out.files[i].blocks, in.files[i].blocks);
  }
}

TEST(Format, FieldsStandWhereTheSpecificationHasThem) {
  const Bytes bytes = encode(sample());
  const std::span<const std::byte> all(bytes);
  EXPECT_EQ(to_text(all.first(8)), "PCCKSUMS");
  EXPECT_EQ(get_uint(all.subspan(kVersionAt, 4)), 1u);
  EXPECT_EQ(get_uint(all.subspan(kBlockBytesAt, 4)), 4096u);
  EXPECT_EQ(get_uint(all.subspan(16, 8)), 0x0102030405060708u);
  EXPECT_EQ(all[24], std::byte{0x11});
  EXPECT_EQ(all[40], std::byte{0x22});
  EXPECT_EQ(get_uint(all.subspan(kManifestBytesAt, 8)), 99u);
  EXPECT_EQ(get_uint(all.subspan(64, 4)), 0xdeadbeefu);
  EXPECT_EQ(get_uint(all.subspan(kFileCountAt, 4)), 3u);
  EXPECT_EQ(get_uint(all.subspan(kFirstFileAt, 2)), 17u);
  EXPECT_EQ(to_text(all.subspan(kFirstFileAt + 2, 17)), "model.safetensors");
  EXPECT_EQ(get_uint(all.subspan(kFirstFileAt + 19, 8)), 10'000u);
  EXPECT_EQ(get_uint(all.subspan(kFirstFileAt + 27, 4)), 1u);
  EXPECT_EQ(get_uint(all.last(4)), crc32c(0, all.first(all.size() - 4)));
}

TEST(Format, EverySingleBitFlipIsRefused) {
  Bytes bytes = encode(sample());
  for (size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
    flip_bit(bytes, bit);
    ASSERT_NE(refusal(bytes), "") << "bit " << bit;
    flip_bit(bytes, bit);
  }
  EXPECT_EQ(refusal(bytes), "");
}

TEST(Format, EveryTruncationIsRefusedEvenWithARightSeal) {
  const Bytes bytes = encode(sample());
  for (size_t size = 0; size < bytes.size(); ++size) {
    Bytes cut(bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(size));
    ASSERT_NE(refusal(cut), "") << size << " bytes";
    if (size >= 4) {
      ASSERT_NE(refusal(resealed(cut)), "") << size << " bytes, sealed";
    }
  }
}

TEST(Format, BytesAfterTheEndAreRefused) {
  Bytes bytes = encode(sample());
  bytes.push_back(std::byte{0});
  EXPECT_NE(refusal(bytes), "");
  EXPECT_NE(refusal(resealed(bytes)).find("after its end"), std::string::npos);
}

TEST(Format, AFutureVersionIsRefusedWithItsNumber) {
  Bytes bytes = encode(sample());
  put(bytes, kVersionAt, 3, 4);
  EXPECT_NE(refusal(resealed(bytes)).find("version 3"), std::string::npos);
}

TEST(Format, ImpossibleBlockSizesAreRefused) {
  for (const uint64_t size : {uint64_t{0}, uint64_t{1}, uint64_t{4095}, uint64_t{4097},
                              (uint64_t{1} << 30) + 4096, uint64_t{0xfffff000}}) {
    Bytes bytes = encode(sample());
    put(bytes, kBlockBytesAt, size, 4);
    EXPECT_NE(refusal(resealed(bytes)).find("block size"), std::string::npos) << size;
  }
}

TEST(Format, CountsAreHeldAgainstTheBytesThereAreBeforeAnythingIsAllocated) {
  const auto refused = [](size_t at, uint64_t value, size_t width) {
    Bytes bytes = encode(sample());
    put(bytes, at, value, width);
    return refusal(resealed(bytes)) != "";
  };
  for (const uint64_t size :
       {~uint64_t{0}, ~uint64_t{0} - 4095, uint64_t{1} << 63, uint64_t{1} << 40, uint64_t{65'536}})
    EXPECT_TRUE(refused(kFirstFileAt + 19, size, 8)) << "a file of " << size;
  for (const uint64_t files : {0xffffffffu, 4u, 2u, 0u})
    EXPECT_TRUE(refused(kFileCountAt, files, 4)) << files << " files";
  for (const uint64_t manifest : {~uint64_t{0}, kMaxManifestBytes + 1})
    EXPECT_TRUE(refused(kManifestBytesAt, manifest, 8)) << "a manifest of " << manifest;
  for (const uint64_t name : {0xffffu, 0u, 18u})
    EXPECT_TRUE(refused(kFirstFileAt, name, 2)) << "a name of " << name;
}

TEST(Format, OnlyNamesOfFilesInTheDirectoryItselfAreAccepted) {
  using namespace std::string_view_literals;
  for (const std::string_view name : {"../model"sv, "/etc/passwd"sv, "a/b"sv, "a\\b"sv, "."sv,
                                      ".."sv, ".hidden"sv, "a\0b"sv, "\0"sv, ""sv, "/"sv}) {
    Checksums sums = sample();
    sums.files[0].name = name;
    EXPECT_NE(refusal(encode(sums)).find("names a file"), std::string::npos) << name;
  }
}

TEST(Format, AFileNamedTwiceIsRefused) {
  Checksums sums = sample();
  sums.files[2].name = sums.files[0].name;
  EXPECT_NE(refusal(encode(sums)).find("twice"), std::string::npos);
}

}  // namespace
}  // namespace pccheck::test
