// Headers nobody should believe. Each is refused with a message, before anything is allocated for
// what it claims.
#include <gtest/gtest.h>

#include <optional>

#include "cpp/little_endian.h"
#include "cpp/safetensors.h"
#include "tests/cpp/bytes.h"

namespace pccheck::test {
namespace {

using safetensors::Header;
using safetensors::Malformed;

Bytes with_length(uint64_t length, std::string_view json) {
  Bytes bytes(8);
  put_u64(std::span(bytes).first<8>(), length);
  const Bytes text = to_bytes(json);
  bytes.insert(bytes.end(), text.begin(), text.end());
  return bytes;
}

// A file of this header and `data_bytes` of data.
std::string refusal(std::string_view json, uint64_t data_bytes) {
  try {
    safetensors::parse_header(with_length(json.size(), json), 8 + json.size() + data_bytes);
  } catch (const Malformed& error) {
    return error.what();
  }
  return "";
}

constexpr std::string_view kGood =
    R"({"__metadata__":{"k":"v"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
    R"("b":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}}  )";
constexpr uint64_t kGoodDataBytes = 11;

TEST(HostileSafetensors, LengthsBeyondTheFileAreRefused) {
  const std::string json = "{}";
  for (const uint64_t length :
       {uint64_t{0}, uint64_t{1}, uint64_t{3}, uint64_t{1000}, safetensors::kMaxHeaderBytes + 1,
        uint64_t{1} << 32, uint64_t{1} << 63, ~uint64_t{0}, ~uint64_t{0} - 7, ~uint64_t{0} - 8}) {
    const Bytes bytes = with_length(length, json);
    EXPECT_THROW(safetensors::parse_header(bytes, bytes.size()), Malformed) << length;
    EXPECT_THROW(safetensors::header_bytes(std::span(bytes).first<8>(), bytes.size()), Malformed)
        << length;
  }
  const Bytes good = with_length(2, json);
  EXPECT_EQ(safetensors::header_bytes(std::span(good).first<8>(), good.size()), 10u);
}

TEST(HostileSafetensors, LengthsBeyondTheFormatsBoundAreRefusedHoweverLargeTheFile) {
  const Bytes bytes = with_length(safetensors::kMaxHeaderBytes + 1, "{}");
  EXPECT_THROW(safetensors::header_bytes(std::span(bytes).first<8>(), uint64_t{1} << 40),
               Malformed);
}

TEST(HostileSafetensors, TextThatIsNotSuchAHeaderIsRefused) {
  using namespace std::string_view_literals;
  for (const std::string_view json : {"  "sv,
                                      "[]"sv,
                                      "null"sv,
                                      "{"sv,
                                      "{]"sv,
                                      "{},"sv,
                                      "{}{}"sv,
                                      "{} x"sv,
                                      "{}\0"sv,
                                      "\0{}"sv,
                                      "{\0}"sv,
                                      "{'a':1}"sv,
                                      "{\"a\"}"sv,
                                      "{\"a\":}"sv,
                                      "{\"a\":1}"sv,
                                      "{\"a\":null}"sv,
                                      "{\"a\":[]}"sv,
                                      "{\"a\":{}}"sv,
                                      "{,}"sv,
                                      "{\"__metadata__\":{},}"sv,
                                      "{\"__metadata__\":{\"k\":1}}"sv,
                                      "{\"__metadata__\":{\"k\":null}}"sv,
                                      "{\"__metadata__\":{\"k\":{}}}"sv,
                                      "{\"__metadata__\":[]}"sv,
                                      "{\"__metadata__\":{\"k\":\"v\",}}"sv,
                                      "{\"__metadata__\":{},\"__metadata__\":{}}"sv,
                                      "{\"__metadata__\":{\"k\":\"v\",\"k\":\"v\"}}"sv,
                                      "{\"__metadata__\":{\"k\":\"v\",\"\\u006b\":\"v\"}}"sv,
                                      "{\"__metadata__\":{\"k\":\"v}}"sv,
                                      "{\"__metadata__\":{\"k\":\"\\\"}}"sv,
                                      "{\"__metadata__\":{\"k\":\"\\x\"}}"sv,
                                      "{\"__metadata__\":{\"k\":\"\\u12\"}}"sv,
                                      "{\"__metadata__\":{\"k\":\"\\u12G4\"}}"sv,
                                      "{\"__metadata__\":{\"k\":\"\\ud800\"}}"sv,
                                      "{\"__metadata__\":{\"k\":\"\\udc00\"}}"sv,
                                      "{\"__metadata__\":{\"k\":\"\\ud800\\u0041\"}}"sv,
                                      "{\"__metadata__\":{\"k\":\"line\nbreak\"}}"sv,
                                      "{\"__metadata__\":{\"k\":\"\0\"}}"sv,
                                      "\xEF\xBB\xBF{}"sv,
                                      "/* */{}"sv})
    EXPECT_NE(refusal(json, 0), "") << json;
}

TEST(HostileSafetensors, WhatJsonAllowsIsAccepted) {
  EXPECT_EQ(refusal("{}", 0), "");
  EXPECT_EQ(refusal(kGood, kGoodDataBytes), "");
  EXPECT_EQ(refusal("\t{ \"__metadata__\" : { \"k\\u0000\" : \"\\ud83d\\ude00\\/\" } }\n", 0), "");
  EXPECT_EQ(refusal("{\"a\":{\"shape\":[ ],\"data_offsets\":[0 , 1],\"dtype\":\"BOOL\"} }", 1), "");
}

TEST(HostileSafetensors, EntriesThatCannotBeAreRefused) {
  struct Case {
    std::string_view entry, speaks_of;
  };
  const std::vector<Case> cases = {
      {R"({"dtype":"F32","shape":[2]})", "without"},
      {R"({"dtype":"F32","data_offsets":[0,8]})", "without"},
      {R"({"shape":[2],"data_offsets":[0,8]})", "without"},
      {R"({"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]})", "repeated"},
      {R"({"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1})", "unexpected"},
      {R"({"dtype":"F33","shape":[2],"data_offsets":[0,8]})", "unknown dtype"},
      {R"({"dtype":"f32","shape":[2],"data_offsets":[0,8]})", "unknown dtype"},
      {R"({"dtype":"","shape":[2],"data_offsets":[0,8]})", "unknown dtype"},
      {R"({"dtype":"F32","shape":[3],"data_offsets":[0,8]})", "shape"},
      {R"({"dtype":"F32","shape":[1],"data_offsets":[0,8]})", "shape"},
      {R"({"dtype":"F64","shape":[2],"data_offsets":[0,8]})", "shape"},
      {R"({"dtype":"F32","shape":[],"data_offsets":[0,8]})", "shape"},
      {R"({"dtype":"F32","shape":[0],"data_offsets":[0,8]})", "shape"},
      {R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]})", "shape"},
      {R"({"dtype":"F32","shape":[9223372036854775807,2],"data_offsets":[0,8]})", "shape"},
      {R"({"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,8]})", "shape"},
      {R"({"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,8]})", "too large"},
      {R"({"dtype":"F32","shape":[-2],"data_offsets":[0,8]})", "unsigned"},
      {R"({"dtype":"F32","shape":[2.0],"data_offsets":[0,8]})", "expected"},
      {R"({"dtype":"F32","shape":[2e0],"data_offsets":[0,8]})", "expected"},
      {R"({"dtype":"F32","shape":[02],"data_offsets":[0,8]})", "leading zero"},
      {R"({"dtype":"F32","shape":["2"],"data_offsets":[0,8]})", "unsigned"},
      {R"({"dtype":"F32","shape":[NaN],"data_offsets":[0,8]})", "unsigned"},
      {R"({"dtype":"F32","shape":[2,],"data_offsets":[0,8]})", "unsigned"},
      {R"({"dtype":"F32","shape":2,"data_offsets":[0,8]})", "expected"},
      {R"({"dtype":32,"shape":[2],"data_offsets":[0,8]})", "expected"},
      {R"({"dtype":"F32","shape":[2],"data_offsets":[8,0]})", "data_offsets"},
      {R"({"dtype":"F32","shape":[2],"data_offsets":[0,8,8]})", "data_offsets"},
      {R"({"dtype":"F32","shape":[2],"data_offsets":[8]})", "data_offsets"},
      {R"({"dtype":"F32","shape":[2],"data_offsets":[]})", "data_offsets"},
      {R"({"dtype":"F32","shape":[3],"data_offsets":[0,12]})", "data_offsets"},
      {R"({"dtype":"F32","shape":[2],"data_offsets":[8,16]})", "data_offsets"},
      {R"({"dtype":"U8","shape":[7],"data_offsets":[0,7]})", "after the last tensor"},
      {R"({"dtype":"U8","shape":[7],"data_offsets":[1,8]})", "hole"},
      {R"({"dtype":"U8","shape":[0],"data_offsets":[0,0]})", "after the last tensor"},
      {R"({"dtype":"F32","shape":[2],"data_offsets":[18446744073709551608,0]})", "data_offsets"},
  };
  for (const Case& given : cases) {
    const std::string said = refusal("{\"a\":" + std::string(given.entry) + "}", 8);
    EXPECT_NE(said.find(given.speaks_of), std::string::npos) << given.entry << ": " << said;
  }
}

