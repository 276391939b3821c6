#include "cpp/format.h"

#include <algorithm>
#include <set>
#include <string_view>

#include "cpp/crc32c.h"
#include "cpp/file.h"
#include "cpp/little_endian.h"

namespace pccheck {
namespace {

constexpr std::string_view kMagic = "PCCKSUMS";
constexpr uint64_t kPlain = 1;
constexpr uint64_t kWithDigests = 2;
constexpr size_t kDigestBytes = 16;

class Writer {
 public:
  void uint(uint64_t value, size_t width) {
    for (size_t i = 0; i < width; ++i) bytes_.push_back(static_cast<std::byte>(value >> (8 * i)));
  }
  void digest(const std::optional<Digest>& digest) {
    uint(digest ? kDigestBytes : 0, 1);
    if (!digest) return;
    for (const uint64_t half : {digest->high, digest->low})  // as it is printed
      for (size_t i = 8; i-- > 0;) bytes_.push_back(static_cast<std::byte>(half >> (8 * i)));
  }
  void raw(std::span<const std::byte> bytes) {
    bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
  }
  void raw(std::string_view text) { raw(std::as_bytes(std::span(text))); }
  std::vector<std::byte> finish() {
    uint(crc32c(0, bytes_), 4);
    return std::move(bytes_);
  }

 private:
  std::vector<std::byte> bytes_;
};

class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) : bytes_(bytes) {}

  std::span<const std::byte> raw(uint64_t count) {
    if (count > bytes_.size()) throw CorruptCheckpoint("checksums.bin is cut short");
    const auto taken = bytes_.first(count);
    bytes_ = bytes_.subspan(count);
    return taken;
  }
  uint64_t uint(size_t width) { return get_uint(raw(width)); }
  size_t left() const { return bytes_.size(); }

 private:
  std::span<const std::byte> bytes_;
};

Id read_id(Reader& reader) {
  Id id;
  std::ranges::copy(reader.raw(id.size()), id.begin());
  return id;
}

std::optional<Digest> read_digest(Reader& reader) {
  const uint64_t bytes = reader.uint(1);
  if (bytes == 0) return std::nullopt;
  if (bytes != kDigestBytes)
    throw CorruptCheckpoint("checksums.bin has a digest of " + std::to_string(bytes) + " bytes");
  Digest digest;
  for (uint64_t* const half : {&digest.high, &digest.low})
    for (const std::byte byte : reader.raw(8)) *half = *half << 8 | std::to_integer<uint64_t>(byte);
  return digest;
}

FileSums read_file(Reader& reader, uint64_t block_bytes) {
  FileSums file{};
  const auto name = reader.raw(reader.uint(2));
  file.name.assign(reinterpret_cast<const char*>(name.data()), name.size());
  // Names are used to open files: one component, nothing hidden.
  if (file.name.empty() || file.name[0] == '.' ||
      file.name.find_first_of(std::string_view("/\\\0", 3)) != std::string::npos)
    throw CorruptCheckpoint("checksums.bin names a file that no checkpoint has");
  file.size_bytes = reader.uint(8);
  const uint64_t blocks =
      file.size_bytes / block_bytes + (file.size_bytes % block_bytes != 0 ? 1 : 0);
  if (blocks > reader.left() / 4) throw CorruptCheckpoint("checksums.bin is cut short");
  file.blocks.reserve(blocks);
  for (uint64_t i = 0; i < blocks; ++i)
    file.blocks.push_back(static_cast<uint32_t>(reader.uint(4)));
  return file;
}

}  // namespace

std::vector<std::byte> encode(const Checksums& checksums) {
  // Without a digest it is written as it always was, for readers that know of none.
  const bool with_digests =
      std::ranges::any_of(checksums.files, [](const FileSums& file) { return !!file.digest; });
  Writer writer;
  writer.raw(kMagic);
  writer.uint(with_digests ? kWithDigests : kPlain, 4);
  writer.uint(checksums.block_bytes, 4);
  writer.uint(checksums.identity.step, 8);
  writer.raw(checksums.identity.run);
  writer.raw(checksums.identity.save);
  writer.uint(checksums.manifest_bytes, 8);
  writer.uint(checksums.manifest_crc, 4);
  writer.uint(checksums.files.size(), 4);
  for (const FileSums& file : checksums.files) {
    writer.uint(file.name.size(), 2);
    writer.raw(file.name);
    writer.uint(file.size_bytes, 8);
    for (const uint32_t crc : file.blocks) writer.uint(crc, 4);
    if (with_digests) writer.digest(file.digest);
  }
  return writer.finish();
}

Checksums decode_checksums(std::span<const std::byte> bytes) {
  if (bytes.size() < kMagic.size() + 4) throw CorruptCheckpoint("checksums.bin is cut short");
  const auto sealed = bytes.first(bytes.size() - 4);
  Reader reader(sealed);
  if (!std::ranges::equal(reader.raw(kMagic.size()), std::as_bytes(std::span(kMagic))))
    throw CorruptCheckpoint("checksums.bin does not begin as one");
  if (crc32c(0, sealed) != get_uint(bytes.last(4)))
    throw CorruptCheckpoint("checksums.bin does not match its own checksum");
  const uint64_t version = reader.uint(4);
  if (version != kPlain && version != kWithDigests)
    throw CorruptCheckpoint("checksums.bin has format version " + std::to_string(version) +
                            "; this library reads versions " + std::to_string(kPlain) + " and " +
                            std::to_string(kWithDigests) + ": update pccheck_ext");
  Checksums checksums{};
  checksums.block_bytes = reader.uint(4);
  if (checksums.block_bytes == 0 || checksums.block_bytes % kDirectAlignment != 0 ||
      checksums.block_bytes > (uint64_t{1} << 30))
    throw CorruptCheckpoint("checksums.bin has a block size of " +
                            std::to_string(checksums.block_bytes) + " bytes");
  checksums.identity.step = reader.uint(8);
  checksums.identity.run = read_id(reader);
  checksums.identity.save = read_id(reader);
  checksums.manifest_bytes = reader.uint(8);
  if (checksums.manifest_bytes > kMaxManifestBytes)
    throw CorruptCheckpoint("checksums.bin tells of a manifest of " +
                            std::to_string(checksums.manifest_bytes) + " bytes");
  checksums.manifest_crc = static_cast<uint32_t>(reader.uint(4));
  const uint64_t files = reader.uint(4);
  std::set<std::string> names;
  for (uint64_t i = 0; i < files; ++i) {
    checksums.files.push_back(read_file(reader, checksums.block_bytes));
    if (version == kWithDigests) checksums.files.back().digest = read_digest(reader);
    if (!names.insert(checksums.files.back().name).second)
      throw CorruptCheckpoint("checksums.bin names a file twice");
  }
  if (reader.left() != 0) throw CorruptCheckpoint("checksums.bin has bytes after its end");
  return checksums;
}

}  // namespace pccheck
