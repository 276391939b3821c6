// Persists in this process: some writers and one committer, each with threads of its own.
#pragma once

#include <vector>

#include "cpp/persister.h"
#include "cpp/writer_pool.h"

namespace pccheck {

class LocalPersister final : public Persister {
 public:
  // Throws std::invalid_argument for a number of threads that cannot be.
  explicit LocalPersister(unsigned writer_threads);

  void start(BlockQueue& full, Doorbell& pushed) override;
  void add(std::shared_ptr<Checkpoint> checkpoint) override;
  size_t in_flight() const override { return committer_.in_flight(); }
  CommitCounts counts() const override { return committer_.counts(); }
  bool wait_settled(Clock::time_point until) const override {
    return committer_.wait_settled(until);
  }
  bool link(const std::shared_ptr<Checkpoint>& checkpoint, uint32_t file, const std::string& from,
            const FileDigest& digest) override {
    return checkpoint->link(file, from, digest);
  }
  void look() override { committer_bell_.ring(); }
  std::exception_ptr refusal() const override { return committer_.outcome_unknown(); }
  std::optional<std::string> take_complaint() override { return committer_.take_complaint(); }

 private:
  const unsigned writer_threads_;
  Doorbell committer_bell_;
  std::optional<WriterPool> writers_;
  Committer committer_;
  std::vector<std::unique_ptr<WorkerThread>> threads_;  // last: they stop before what they use goes
};

}  // namespace pccheck
