// Writes full blocks to their files. One object, run by as many threads as there are to be writers.
#pragma once

#include "cpp/block.h"

namespace pccheck {

class WriterPool final : public Worker {
 public:
  explicit WriterPool(BlockQueue& full) : full_(full) {}

  bool run_one() noexcept override;  // any thread

 private:
  BlockQueue& full_;
};

}  // namespace pccheck
