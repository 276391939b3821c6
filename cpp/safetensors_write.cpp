#include <algorithm>
#include <array>
#include <cstdio>

#include "cpp/crc32c.h"
#include "cpp/file.h"
#include "cpp/little_endian.h"
#include "cpp/safetensors.h"

namespace pccheck::safetensors {
namespace {

void append_string(std::string& json, const std::string& text) {
  json += '"';
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      json += '\\';
      json += c;
    } else if (byte < 0x20) {
      std::array<char, 7> escape{};
      std::snprintf(escape.data(), escape.size(), "\\u%04x", byte);
      json += escape.data();
    } else {
      json += c;
    }
  }
  json += '"';
}

void append_entry(std::string& json, const TensorExtent& tensor) {
  append_string(json, tensor.spec.name);
  json += R"(:{"dtype":")" + tensor.spec.dtype + R"(","shape":[)";
  for (size_t d = 0; d < tensor.spec.shape.size(); ++d)
    json += (d == 0 ? "" : ",") + std::to_string(tensor.spec.shape[d]);
  json += R"(],"data_offsets":[)" + std::to_string(tensor.begin) + "," +
          std::to_string(tensor.begin + tensor.bytes) + "]}";
}

std::string hex(uint32_t value) {
  std::array<char, 9> digits{};
  std::snprintf(digits.data(), digits.size(), "%08x", value);
  return digits.data();
}

// Where the value of a metadata key that make_header() wrote begins.
size_t value_position(const std::string& header, const char* key) {
  const std::string opening = "\"" + std::string(key) + "\":\"";
  return header.find(opening) + opening.size();
}

}  // namespace

std::string make_header(const HeaderRequest& request) {
  std::vector<std::pair<std::string, std::string>> metadata = request.metadata;
  if (request.with_checksums) {
    const uint64_t blocks = (request.data_bytes + request.block_bytes - 1) / request.block_bytes;
    // First, so that no text of the user's can look like them to value_position().
    metadata.insert(metadata.begin(), {{kHeaderSumKey, std::string(8, '0')},
                                       {kBlockSumsKey, std::string(8 * blocks, '0')},
                                       {kBlockBytesKey, std::to_string(request.block_bytes)}});
  }
  std::string header(8, '\0');
  header += "{\"__metadata__\":{";
  for (size_t i = 0; i < metadata.size(); ++i) {
    if (i > 0) header += ',';
    append_string(header, metadata[i].first);
    header += ':';
    append_string(header, metadata[i].second);
  }
  header += '}';
  for (const size_t i : request.order) {
    header += ',';
    append_entry(header, request.tensors[i]);
  }
  header += '}';

  const bool end_can_be_aligned = request.data_bytes % 8 == 0 && !request.with_checksums;
  const uint64_t beyond = end_can_be_aligned ? request.data_bytes % kDirectAlignment : 0;
  const uint64_t excess = (header.size() + beyond) % kDirectAlignment;
  if (excess != 0) header.append(kDirectAlignment - excess, ' ');
  if (header.size() - 8 > kMaxHeaderBytes)
    throw std::invalid_argument("a header of " + std::to_string(header.size()) +
                                " bytes is more than safetensors allows; save fewer tensors");
  put_u64(std::span(header).first<8>(), header.size() - 8);
  return header;
}

void put_checksums(std::string& header, std::span<const uint32_t> block_sums) {
  size_t at = value_position(header, kBlockSumsKey);
  for (const uint32_t sum : block_sums) {
    header.replace(at, 8, hex(sum));
    at += 8;
  }
  const uint32_t sum = crc32c(0, std::as_bytes(std::span(header)));
  header.replace(value_position(header, kHeaderSumKey), 8, hex(sum));
}

}  // namespace pccheck::safetensors
