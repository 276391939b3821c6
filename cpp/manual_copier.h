// A copier whose submissions end when somebody says so. It stands in for a device in tests: the
// bytes are read when a submission is released, as late as a slow device would read them, so that a
// source changed too early is really torn.
#pragma once

#include <mutex>
#include <vector>

#include "cpp/copier.h"

namespace pccheck {

class ManualCopier final : public Copier {
 public:
  bool sums_while_copying() const override { return false; }
  uint64_t submit(std::span<const Piece> pieces, ReadyMark* ready) override;
  bool done(uint64_t submission) override;

  // Any thread. Ends the next `count` submissions, made already or still to come.
  void release(uint64_t count);
  // Ends every submission, now and from now on.
  void release_all();
  uint64_t submitted() const;

 private:
  void copy_released();  // with mutex_ held

  mutable std::mutex mutex_;  // guards everything below
  std::vector<std::vector<Piece>> submissions_;
  uint64_t copied_ = 0;
  uint64_t allowed_ = 0;
};

}  // namespace pccheck
