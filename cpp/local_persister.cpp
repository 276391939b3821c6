#include "cpp/local_persister.h"

#include <stdexcept>

namespace pccheck {
namespace {

constexpr unsigned kMaxWriters = 256;

}  // namespace

LocalPersister::LocalPersister(unsigned writer_threads) : writer_threads_(writer_threads) {
  if (writer_threads == 0 || writer_threads > kMaxWriters)
    throw std::invalid_argument("number of writer threads must be 1 to 256, not " +
                                std::to_string(writer_threads));
}

void LocalPersister::start(BlockQueue& full, Doorbell& pushed) {
  writers_.emplace(full);
  for (unsigned i = 0; i < writer_threads_; ++i)
    threads_.push_back(std::make_unique<WorkerThread>(*writers_, pushed, "pccheck-write"));
  threads_.push_back(std::make_unique<WorkerThread>(committer_, committer_bell_, "pccheck-commit"));
}

void LocalPersister::add(std::shared_ptr<Checkpoint> checkpoint) {
  committer_.add(std::move(checkpoint));
}

}  // namespace pccheck
