#include "cpp/host_copier.h"

#include <cstring>

#include "cpp/crc32c.h"

namespace pccheck {

uint64_t HostCopier::submit(std::span<const Piece> pieces, ReadyMark*) {
  for (const Piece& piece : pieces) {
    if (piece.crc != nullptr)
      *piece.crc = copy_with_crc32c(*piece.crc, piece.to, piece.from, piece.bytes);
    else
      std::memcpy(piece.to, piece.from, piece.bytes);
  }
  return ++submissions_;
}

}  // namespace pccheck
