#include "cpp/checkpoint.h"

#include <stdexcept>

namespace pccheck {
Checkpoint::Checkpoint(Identity identity, std::string name, std::shared_ptr<const Layout> layout,
                       std::unique_ptr<Target> target, Bells bells, std::shared_ptr<Book> book)
    : identity_(identity),
      name_(std::move(name)),
      layout_(std::move(layout)),
      target_(std::move(target)),
      bells_(std::move(bells)),
      book_(std::move(book)),
      handed_over_(layout_->layers().size()) {
  add_files(*layout_);
}

void Checkpoint::add_files(const Layout& layout) {
  for (uint32_t i = 0; i < layout.files().size(); ++i) {
    const uint64_t blocks = layout.block_count(i);
    files_.push_back(
        std::make_unique<FileState>(FileState{.layout = &layout,
                                              .index_in_layout = i,
                                              .blocks_left = blocks,
                                              .synced = blocks == 0,
                                              .block_sums = std::vector<uint32_t>(blocks)}));
  }
}

size_t Checkpoint::layer_count() const { return handed_over_.size(); }

void Checkpoint::require_fit(const std::string& what, const LayerPlan& plan,
                             const HandOver& hand_over) const {
  const std::vector<uint64_t>& expected = plan.source_bytes;
  if (hand_over.sources.size() != expected.size())
    throw std::invalid_argument(what + " of checkpoint " + name_ + " has " +
                                std::to_string(expected.size()) + " tensors, not " +
                                std::to_string(hand_over.sources.size()));
  for (size_t i = 0; i < expected.size(); ++i)
    if (hand_over.sources[i].bytes != expected[i])
      throw std::invalid_argument("tensor " + std::to_string(i) + " of " + what +
                                  " of checkpoint " + name_ + " has " +
                                  std::to_string(hand_over.sources[i].bytes) + " bytes, not " +
                                  std::to_string(expected[i]));
}

void Checkpoint::hand_over(size_t layer, HandOver hand_over) {
  {
    const std::lock_guard lock(mutex_);
    if (layer >= layout_->layers().size() || sealed_)
      throw std::invalid_argument("checkpoint " + name_ + " takes no layer " +
                                  std::to_string(layer) + " now");
    if (handed_over_[layer])
      throw std::invalid_argument("layer " + std::to_string(layer) + " of checkpoint " + name_ +
                                  " was handed over already");
    require_fit("layer " + std::to_string(layer), layout_->layers()[layer], hand_over);
    if (error_) return;
    handed_over_[layer] = std::move(hand_over);
    // A wake-up for nothing would take from the update what is to be spared.
    if (updating_ && has_full_block_) return;
  }
  bells_.stager();
}

void Checkpoint::seal(std::vector<std::byte> manifest, std::optional<Addition> addition) {
  {
    const std::lock_guard lock(mutex_);
    if (sealed_) throw std::logic_error("checkpoint " + name_ + " was sealed already");
    if (!error_)
      for (size_t layer = 0; layer < handed_over_.size(); ++layer)
        if (!handed_over_[layer])
          throw std::logic_error("checkpoint " + name_ + " cannot be sealed: layer " +
                                 std::to_string(layer) + " was never handed over");
    if (addition) require_fit(*addition);
    sealed_ = true;
    updating_ = false;
    if (error_) return;  // nobody waits for it; the engine may have ended with the checkpoint
    manifest_ = std::move(manifest);
    if (addition) {
      add_layout(std::move(addition->layout));
      handed_over_.push_back(std::move(addition->hand_over));
    }
  }
  bells_.stager();
  bells_.committer();
}

size_t Checkpoint::add(Addition addition) {
  size_t layer;
  {
    const std::lock_guard lock(mutex_);
    if (sealed_)
      throw std::invalid_argument("checkpoint " + name_ + " is sealed and takes nothing more");
    require_fit(addition);
    layer = handed_over_.size();
    handed_over_.emplace_back();
    add_layout(std::move(addition.layout));
    if (error_) return layer;
    handed_over_[layer] = std::move(addition.hand_over);
  }
  bells_.stager();
  return layer;
}

void Checkpoint::require_fit(const Addition& addition) const {
  if (addition.layout->layers().size() != 1 ||
      addition.layout->block_bytes() != layout_->block_bytes())
    throw std::invalid_argument("what is added to checkpoint " + name_ +
                                " must be one layer in blocks of the same size");
  require_fit("the addition", addition.layout->layers()[0], addition.hand_over);
}

void Checkpoint::add_layout(std::shared_ptr<const Layout> layout) {
  const auto first_file = static_cast<uint32_t>(files_.size());
  add_files(*layout);
  added_.push_back({std::move(layout), first_file});
}

void Checkpoint::update_began() {
  const std::lock_guard lock(mutex_);
  updating_ = true;
}

void Checkpoint::update_ended() {
  {
    const std::lock_guard lock(mutex_);
    if (!updating_ || error_) return;
    updating_ = false;
  }
  bells_.stager();
}

void Checkpoint::fail(std::exception_ptr error) {
  {
    const std::lock_guard lock(mutex_);
    if (error_ || publishing_ || state_ != State::in_flight) return;
    error_ = std::move(error);
  }
  progress_.notify_all();
  bells_.stager();
  bells_.committer();
}

bool Checkpoint::awaits_seal() const {
  const std::lock_guard lock(mutex_);
  return !sealed_ && !error_;
}

template <typename Condition>
bool Checkpoint::wait_at_gate(Clock::time_point until, Condition staged) {
  {
    const std::lock_guard lock(mutex_);
    if (staged()) return true;
    if (until <= Clock::now()) return false;
    if (!error_) hurry_ = true;  // what has failed is let go of as soon as can be anyway
  }
  bells_.stager();
  std::unique_lock lock(mutex_);
  return progress_.wait_until(lock, until, staged);
}

bool Checkpoint::wait_staged(size_t layer, Clock::time_point until) {
  return wait_at_gate(until, [&] {
    // After a failure the sources may still be read until the stager has let go of them.
    return layers_staged_ > layer || staging_stopped_ || state_ != State::in_flight;
  });
}

bool Checkpoint::wait_all_staged(Clock::time_point until) {
  return wait_at_gate(until, [&] {
    return (sealed_ && layers_staged_ == layer_count()) || staging_stopped_ ||
           state_ != State::in_flight;
  });
}

bool Checkpoint::in_a_hurry() const {
  const std::lock_guard lock(mutex_);
  return hurry_;
}

void Checkpoint::open_gate(size_t layer) {
  {
    // The committer reads the same watch before it publishes: what was found here has to be known
    // before it can look.
    const std::lock_guard lock(mutex_);
    if (layer >= handed_over_.size() || !handed_over_[layer]) return;
    const SourceWatch* watch = std::exchange(handed_over_[layer]->watch, nullptr);
    if (watch == nullptr || error_ || publishing_ || state_ != State::in_flight) return;
    const std::string moved = watch->changed();
    if (moved.empty()) return;
    error_ = std::make_exception_ptr(std::runtime_error(moved));
  }
  progress_.notify_all();
  bells_.stager();
  bells_.committer();
}

void Checkpoint::begin_publishing() {
  const std::lock_guard lock(mutex_);
  if (error_) std::rethrow_exception(error_);
  for (const std::optional<HandOver>& layer : handed_over_) {
    if (!layer || layer->watch == nullptr) continue;
    if (const std::string moved = layer->watch->changed(); !moved.empty())
      throw std::runtime_error(moved);
  }
  publishing_ = true;
}

bool Checkpoint::wait_finished(Clock::time_point until) const {
  std::unique_lock lock(mutex_);
  return progress_.wait_until(lock, until, [&] { return state_ != State::in_flight; });
}

Checkpoint::State Checkpoint::state() const {
  const std::lock_guard lock(mutex_);
  return state_;
}

std::exception_ptr Checkpoint::error() const {
  const std::lock_guard lock(mutex_);
  return error_;
}

double Checkpoint::durable_seconds() const {
  const std::lock_guard lock(mutex_);
  return std::chrono::duration<double>(published_ - begun_).count();
}

uint64_t Checkpoint::payload_bytes() const {
  const std::lock_guard lock(mutex_);
  uint64_t bytes = layout_->total_bytes();
  for (const Added& added : added_) bytes += added.layout->total_bytes();
  return bytes;
}

uint64_t Checkpoint::written_bytes() const {
  const std::lock_guard lock(mutex_);
  return written_bytes_;
}

uint64_t Checkpoint::linked_bytes() const {
  const std::lock_guard lock(mutex_);
  return linked_bytes_;
}

std::optional<Checkpoint::Work> Checkpoint::next_layer() {
  const std::lock_guard lock(mutex_);
  if (error_ || layers_taken_ == handed_over_.size() || !handed_over_[layers_taken_])
    return std::nullopt;
  const size_t layer = layers_taken_++;
  HandOver* hand_over = &*handed_over_[layer];
  const size_t own = layout_->layers().size();
  if (layer < own) return Work{&layout_->layers()[layer], layout_.get(), 0, hand_over};
  const Added& added = added_[layer - own];
  return Work{&added.layout->layers()[0], added.layout.get(), added.first_file, hand_over};
}

void Checkpoint::block_full() {
  const std::lock_guard lock(mutex_);
  has_full_block_ = true;
}

bool Checkpoint::leaves_time_to_update() const {
  const std::lock_guard lock(mutex_);
  return updating_ && has_full_block_;
}

void Checkpoint::layer_staged() {
  bool last;
  {
    const std::lock_guard lock(mutex_);
    ++layers_staged_;
    last = sealed_ && layers_staged_ == layer_count();
  }
  progress_.notify_all();
  if (last) bells_.committer();
}

bool Checkpoint::staging_ended() const {
  const std::lock_guard lock(mutex_);
  return sealed_ && layers_staged_ == layer_count();
}

void Checkpoint::stop_staging() {
  {
    const std::lock_guard lock(mutex_);
    staging_stopped_ = true;
  }
  progress_.notify_all();
  bells_.committer();
}

void Checkpoint::block_opened() {
  const std::lock_guard lock(mutex_);
  ++blocks_alive_;
}

void Checkpoint::block_gone() {
  bool last;
  {
    const std::lock_guard lock(mutex_);
    last = --blocks_alive_ == 0;
  }
  if (last) bells_.committer();
}

// The vector may grow, the states stay where they are.
Checkpoint::FileState& Checkpoint::state_of(uint32_t file) const {
  const std::lock_guard lock(mutex_);
  return *files_.at(file);
}

File& Checkpoint::file(uint32_t index) {
  FileState& state = state_of(index);
  const std::lock_guard lock(open_mutex_);
  if (!state.file) state.file = target_->open(state.layout->files()[state.index_in_layout]);
  return *state.file;
}

void Checkpoint::write_block(uint32_t index, uint64_t block, std::span<const std::byte> bytes,
                             uint32_t crc) {
  const Layout* layout;
  uint32_t in_layout;
  {
    const std::lock_guard lock(mutex_);
    layout = files_[index]->layout;
    in_layout = files_[index]->index_in_layout;
  }
  File& opened = file(index);
  opened.pwrite(bytes, layout->block_offset(in_layout, block));
  {
    const std::lock_guard lock(mutex_);
    files_[index]->block_sums[block] = crc;
    written_bytes_ += bytes.size();
    if (--files_[index]->blocks_left > 0) return;
  }
  opened.sync_data();
  FileState& state = state_of(index);
  if (!target_->publishes_open_files()) {
    const std::lock_guard lock(open_mutex_);
    state.file.reset();
    state.closed = true;
  }
  const std::lock_guard lock(mutex_);
  state.synced = true;
}

bool Checkpoint::manifest_is_due() const {
  const std::lock_guard lock(mutex_);
  return sealed_ && !error_ && !manifest_is_durable_;
}

void Checkpoint::persist_manifest() {
  std::unique_ptr<File> file;
  {
    const std::lock_guard lock(open_mutex_);
    file = target_->open_manifest(manifest_.size());  // nobody changes it once it is due
  }
  if (file) {
    file->pwrite(manifest_, 0);
    file->sync_data();
  }
  const std::lock_guard lock(mutex_);
  manifest_is_durable_ = true;
}

bool Checkpoint::ready_to_publish() const {
  const std::lock_guard lock(mutex_);
  // Without blocks: whoever hears of the commit finds every slot free.
  if (error_ || state_ != State::in_flight || !manifest_is_durable_ ||
      layers_staged_ != layer_count() || blocks_alive_ != 0)
    return false;
  for (const auto& file : files_)
    if (!file->synced) return false;
  return true;
}

bool Checkpoint::ready_to_discard() const {
  const std::lock_guard lock(mutex_);
  // What failed after it was staged whole is none of the stager's business any more.
  const bool staging_over = staging_stopped_ || (sealed_ && layers_staged_ == layer_count());
  return error_ && state_ == State::in_flight && staging_over && blocks_alive_ == 0;
}

void Checkpoint::publish() {
  std::vector<PersistedFile> files;
  for (uint32_t i = 0; i < files_.size(); ++i) {
    FileState& state = *files_[i];
    // Opens one that has no block too.
    File* const opened = state.linked || state.closed ? nullptr : &file(i);
    files.push_back({state.layout, &state.layout->files()[state.index_in_layout], opened,
                     std::move(state.block_sums)});
    if (state.digest) files.back().digest = state.digest->whole;
  }
  const std::shared_ptr<const Base> base = book_ ? as_base() : nullptr;
  begin_publishing();
  try {
    target_->publish(identity_, files, manifest_);
  } catch (...) {
    const std::lock_guard lock(mutex_);
    publishing_ = false;
    throw;
  }
  // Before the acknowledgement: who has heard of it finds it in the book.
  if (base) book_->enter(base);
  const std::lock_guard lock(mutex_);
  published_ = Clock::now();
}

void Checkpoint::discard() {
  files_.clear();  // closes: a directory that is removed must not keep its blocks
  // Taken out, here and in retire(): a ticket that outlives the run must not hold its lock.
  const std::unique_ptr<Target> target = std::move(target_);
  target->discard();
}

void Checkpoint::retire() {
  const std::unique_ptr<Target> target = std::move(target_);
  target->retire();
}

void Checkpoint::end(State state) {
  const std::lock_guard lock(mutex_);
  state_ = state;
}

void Checkpoint::announce_end() {
  // A finished ticket may live long; what it holds of the save need not. Closed outside the lock.
  std::vector<std::unique_ptr<FileState>> files;
  {
    const std::lock_guard lock(mutex_);
    files.swap(files_);
    manifest_ = {};
  }
  progress_.notify_all();
  bells_.committer();
}

void Checkpoint::extend(std::shared_ptr<const Layout> layout) {
  const std::lock_guard lock(mutex_);
  if (sealed_) throw std::logic_error("checkpoint " + name_ + " takes no more files now");
  add_layout(std::move(layout));
}

bool Checkpoint::has_file(uint32_t file) const {
  const std::lock_guard lock(mutex_);
  return file < files_.size();
}

bool Checkpoint::has_block(uint32_t file, uint64_t block, uint64_t bytes) const {
  const std::lock_guard lock(mutex_);
  if (file >= files_.size()) return false;
  const FileState& state = *files_[file];
  return !state.linked && block < state.block_sums.size() &&
         state.layout->block_size(state.index_in_layout, block) == bytes;
}

std::vector<std::shared_ptr<const Layout>> Checkpoint::additions() const {
  const std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<const Layout>> layouts;
  for (const Added& added : added_) layouts.push_back(added.layout);
  return layouts;
}

std::span<const std::byte> Checkpoint::manifest() const {
  const std::lock_guard lock(mutex_);
  return manifest_;  // of a sealed checkpoint: nobody changes it before the end
}

void Checkpoint::block_written_elsewhere(uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  written_bytes_ += bytes;
}

void Checkpoint::published_elsewhere() {
  const std::lock_guard lock(mutex_);
  if (const std::shared_ptr<const Base> base = book_ ? as_base() : nullptr) book_->enter(base);
  published_ = Clock::now();
}

void Checkpoint::failed_elsewhere(std::exception_ptr error) {
  {
    // In one piece: publishing must not begin in between.
    const std::lock_guard lock(mutex_);
    publishing_ = false;
    if (error_ || state_ != State::in_flight) return;
    error_ = std::move(error);
  }
  progress_.notify_all();
  bells_.stager();
  bells_.committer();
}

}  // namespace pccheck
