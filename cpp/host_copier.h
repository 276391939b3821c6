// Copies between host memories, on the calling thread, checksumming in the same pass: a submission
// has ended when submit() returns.
#pragma once

#include "cpp/copier.h"

namespace pccheck {

class HostCopier final : public Copier {
 public:
  bool sums_while_copying() const override { return true; }
  uint64_t submit(std::span<const Piece> pieces, ReadyMark* ready) override;
  bool done(uint64_t) override { return true; }

 private:
  uint64_t submissions_ = 0;
};

}  // namespace pccheck
