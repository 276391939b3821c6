// A reader for the small part of JSON that a safetensors header may use: objects, strings, arrays
// of unsigned integers. Everything else is malformed, and nesting is fixed, so there is no
// recursion.
#include <algorithm>
#include <limits>
#include <string_view>

#include "cpp/crc32c.h"
#include "cpp/little_endian.h"
#include "cpp/safetensors.h"

namespace pccheck::safetensors {
namespace {

class Cursor {
 public:
  explicit Cursor(std::string_view text) : text_(text) {}

  [[noreturn]] void fail(const std::string& what) const {
    throw Malformed("safetensors header: " + what + " at byte " + std::to_string(at_ + 8));
  }

  // The next character that is not white space, or NUL at the end.
  char peek() {
    while (at_ < text_.size() &&
           (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r'))
      ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }

  bool at_end() {
    peek();
    return at_ == text_.size();
  }

  void expect(char c) {
    if (peek() != c) fail(std::string("expected '") + c + "'");
    ++at_;
  }

  bool take(char c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }

  std::string string() {
    expect('"');
    std::string value;
    while (true) {
      if (at_ == text_.size()) fail("a string does not end");
      const char c = text_[at_++];
      if (c == '"') return value;
      if (static_cast<unsigned char>(c) < 0x20) fail("a control character in a string");
      if (c == '\\')
        append_escape(value);
      else
        value += c;
    }
  }

  uint64_t number() {
    const char first = peek();
    if (first < '0' || first > '9') fail("expected an unsigned integer");
    uint64_t value = 0;
    const size_t begin = at_;
    for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
      const auto digit = static_cast<uint64_t>(text_[at_] - '0');
      if (value > (std::numeric_limits<uint64_t>::max() - digit) / 10) fail("a number too large");
      value = value * 10 + digit;
    }
    if (first == '0' && at_ - begin > 1) fail("a number with a leading zero");
    return value;
  }

  std::vector<uint64_t> numbers() {
    std::vector<uint64_t> values;
    expect('[');
    if (take(']')) return values;
    do values.push_back(number());
    while (take(','));
    expect(']');
    return values;
  }

 private:
  uint32_t hex4() {
    if (text_.size() - at_ < 4) fail("an escape does not end");
    uint32_t value = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = text_[at_++];
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) fail("an escape that is not hexadecimal");
      value = value * 16 + static_cast<uint32_t>(digit);
    }
    return value;
  }

  void append_escape(std::string& value) {
    if (at_ == text_.size()) fail("a string does not end");
    const char c = text_[at_++];
    constexpr std::string_view kinds = "\"\\/bfnrt", plain = "\"\\/\b\f\n\r\t";
    if (const size_t kind = kinds.find(c); kind != std::string_view::npos) {
      value += plain[kind];
      return;
    }
    if (c != 'u') fail("an unknown escape");
    uint32_t point = hex4();
    if (point >= 0xD800 && point < 0xDC00) {
      if (text_.substr(at_, 2) != "\\u") fail("half a surrogate pair");
      at_ += 2;
      const uint32_t low = hex4();
      if (low < 0xDC00 || low >= 0xE000) fail("half a surrogate pair");
      point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00);
    } else if (point >= 0xDC00 && point < 0xE000) {
      fail("half a surrogate pair");
    }
    append_utf8(value, point);
  }

  static void append_utf8(std::string& value, uint32_t point) {
    const auto byte = [&](uint32_t bits) { value += static_cast<char>(bits); };
    if (point < 0x80) return byte(point);
    if (point < 0x800) {
      byte(0xC0 | point >> 6);
    } else {
      if (point < 0x10000) {
        byte(0xE0 | point >> 12);
      } else {
        byte(0xF0 | point >> 18);
        byte(0x80 | (point >> 12 & 0x3F));
      }
      byte(0x80 | (point >> 6 & 0x3F));
    }
    byte(0x80 | (point & 0x3F));
  }

  std::string_view text_;
  size_t at_ = 0;
};

std::map<std::string, std::string> read_metadata(Cursor& cursor) {
  std::map<std::string, std::string> metadata;
  cursor.expect('{');
  if (cursor.take('}')) return metadata;
  do {
    std::string key = cursor.string();
    cursor.expect(':');
    if (!metadata.emplace(std::move(key), cursor.string()).second)
      cursor.fail("a metadata key stands twice");
  } while (cursor.take(','));
  cursor.expect('}');
  return metadata;
}

Entry read_entry(Cursor& cursor, uint64_t data_begin, uint64_t data_bytes) {
  Entry entry{};
  std::vector<uint64_t> offsets;
  int seen = 0;
  cursor.expect('{');
  do {
    const std::string key = cursor.string();
    cursor.expect(':');
    const int bit = key == "dtype" ? 1 : key == "shape" ? 2 : key == "data_offsets" ? 4 : 0;
    if (bit == 0 || (seen & bit) != 0) cursor.fail("unexpected or repeated key '" + key + "'");
    seen |= bit;
    if (bit == 1)
      entry.dtype = cursor.string();
    else
      (bit == 2 ? entry.shape : offsets) = cursor.numbers();
  } while (cursor.take(','));
  cursor.expect('}');
  if (seen != 7) cursor.fail("a tensor without dtype, shape or data_offsets");
  if (offsets.size() != 2 || offsets[0] > offsets[1] || offsets[1] > data_bytes)
    cursor.fail("data_offsets outside the file");
  entry.begin = data_begin + offsets[0];
  entry.bytes = offsets[1] - offsets[0];

  uint64_t expected = dtype_bytes(entry.dtype);
  if (expected == 0) cursor.fail("unknown dtype '" + entry.dtype + "'");
  const bool empty = std::find(entry.shape.begin(), entry.shape.end(), 0u) != entry.shape.end();
  for (const uint64_t extent : entry.shape) {
    if (empty) break;
    if (extent > data_bytes / expected) cursor.fail("a shape larger than the file");
    expected *= extent;
  }
  if (entry.bytes != (empty ? 0 : expected)) cursor.fail("a shape that does not fit its offsets");
  return entry;
}

