// The part of a checkpoint's life that incremental saves add: files that are linked instead of
// staged, and what is known of the others for the next one.
#include "cpp/checkpoint.h"

namespace pccheck {

bool Checkpoint::may_link(uint32_t file) const {
  const std::lock_guard lock(mutex_);
  if (file >= files_.size()) return false;
  const FileState& state = *files_[file];
  return !state.linked && state.blocks_left == state.block_sums.size();
}

bool Checkpoint::link(uint32_t index, const std::string& from, const FileDigest& digest) {
  if (error() || !may_link(index)) return false;
  FileState& state = state_of(index);
  std::optional<std::vector<uint32_t>> sums;
  {
    const std::lock_guard lock(open_mutex_);
    sums = target_->link(*state.layout, state.layout->files()[state.index_in_layout], from,
                         digest.whole);
  }
  if (!sums) return false;
  const std::lock_guard lock(mutex_);
  state.block_sums = std::move(*sums);
  mark_linked(state, digest);
  return true;
}

void Checkpoint::linked_elsewhere(uint32_t file, const FileDigest& digest) {
  FileState& state = state_of(file);
  const std::lock_guard lock(mutex_);
  mark_linked(state, digest);
}

void Checkpoint::mark_linked(FileState& file, const FileDigest& digest) {
  file.linked = file.synced = true;
  file.blocks_left = 0;
  file.digest = digest;
  linked_bytes_ += file.layout->files()[file.index_in_layout].size_bytes;
}

void Checkpoint::digested(uint32_t file, const FileDigest& digest) {
  FileState& state = state_of(file);
  const std::lock_guard lock(mutex_);
  state.digest = digest;
}

std::vector<std::pair<uint32_t, Digest>> Checkpoint::digests() const {
  const std::lock_guard lock(mutex_);
  std::vector<std::pair<uint32_t, Digest>> found;
  for (uint32_t i = 0; i < files_.size(); ++i)
    if (files_[i]->digest && !files_[i]->linked) found.emplace_back(i, files_[i]->digest->whole);
  return found;
}

// Null where nothing is known of any file, as of a checkpoint that is not incremental.
std::shared_ptr<const Base> Checkpoint::as_base() const {
  auto base = std::make_shared<Base>(Base{name_, {}});
  for (const auto& file : files_) {
    if (!file->digest) continue;
    const PayloadFile& plan = file->layout->files()[file->index_in_layout];
    base->files.emplace(plan.name, Base::KnownFile{plan.size_bytes, *file->digest});
  }
  return base->files.empty() ? nullptr : base;
}

}  // namespace pccheck
