#include "cpp/comparison.h"

#include <algorithm>

namespace pccheck {

Comparison::Comparison(const Checkpoint::Work& work, std::shared_ptr<const Base> base)
    : work_(work), base_(std::move(base)) {
  equal_.reserve(work.plan->files.size());  // take() must not allocate
  if (base_) begin_file();
}

void Comparison::begin_file() {
  digester_.reset();
  for (; at_ < work_.plan->files.size(); ++at_) {
    const uint32_t number = work_.plan->files[at_];
    const PayloadFile& file = work_.layout->files()[number];
    const auto found = base_->files.find(file.name);
    if (found == base_->files.end() || found->second.size_bytes != file.size_bytes) continue;
    known_ = &found->second;
    digester_.emplace(file, work_.layout->block_bytes());
    asked_ = digester_->bytes();
    // Runs stand in the order of the files.
    while (run_ < work_.plan->runs.size() && work_.plan->runs[run_].file < number) ++run_;
    run_done_ = 0;
    decide();
    return;
  }
}

void Comparison::end_file() {
  ++at_;
  begin_file();
}

void Comparison::decide() {
  const uint32_t number = work_.plan->files[at_];
  const FileDigest& known = known_->digest;
  const bool begun = digester_->bytes() == digester_->beginning_bytes();
  const bool ended = digester_->bytes() == work_.layout->files()[number].size_bytes;
  if (!begun && !ended) return;
  const FileDigest found = digester_->finish();
  if (ended && found.whole == known.whole) equal_.push_back({number, found});
  if (ended || (known.beginning && *known.beginning != found.beginning)) end_file();
}

bool Comparison::has_next() const {
  if (!digester_ || asked_ == work_.layout->files()[work_.plan->files[at_]].size_bytes)
    return false;
  // The beginning may say it all.
  return asked_ != digester_->beginning_bytes() || digester_->bytes() == asked_;
}

std::span<const std::byte> Comparison::next(size_t at_most) {
  const Run& run = work_.plan->runs[run_];
  const uint64_t beginning = digester_->beginning_bytes();
  uint64_t part = std::min<uint64_t>(at_most, run.bytes - run_done_);
  if (asked_ < beginning) part = std::min(part, beginning - asked_);
  const std::byte* const from =
      work_.hand_over->sources[run.source].data + run.source_offset + run_done_;
  asked_ += part;
  run_done_ += part;
  if (run_done_ == run.bytes) {
    ++run_;
    run_done_ = 0;
  }
  return {from, static_cast<size_t>(part)};
}

void Comparison::take(std::span<const std::byte> contents) noexcept {
  digester_->update(contents);
  decide();
}

}  // namespace pccheck
