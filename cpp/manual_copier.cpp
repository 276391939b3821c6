#include "cpp/manual_copier.h"

#include <cstring>
#include <limits>

namespace pccheck {

uint64_t ManualCopier::submit(std::span<const Piece> pieces, ReadyMark*) {
  const std::lock_guard lock(mutex_);
  submissions_.emplace_back(pieces.begin(), pieces.end());
  copy_released();
  return submissions_.size();
}

bool ManualCopier::done(uint64_t submission) {
  const std::lock_guard lock(mutex_);
  return copied_ >= submission;
}

void ManualCopier::release(uint64_t count) {
  const std::lock_guard lock(mutex_);
  const uint64_t room = std::numeric_limits<uint64_t>::max() - allowed_;
  allowed_ += count < room ? count : room;
  copy_released();
}

void ManualCopier::release_all() { release(std::numeric_limits<uint64_t>::max()); }

uint64_t ManualCopier::submitted() const {
  const std::lock_guard lock(mutex_);
  return submissions_.size();
}

void ManualCopier::copy_released() {
  while (copied_ < submissions_.size() && copied_ < allowed_) {
    std::vector<Piece>& pieces = submissions_[copied_];
    for (const Piece& piece : pieces) std::memcpy(piece.to, piece.from, piece.bytes);
    pieces.clear();
    ++copied_;
  }
}

}  // namespace pccheck
