// The seam between the engine and the memory tensors live in: copies pieces of tensors into slots
// and says when it is done. One implementation copies host memory at once (host_copier), one drives
// a device's copy engine (cuda/d2h_copier), one is completed by a test (manual_copier).
//
// Called by the stager alone, from one thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace pccheck {

struct Piece {
  const std::byte* from;  // in the copier's memory; valid until the submission is done
  std::byte* to;          // in a slot
  size_t bytes;
  uint32_t* crc;  // null, or the running CRC32C to fold the copied bytes into, in submission order
};

// When the sources' values are ready to be copied: what a device's stream has been asked to do up
// to the hand-over. Made on the caller's thread, where "the current stream" has a meaning.
class ReadyMark {
 public:
  virtual ~ReadyMark() = default;
};

class Copier {
 public:
  virtual ~Copier() = default;

  // Whether submit() folds Piece::crc. If not, somebody else sums the slot once it is full.
  virtual bool sums_while_copying() const = 0;

  // Whether the processor can read what pieces are copied from.
  virtual bool sources_are_readable() const { return false; }

  // Starts copying; returns the submission's number, 1 and up. Submissions end in order. `ready`
  // may be null (the values are there already). Throws std::exception when the copy cannot be
  // started.
  virtual uint64_t submit(std::span<const Piece> pieces, ReadyMark* ready) = 0;

  // Whether every submission up to this one has ended; never waits. Throws when a copy failed.
  virtual bool done(uint64_t submission) = 0;
};

}  // namespace pccheck
