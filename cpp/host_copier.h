// Copies between host memories, on the calling thread, checksumming in the same pass: a submission
// has ended when submit() returns.
#pragma once

#include <array>

#include "cpp/copier.h"
#include "cpp/crc32c.h"

namespace pccheck {

// Which stores are the better ones is a matter of where the bytes go next. A device that reads a
// slot out of the caches spares the memory a write and a read. But where another processor reads it
// for the device, one far away in a virtual machine's host above all, each cached store to the slot
// waits for that processor to give its line back, and a copy takes two to three times as long. The
// time of copies tells the two apart; now and then the other kind is tried.
class StoreChoice {
 public:
  Stores next();  // for the submission that comes now
  void took(Stores stores, double seconds_per_byte);

 private:
  static constexpr size_t kRecent = 8;
  static constexpr uint64_t kTryAgainAfter = 32;  // submissions
  static constexpr double kMuchSlower = 1.5;

  // The fastest of the last few: what slows one down may be anything.
  struct Times {
    std::array<double, kRecent> recent{};
    size_t count = 0;

    void add(double time) { recent[count++ % kRecent] = time; }
    double best() const;
  };

  Times cached_, streamed_;
  uint64_t submissions_ = 0;
};

class HostCopier final : public Copier {
 public:
  bool sums_while_copying() const override { return true; }
  bool sources_are_readable() const override { return true; }
  uint64_t submit(std::span<const Piece> pieces, ReadyMark* ready) override;
  bool done(uint64_t) override { return true; }

 private:
  StoreChoice choice_;
  uint64_t submissions_ = 0;
};

}  // namespace pccheck
