// Writing and reading the header of a safetensors file.
//
//   19 00 00 00 00 00 00 00                      length of what follows, little endian
//   {"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}      then spaces up to the data
//
// Pure functions over bytes in memory; reading trusts nothing.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpp/layout.h"

namespace pccheck::safetensors {

// Keys of "__metadata__" in a file that carries its own checksums.
inline constexpr const char* kBlockBytesKey = "pccheck.block_bytes";
inline constexpr const char* kBlockSumsKey = "pccheck.crc32c";  // 8 hex digits for each block
inline constexpr const char* kHeaderSumKey = "pccheck.header_crc32c";  // with its own digits as 0

inline constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // what the safetensors library accepts

struct HeaderRequest {
  std::vector<std::pair<std::string, std::string>> metadata;
  const std::vector<TensorExtent>& tensors;  // begin relative to the data
  const std::vector<size_t>& order;          // in which they stand in the data
  uint64_t data_bytes;
  size_t block_bytes;
  bool with_checksums;
};

// Length prefix, JSON, padding. Padded so that the file ends on a multiple of 4 KiB where the data
// then keep their 8-byte alignment; otherwise, and with checksums, so that the data begin on one.
std::string make_header(const HeaderRequest& request);

// Fills the room that make_header(with_checksums) reserved.
void put_checksums(std::string& header, std::span<const uint32_t> block_sums);

class Malformed : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Entry {
  std::string dtype;
  std::vector<uint64_t> shape;
  uint64_t begin;  // from the start of the file
  uint64_t bytes;
};

struct Header {
  uint64_t data_begin;
  std::map<std::string, std::string> metadata;
  std::map<std::string, Entry> tensors;
};

// `bytes` is the beginning of a file of `file_bytes`, at least as far as the header reaches. Throws
// Malformed saying what is wrong: every length and offset is checked against the file, tensors may
// not overlap or leave holes.
Header parse_header(std::span<const std::byte> bytes, uint64_t file_bytes);

// The header's length, prefix included, from the first 8 bytes. Throws Malformed.
uint64_t header_bytes(std::span<const std::byte, 8> prefix, uint64_t file_bytes);

// The block sums that put_checksums() wrote, the header's own sum verified. Throws Malformed.
struct Checksums {
  uint64_t block_bytes;
  std::vector<uint32_t> block_sums;
};
Checksums read_checksums(std::span<const std::byte> header_bytes, const Header& header,
                         uint64_t file_bytes);

}  // namespace pccheck::safetensors
