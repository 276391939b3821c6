// Copies layers from live tensors into slots, checkpoint by checkpoint, layer by layer in layout
// order, and passes each block on to the writers the moment it is full. Where the processor copies
// it keeps just ahead of the writers, until somebody waits at a gate: then it needs nothing but
// free slots. While an update runs it stages until a first block is full, and the rest afterwards.
//
// Where files are of layers (Layout::files_of_layers), it first finds out which of a layer's are
// still what the newest committed checkpoint has. They are linked, not staged; of the others, the
// digest is taken of what has been staged.
//
// add() may be called on any thread; everything else runs on the stager's own.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "cpp/block.h"
#include "cpp/comparison.h"
#include "cpp/persister.h"

namespace pccheck {

// Where files that have not changed are found; without, all are staged.
struct Unchanged {
  Persister* persister = nullptr;
  const Book* book = nullptr;
};

class Stager final : public Worker {
 public:
  Stager(StagingPool& pool, Copier& copier, BlockQueue& full, Unchanged unchanged = {});

  // Checkpoints are staged in the order in which they were added.
  void add(std::shared_ptr<Checkpoint> checkpoint);

  bool run_one() noexcept override;
  bool awaits_outside() const noexcept override { return !under_way_.empty(); }

  // Unchanged files that had to be staged all the same: no link could be made to them. Any thread.
  uint64_t links_refused() const { return links_refused_.load(std::memory_order_relaxed); }

 private:
  struct Fill {
    Block* block;
    size_t begin;
    size_t bytes;
  };

  // A copy under way: what it fills, and whether a layer ends with it. Or what is to be compared.
  struct Submission {
    uint64_t number;
    std::shared_ptr<Checkpoint> checkpoint;
    const Layout* layout;
    uint32_t first_file;
    std::vector<Fill> fills;
    bool ends_layer;
    SlotLease compared = {};
    size_t compared_bytes = 0;
  };

  // The file that is being staged, of those that are digested: one at a time.
  struct Digesting {
    const Checkpoint* checkpoint;
    uint32_t file;
    FileDigester digester;
  };

  std::shared_ptr<Checkpoint> current();
  void forget_current();
  bool has_time(const Checkpoint& checkpoint) const;
  bool reap();
  void complete(const Submission& submission);
  void digest(const Submission& submission, const Fill& fill);
  bool begin_layer(const std::shared_ptr<Checkpoint>& checkpoint);
  bool compare(const std::shared_ptr<Checkpoint>& checkpoint);
  bool compare_in_slot(const std::shared_ptr<Checkpoint>& checkpoint);
  void link_equal(const std::shared_ptr<Checkpoint>& checkpoint);
  bool link(const std::shared_ptr<Checkpoint>& checkpoint, const Comparison::Equal& equal);
  bool is_linked(uint32_t file) const;
  bool stage_more(const std::shared_ptr<Checkpoint>& checkpoint);
  bool stage_headers(const std::shared_ptr<Checkpoint>& checkpoint);
  bool submit(const std::shared_ptr<Checkpoint>& checkpoint);
  bool abandon(const std::shared_ptr<Checkpoint>& checkpoint);
  Block* open_block(const std::shared_ptr<Checkpoint>& checkpoint, const Run& run, uint64_t at);
  void pass_on(Block* block);

  StagingPool& pool_;
  Copier& copier_;
  BlockQueue& full_;
  const Unchanged unchanged_;
  std::atomic<uint64_t> links_refused_ = 0;  // relaxed: a count, and nothing hangs on it

  std::mutex mutex_;  // guards checkpoints_
  std::deque<std::shared_ptr<Checkpoint>> checkpoints_;

  std::vector<std::unique_ptr<Block>> open_;  // being filled: a handful, see Layout::open_blocks
  std::deque<Submission> under_way_;

  std::optional<Digesting> digesting_;

  // The layer being staged, and how far. First its files are compared; those that could be linked
  // are left out afterwards.
  std::optional<Checkpoint::Work> layer_;
  std::optional<Comparison> comparison_;  // on layer_
  std::vector<uint32_t> linked_;          // by their number in the layout
  size_t run_ = 0;
  uint64_t run_done_ = 0;
  // Header blocks of the files whose headers come with the layer.
  size_t header_file_ = 0;  // among those
  uint64_t header_block_ = 0;

  std::vector<Piece> pieces_;  // reused
};

}  // namespace pccheck