TEST(HostileSafetensors, OverlapsHolesAndNamesStandingTwiceAreRefused) {
  const auto two = [](std::string_view first, std::string_view second, std::string_view name) {
    return "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":" + std::string(first) +
           "},\"" + std::string(name) +
           "\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":" + std::string(second) + "}}";
  };
  EXPECT_EQ(refusal(two("[0,4]", "[4,8]", "b"), 8), "");
  EXPECT_EQ(refusal(two("[4,8]", "[0,4]", "b"), 8), "");
  EXPECT_NE(refusal(two("[0,4]", "[4,8]", "a"), 8).find("twice"), std::string::npos);
  EXPECT_NE(refusal(two("[0,4]", "[4,8]", "\\u0061"), 8).find("twice"), std::string::npos);
  EXPECT_NE(refusal(two("[0,4]", "[2,6]", "b"), 8).find("overlap"), std::string::npos);
  EXPECT_NE(refusal(two("[0,4]", "[0,4]", "b"), 4).find("overlap"), std::string::npos);
  EXPECT_NE(refusal(two("[0,4]", "[5,9]", "b"), 9).find("hole"), std::string::npos);
  EXPECT_NE(refusal(two("[0,4]", "[4,8]", "b"), 9).find("after the last"), std::string::npos);
  EXPECT_NE(refusal("{}", 1).find("after the last"), std::string::npos);
}

