// Copies layers from live tensors into slots, checkpoint by checkpoint, layer by layer in layout
// order, and passes each block on to the writers the moment it is full. Where the processor copies
// it keeps just ahead of the writers, until somebody waits at a gate: then it needs nothing but
// free slots. While an update runs it stages until a first block is full, and the rest afterwards.
//
// add() may be called on any thread; everything else runs on the stager's own.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "cpp/block.h"

namespace pccheck {

class Stager final : public Worker {
 public:
  Stager(StagingPool& pool, Copier& copier, BlockQueue& full);

  // Checkpoints are staged in the order in which they were added.
  void add(std::shared_ptr<Checkpoint> checkpoint);

  bool run_one() noexcept override;
  bool awaits_outside() const noexcept override { return !under_way_.empty(); }

 private:
  // A copy under way: what it fills, and whether a layer ends with it.
  struct Submission {
    uint64_t number;
    std::shared_ptr<Checkpoint> checkpoint;
    std::vector<std::pair<Block*, size_t>> fills;
    bool ends_layer;
  };

  std::shared_ptr<Checkpoint> current();
  void forget_current();
  bool has_time(const Checkpoint& checkpoint) const;
  bool reap();
  void complete(const Submission& submission);
  bool stage_more(const std::shared_ptr<Checkpoint>& checkpoint);
  bool stage_headers(const std::shared_ptr<Checkpoint>& checkpoint);
  bool submit(const std::shared_ptr<Checkpoint>& checkpoint);
  bool abandon(const std::shared_ptr<Checkpoint>& checkpoint);
  Block* open_block(const std::shared_ptr<Checkpoint>& checkpoint, const Run& run, uint64_t at);
  void pass_on(Block* block);

  StagingPool& pool_;
  Copier& copier_;
  BlockQueue& full_;

  std::mutex mutex_;  // guards checkpoints_
  std::deque<std::shared_ptr<Checkpoint>> checkpoints_;

  std::vector<std::unique_ptr<Block>> open_;  // being filled: a handful, see Layout::open_blocks
  std::deque<Submission> under_way_;

  // The layer being staged, and how far.
  std::optional<Checkpoint::Work> layer_;
  size_t run_ = 0;
  uint64_t run_done_ = 0;
  // Header blocks of the layout that the layer opens.
  bool headers_left_ = false;
  uint32_t header_file_ = 0;
  uint64_t header_block_ = 0;

  std::vector<Piece> pieces_;  // reused
};

}  // namespace pccheck
