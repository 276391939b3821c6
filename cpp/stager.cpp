#include "cpp/stager.h"

#include <algorithm>
#include <cstring>

#include "cpp/crc32c.h"

namespace pccheck {
namespace {

// How much is handed to the copier at once: enough to hide the cost of a submission, little enough
// that a failure or a stop is noticed soon.
constexpr size_t kSubmissionBytes = size_t{2} << 20;

// How many full blocks may wait for a writer while nobody waits at a gate. Few, so that slots are
// used again, and written to the disk, while they are in the processor's caches; enough for the
// writers never to wait.
constexpr size_t kBlocksAhead = 2;

}  // namespace

Stager::Stager(StagingPool& pool, Copier& copier, BlockQueue& full, Unchanged unchanged)
    : pool_(pool), copier_(copier), full_(full), unchanged_(unchanged) {}

void Stager::add(std::shared_ptr<Checkpoint> checkpoint) {
  const std::lock_guard lock(mutex_);
  checkpoints_.push_back(std::move(checkpoint));
}

std::shared_ptr<Checkpoint> Stager::current() {
  const std::lock_guard lock(mutex_);
  return checkpoints_.empty() ? nullptr : checkpoints_.front();
}

void Stager::forget_current() {
  const std::lock_guard lock(mutex_);
  checkpoints_.pop_front();
}

bool Stager::run_one() noexcept {
  if (reap()) return true;
  const std::shared_ptr<Checkpoint> checkpoint = current();
  if (!checkpoint) return false;
  if (checkpoint->error()) return abandon(checkpoint);
  if (has_time(*checkpoint)) return false;
  try {
    if (stage_more(checkpoint)) return true;
  } catch (...) {
    checkpoint->fail(std::current_exception());
    return true;
  }
  if (!checkpoint->staging_ended()) return false;
  forget_current();
  return true;
}

// A device copies into memory, and while training goes on it has better to do than to wait. On
// processors an update is slowed by more than the time that staging takes from it: its threads wait
// for the last of them, operation by operation.
bool Stager::has_time(const Checkpoint& checkpoint) const {
  if (!copier_.sums_while_copying() || checkpoint.in_a_hurry()) return false;
  return full_.waiting() >= kBlocksAhead || checkpoint.leaves_time_to_update();
}

bool Stager::reap() {
  if (under_way_.empty()) return false;
  bool done = true;
  try {
    done = copier_.done(under_way_.front().number);
  } catch (...) {
    under_way_.front().checkpoint->fail(std::current_exception());
  }
  if (!done) return false;
  const Submission submission = std::move(under_way_.front());
  under_way_.pop_front();
  // Of a failed checkpoint nothing is looked at any more.
  if (submission.compared_bytes > 0 && comparison_)
    comparison_->take(submission.compared.bytes().first(submission.compared_bytes));
  complete(submission);
  return true;
}

void Stager::complete(const Submission& submission) {
  for (const Fill& fill : submission.fills) {
    if (submission.layout->files_of_layers()) digest(submission, fill);
    fill.block->filled += fill.bytes;
    if (fill.block->filled == fill.block->bytes) pass_on(fill.block);
  }
  if (submission.ends_layer) submission.checkpoint->layer_staged();
}

// Of what was stored, not of the sources: whatever happens to these, the two cannot differ. Copies
// end in the order of the file's bytes.
void Stager::digest(const Submission& submission, const Fill& fill) {
  const Block& block = *fill.block;
  const PayloadFile& file = submission.layout->files()[block.file - submission.first_file];
  if (!digesting_ || digesting_->checkpoint != submission.checkpoint.get() ||
      digesting_->file != block.file)
    digesting_.emplace(Digesting{submission.checkpoint.get(), block.file,
                                 FileDigester(file, submission.layout->block_bytes())});
  digesting_->digester.update(block.contents().subspan(fill.begin, fill.bytes));
  if (digesting_->digester.bytes() < file.size_bytes) return;
  submission.checkpoint->digested(block.file, digesting_->digester.finish());
  digesting_.reset();
}

void Stager::pass_on(Block* block) {
  const auto found = std::find_if(open_.begin(), open_.end(),
                                  [&](const auto& owned) { return owned.get() == block; });
  std::unique_ptr<Block> full = std::move(*found);
  open_.erase(found);
  full->checkpoint->block_full();
  full_.push(std::move(full));
}

// After a failure. Blocks are let go only once no copy into them is under way.
bool Stager::abandon(const std::shared_ptr<Checkpoint>& checkpoint) {
  if (!under_way_.empty()) return false;
  open_.clear();
  digesting_.reset();
  comparison_.reset();
  layer_.reset();
  forget_current();
  checkpoint->stop_staging();
  return true;
}

bool Stager::stage_more(const std::shared_ptr<Checkpoint>& checkpoint) {
  if (!layer_ && !begin_layer(checkpoint)) return false;
  if (comparison_) return compare(checkpoint);
  if (header_file_ < layer_->plan->files.size()) return stage_headers(checkpoint);
  return submit(checkpoint);
}

bool Stager::begin_layer(const std::shared_ptr<Checkpoint>& checkpoint) {
  layer_ = checkpoint->next_layer();
  if (!layer_) return false;
  run_ = 0;
  run_done_ = 0;
  header_file_ = 0;
  header_block_ = 0;
  linked_.clear();
  if (layer_->layout->files_of_layers() && unchanged_.book != nullptr)
    comparison_.emplace(*layer_, unchanged_.book->newest());
  return true;
}

bool Stager::compare(const std::shared_ptr<Checkpoint>& checkpoint) {
  if (comparison_->over())
    link_equal(checkpoint);
  else if (!copier_.sources_are_readable())
    return compare_in_slot(checkpoint);
  else
    comparison_->take(comparison_->next(kSubmissionBytes));
  return true;
}

// What a device holds is copied to a slot to be looked at, which is free again at once.
bool Stager::compare_in_slot(const std::shared_ptr<Checkpoint>& checkpoint) {
  if (!comparison_->has_next()) return false;  // until a copy under way has ended
  std::optional<SlotLease> slot = pool_.try_acquire();
  if (!slot) return false;
  pieces_.clear();
  size_t bytes = 0;
  while (bytes < pool_.slot_bytes() && comparison_->has_next()) {
    const std::span<const std::byte> piece = comparison_->next(pool_.slot_bytes() - bytes);
    pieces_.push_back({piece.data(), slot->bytes().data() + bytes, piece.size(), nullptr});
    bytes += piece.size();
  }
  Submission submission{0, checkpoint, layer_->layout, layer_->first_file, {}, false};
  submission.compared = std::move(*slot);
  submission.compared_bytes = bytes;
  submission.number = copier_.submit(pieces_, layer_->hand_over->ready.get());
  under_way_.push_back(std::move(submission));
  return true;
}

void Stager::link_equal(const std::shared_ptr<Checkpoint>& checkpoint) {
  for (const Comparison::Equal& equal : comparison_->equal())
    if (link(checkpoint, equal))
      linked_.push_back(equal.file);
    else if (!checkpoint->error())
      links_refused_.fetch_add(1, std::memory_order_relaxed);
  comparison_.reset();
}

bool Stager::link(const std::shared_ptr<Checkpoint>& checkpoint, const Comparison::Equal& equal) {
  const PayloadFile& file = layer_->layout->files()[equal.file];
  std::shared_ptr<const Base> base = comparison_->base();
  while (!unchanged_.persister->link(checkpoint, layer_->first_file + equal.file, base->checkpoint,
                                     equal.digest)) {
    // Retired, perhaps, for a newer one that has the same file.
    const std::shared_ptr<const Base> newest = unchanged_.book->newest();
    if (newest == base) return false;
    base = newest;
    const auto found = base->files.find(file.name);
    if (found == base->files.end() || found->second.size_bytes != file.size_bytes ||
        found->second.digest.whole != equal.digest.whole)
      return false;
  }
  return true;
}

bool Stager::is_linked(uint32_t file) const {
  return std::find(linked_.begin(), linked_.end(), file) != linked_.end();
}

// Blocks that hold nothing but header: no tensor will ever open them.
bool Stager::stage_headers(const std::shared_ptr<Checkpoint>& checkpoint) {
  const Layout& layout = *layer_->layout;
  const std::vector<uint32_t>& files = layer_->plan->files;
  bool pushed = false;
  for (; header_file_ < files.size(); ++header_file_, header_block_ = 0) {
    const uint32_t number = files[header_file_];
    if (is_linked(number)) continue;
    const PayloadFile& file = layout.files()[number];
    for (; header_block_ < layout.block_count(number); ++header_block_) {
      const uint64_t begin = layout.block_offset(number, header_block_);
      const size_t bytes = layout.block_size(number, header_block_);
      if (begin + bytes > file.data_begin()) break;
      std::optional<SlotLease> slot = pool_.try_acquire();
      if (!slot) return pushed;
      auto block = std::make_unique<Block>(checkpoint, layer_->first_file + number, header_block_,
                                           bytes, std::move(*slot));
      std::memcpy(block->contents().data(), file.header.data() + begin, bytes);
      block->crc = crc32c(0, block->contents());
      block->filled = block->summed = bytes;
      full_.push(std::move(block));
      pushed = true;
    }
    if (layout.files_of_layers() && file.data_begin() == file.size_bytes)
      checkpoint->digested(layer_->first_file + number,
                           FileDigester(file, layout.block_bytes()).finish());
  }
  return true;
}

Block* Stager::open_block(const std::shared_ptr<Checkpoint>& checkpoint, const Run& run,
                          uint64_t at) {
  const Layout& layout = *layer_->layout;
  const PayloadFile& file = layout.files()[run.file];
  const uint32_t file_index = layer_->first_file + run.file;
  const uint64_t index = (at - file.grid_begin) / layout.block_bytes();
  for (const std::unique_ptr<Block>& block : open_)
    if (block->file == file_index && block->index == index) return block.get();
  std::optional<SlotLease> slot = pool_.try_acquire();
  if (!slot) return nullptr;
  const uint64_t begin = layout.block_offset(run.file, index);
  open_.push_back(std::make_unique<Block>(checkpoint, file_index, index,
                                          layout.block_size(run.file, index), std::move(*slot)));
  Block* block = open_.back().get();
  if (file.grid_begin == 0 && begin < file.data_begin()) {
    const size_t bytes = file.data_begin() - begin;
    std::memcpy(block->contents().data(), file.header.data() + begin, bytes);
    block->crc = crc32c(0, block->contents().first(bytes));
    block->filled = block->summed = bytes;
  }
  return block;
}

bool Stager::submit(const std::shared_ptr<Checkpoint>& checkpoint) {
  const std::vector<Run>& runs = layer_->plan->runs;
  Submission submission{0, checkpoint, layer_->layout, layer_->first_file, {}, false};
  pieces_.clear();
  size_t bytes = 0;
  bool out_of_slots = false;
  while (run_ < runs.size() && bytes < kSubmissionBytes) {
    const Run& run = runs[run_];
    if (is_linked(run.file)) {
      ++run_;
      continue;
    }
    const uint64_t at = run.begin + run_done_;
    Block* block = open_block(checkpoint, run, at);
    if (block == nullptr) {
      out_of_slots = true;
      break;
    }
    const uint64_t block_begin = layer_->layout->block_offset(run.file, block->index);
    const size_t in_block = static_cast<size_t>(at - block_begin);
    const size_t part =
        static_cast<size_t>(std::min<uint64_t>(run.bytes - run_done_, block->bytes - in_block));
    block->in_sequence = block->in_sequence && in_block == block->summed;
    uint32_t* crc = nullptr;
    if (block->in_sequence && copier_.sums_while_copying()) {
      crc = &block->crc;
      block->summed += part;
    }
    pieces_.push_back({layer_->hand_over->sources[run.source].data + run.source_offset + run_done_,
                       block->contents().data() + in_block, part, crc});
    submission.fills.push_back({block, in_block, part});
    bytes += part;
    run_done_ += part;
    if (run_done_ == run.bytes) {
      ++run_;
      run_done_ = 0;
    }
    // What is copied here and now is passed on as soon as there is a block of it.
    if (copier_.sums_while_copying() && in_block + part == block->bytes) break;
  }
  if (pieces_.empty() && out_of_slots) return false;
  submission.ends_layer = run_ == runs.size();
  submission.number = copier_.submit(pieces_, layer_->hand_over->ready.get());
  under_way_.push_back(std::move(submission));
  if (run_ == runs.size()) layer_.reset();
  return true;
}

}  // namespace pccheck
