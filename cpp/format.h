// checksums.bin, the file that seals a checkpoint: the CRC32C of every block of every payload file
// and of the manifest, bound to the run, the step and this one save. format.md has the bytes.
//
// Pure functions over bytes in memory; decoding trusts nothing.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpp/digest.h"

namespace pccheck {

inline constexpr const char* kManifestName = "manifest.json";
inline constexpr const char* kChecksumsName = "checksums.bin";
inline constexpr uint64_t kMaxManifestBytes = uint64_t{1} << 30;
inline constexpr uint64_t kMaxChecksumsBytes = uint64_t{1} << 28;

using Id = std::array<std::byte, 16>;

// Who a checkpoint is: `save` is drawn anew for every save, so that a block or a manifest of
// another attempt at the same step is not taken for one of this.
struct Identity {
  uint64_t step = 0;
  Id run{};
  Id save{};
};

struct FileSums {
  std::string name;
  uint64_t size_bytes;
  std::vector<uint32_t> blocks;  // CRC32C of each, the last block as long as the file reaches
  std::optional<Digest> digest = std::nullopt;  // of the whole file, where it is known
};

struct Checksums {
  Identity identity;
  uint64_t block_bytes;
  uint64_t manifest_bytes;
  uint32_t manifest_crc;
  std::vector<FileSums> files;
};

class CorruptCheckpoint : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

std::vector<std::byte> encode(const Checksums& checksums);

// Throws CorruptCheckpoint saying which rule is broken.
Checksums decode_checksums(std::span<const std::byte> bytes);

}  // namespace pccheck
