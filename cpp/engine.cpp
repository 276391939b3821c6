#include "cpp/engine.h"

#include <stdexcept>

namespace pccheck {
namespace {

constexpr unsigned kUnsparedAfterAHurry = 16;

EngineOptions checked(EngineOptions options) {
  if (options.max_in_flight == 0)
    throw std::invalid_argument("number of checkpoints in flight must be at least 1");
  return options;
}

}  // namespace

Engine::Engine(EngineOptions options, std::unique_ptr<Copier> copier,
               std::unique_ptr<SlotMemory> memory, std::unique_ptr<Persister> persister,
               std::shared_ptr<Book> book)
    : options_(checked(options)),
      pool_(std::move(memory), options_.block_bytes, [this] { stager_bell_.ring(); }),
      copier_(std::move(copier)),
      book_(std::move(book)),
      stager_(pool_, *copier_, full_, {persister.get(), book_.get()}),
      persister_(std::move(persister)),
      thread_(std::make_unique<WorkerThread>(stager_, stager_bell_, "pccheck-stage")) {
  persister_->start(full_, persister_bell_);
}

Engine::~Engine() {
  abandon_unsealed();
  wait_idle(Clock::time_point::max());
  thread_.reset();
}

void Engine::abandon_unsealed() {
  if (newest_ && newest_->awaits_seal())
    newest_->fail(std::make_exception_ptr(
        std::runtime_error("checkpoint " + newest_->name() + " was never sealed")));
}

bool Engine::wait_room(Clock::time_point until) const {
  std::unique_lock lock(mutex_);
  return progress_.wait_until(lock, until,
                              [&] { return persister_->in_flight() < options_.max_in_flight; });
}

bool Engine::wait_idle(Clock::time_point until) const {
  std::unique_lock lock(mutex_);
  return progress_.wait_until(lock, until, [&] { return persister_->in_flight() == 0; });
}

bool Engine::wait_settled(Clock::time_point until) const {
  return wait_idle(until) && persister_->wait_settled(until);
}

std::shared_ptr<Checkpoint> Engine::begin(Identity identity, std::string name,
                                          std::shared_ptr<const Layout> layout,
                                          std::unique_ptr<Target> target, bool during_update) {
  if (const std::exception_ptr refusal = persister_->refusal()) std::rethrow_exception(refusal);
  if (newest_ && newest_->awaits_seal())
    throw std::logic_error("checkpoint " + newest_->name() + " is not sealed yet");
  if (persister_->in_flight() >= options_.max_in_flight)
    throw std::logic_error("there is no room for one more checkpoint in flight");
  if (layout->block_bytes() != options_.block_bytes)
    throw std::invalid_argument("the layout was made for another block size");
  if (pool_.slot_count() <= layout->open_blocks())
    throw std::invalid_argument(
        "staging memory of " + std::to_string(staging_bytes()) + " bytes holds " +
        std::to_string(pool_.slot_count()) + " blocks of " + std::to_string(options_.block_bytes) +
        "; this state needs at least " + std::to_string(layout->open_blocks() + 1));
  if (unspared_ > 0) --unspared_;
  if (newest_ && newest_->in_a_hurry()) unspared_ = kUnsparedAfterAHurry;
  newest_ = std::make_shared<Checkpoint>(
      identity, std::move(name), std::move(layout), std::move(target),
      Checkpoint::Bells{[this] { stager_bell_.ring(); }, [this] { something_ended(); }}, book_);
  const bool on_processors = copier_->sums_while_copying();  // a device copies at no cost to it
  if (during_update && on_processors && unspared_ == 0) newest_->update_began();
  persister_->add(newest_);
  stager_.add(newest_);
  // One that failed before the stager knew of it rang for nothing.
  if (newest_->error()) stager_bell_.ring();
  return newest_;
}

void Engine::something_ended() {
  persister_->look();
  {
    const std::lock_guard lock(mutex_);
  }  // whoever looked before the change is waiting by now
  progress_.notify_all();
}

}  // namespace pccheck