void require_no_overlap_or_hole(const Header& header, uint64_t file_bytes) {
  std::vector<std::pair<uint64_t, uint64_t>> ranges;
  ranges.reserve(header.tensors.size());
  for (const auto& [name, entry] : header.tensors)
    ranges.emplace_back(entry.begin, entry.begin + entry.bytes);
  std::sort(ranges.begin(), ranges.end());
  uint64_t at = header.data_begin;
  for (const auto& [begin, end] : ranges) {
    if (begin != at) throw Malformed("safetensors header: tensors overlap or leave a hole");
    at = end;
  }
  if (at != file_bytes) throw Malformed("safetensors header: bytes after the last tensor");
}

uint32_t parse_hex(std::string_view digits) {
  uint32_t value = 0;
  for (const char c : digits) {
    const bool decimal = c >= '0' && c <= '9';
    if (!decimal && !(c >= 'a' && c <= 'f')) throw Malformed("a checksum that is not hexadecimal");
    value = value * 16 + static_cast<uint32_t>(decimal ? c - '0' : c - 'a' + 10);
  }
  return value;
}

const std::string& required(const Header& header, const char* key) {
  const auto found = header.metadata.find(key);
  if (found == header.metadata.end())
    throw Malformed(std::string("no checksums: the header has no '") + key + "'");
  return found->second;
}

}  // namespace

uint64_t header_bytes(std::span<const std::byte, 8> prefix, uint64_t file_bytes) {
  const uint64_t length = get_uint(prefix);
  if (length > kMaxHeaderBytes || length < 2 || length > file_bytes || file_bytes - length < 8)
    throw Malformed("safetensors header: a length of " + std::to_string(length) + " in a file of " +
                    std::to_string(file_bytes) + " bytes");
  return length + 8;
}

Header parse_header(std::span<const std::byte> bytes, uint64_t file_bytes) {
  if (bytes.size() < 8) throw Malformed("safetensors header: the file is shorter than 8 bytes");
  Header header{};
  header.data_begin = header_bytes(bytes.first<8>(), file_bytes);
  if (bytes.size() < header.data_begin) throw Malformed("safetensors header: cut short");
  Cursor cursor({reinterpret_cast<const char*>(bytes.data()) + 8, header.data_begin - 8});
  const uint64_t data_bytes = file_bytes - header.data_begin;
  bool metadata_seen = false;
  cursor.expect('{');
  if (!cursor.take('}')) {
    do {
      std::string name = cursor.string();
      cursor.expect(':');
      if (name == "__metadata__") {
        if (metadata_seen) cursor.fail("__metadata__ stands twice");
        metadata_seen = true;
        header.metadata = read_metadata(cursor);
      } else if (!header.tensors
                      .emplace(std::move(name), read_entry(cursor, header.data_begin, data_bytes))
                      .second) {
        cursor.fail("a tensor's name stands twice");
      }
    } while (cursor.take(','));
    cursor.expect('}');
  }
  if (!cursor.at_end()) cursor.fail("text after the end");
  require_no_overlap_or_hole(header, file_bytes);
  return header;
}

Checksums read_checksums(std::span<const std::byte> bytes, const Header& header,
                         uint64_t file_bytes) {
  Checksums sums{};
  const std::string& block_bytes = required(header, kBlockBytesKey);
  if (block_bytes.empty() || block_bytes.size() > 10 ||
      block_bytes.find_first_not_of("0123456789") != std::string::npos)
    throw Malformed("a block size that is not a number: '" + block_bytes.substr(0, 20) + "'");
  sums.block_bytes = std::stoull(block_bytes);
  if (sums.block_bytes == 0 || sums.block_bytes > (uint64_t{1} << 30))
    throw Malformed("a block size of " + block_bytes + " bytes");
  const uint64_t data_bytes = file_bytes - header.data_begin;
  const std::string& digits = required(header, kBlockSumsKey);
  if (digits.size() != 8 * ((data_bytes + sums.block_bytes - 1) / sums.block_bytes))
    throw Malformed("a number of checksums that does not fit the file");
  for (size_t i = 0; i < digits.size(); i += 8)
    sums.block_sums.push_back(parse_hex(std::string_view(digits).substr(i, 8)));

  // The sum was taken with its own digits as zeros.
  const std::string& own = required(header, kHeaderSumKey);
  std::string text(reinterpret_cast<const char*>(bytes.data()), header.data_begin);
  const std::string opening = "\"" + std::string(kHeaderSumKey) + "\":\"";
  const size_t at = text.find(opening);
  if (own.size() != 8 || at == std::string::npos || text.size() - at - opening.size() < 8)
    throw Malformed("the header's own checksum is not where it should be");
  text.replace(at + opening.size(), 8, std::string(8, '0'));
  if (parse_hex(own) != crc32c(0, std::as_bytes(std::span(text))))
    throw Malformed("the header's checksum does not match");
  return sums;
}

}  // namespace pccheck::safetensors