TEST(HostileSafetensors, DeepNestingIsRefusedWithoutRecursion) {
  for (const std::string& opening : {std::string("["), std::string("{\"a\":")}) {
    std::string json;
    for (int depth = 0; depth < 200'000; ++depth) json += opening;
    EXPECT_NE(refusal(json, 0), "");
    EXPECT_NE(refusal("{\"a\":" + json, 0), "");
    EXPECT_NE(refusal("{\"__metadata__\":" + json, 0), "");
    EXPECT_NE(refusal(R"({"a":{"dtype":"F32","shape":)" + json, 0), "");
  }
}

TEST(HostileSafetensors, AHeaderCutShortAtAnyByteIsRefused) {
  const Bytes good = with_length(kGood.size(), kGood);
  const uint64_t file_bytes = good.size() + kGoodDataBytes;
  EXPECT_NO_THROW(safetensors::parse_header(good, file_bytes));
  for (size_t size = 0; size < good.size(); ++size) {
    const auto cut = std::span(good).first(size);
    EXPECT_THROW(safetensors::parse_header(cut, file_bytes), Malformed) << size;
    EXPECT_THROW(safetensors::parse_header(cut, size), Malformed) << size;
  }
  // The text itself cut short, with the length that goes with it; the last two bytes are spaces.
  for (size_t size = 0; size + 2 < kGood.size(); ++size)
    EXPECT_NE(refusal(kGood.substr(0, size), kGoodDataBytes), "") << size;
}

TEST(HostileSafetensors, WhateverASingleBitFlipLeavesAcceptedStillCoversTheFileExactly) {
  Bytes bytes = with_length(kGood.size(), kGood);
  const uint64_t file_bytes = bytes.size() + kGoodDataBytes;
  const auto parse = [&]() -> std::optional<Header> {
    try {
      return safetensors::parse_header(bytes, file_bytes);
    } catch (const Malformed&) {
      return std::nullopt;
    }
  };
  size_t refused = 0;
  for (size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
    flip_bit(bytes, bit);
    const std::optional<Header> header = parse();
    flip_bit(bytes, bit);
    if (!header) {
      ++refused;
      continue;
    }
    // A letter of a name may have changed (checksums.bin covers that), never a place or a size.
    ASSERT_EQ(header->tensors.size(), 2u) << "bit " << bit;
    uint64_t at = header->data_begin;
    for (const auto& [name, entry] : header->tensors)
      if (entry.begin == at) at += entry.bytes;
    for (const auto& [name, entry] : header->tensors)
      if (entry.begin == at) at += entry.bytes;
    ASSERT_EQ(at, file_bytes) << "bit " << bit;
  }
  EXPECT_GT(refused, 4 * bytes.size());
}

}  // namespace
}  // namespace pccheck::test
