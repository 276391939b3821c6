#include "tests/cpp/hand_run.h"

#include <algorithm>

#include "cpp/run_directory.h"

namespace pccheck::test {

HandRun::HandRun(size_t slots, size_t block_bytes, Copier& copier, uint64_t seed)
    : pool(allocate_host_slots(slots * block_bytes), block_bytes, [this] { stager_bell_.ring(); }),
      stager(pool, copier, full, {&linker_, book.get()}),
      random_(seed),
      seats_{{{&stager, &stager_bell_, 0, false},
              {&writers, &writer_bell_, 0, false},
              {&committer, &committer_bell_, 0, false}}} {}

std::shared_ptr<Checkpoint> HandRun::begin(uint64_t step, std::shared_ptr<const Layout> layout,
                                           std::unique_ptr<Target> target,
                                           std::function<void(Checkpoint::State)> finished) {
  auto self = std::make_shared<std::weak_ptr<Checkpoint>>();
  const auto changed = [this, self, finished = std::move(finished), told = false]() mutable {
    committer_bell_.ring();
    const auto ticket = self->lock();
    if (told || !finished || !ticket || ticket->state() == Checkpoint::State::in_flight) return;
    told = true;
    finished(ticket->state());
  };
  auto ticket = std::make_shared<Checkpoint>(
      identity_of(step), name_of_step(step), std::move(layout), std::move(target),
      Checkpoint::Bells{[this] { stager_bell_.ring(); }, changed}, book);
  *self = ticket;
  committer.add(ticket);
  stager.add(ticket);
  return ticket;
}

bool HandRun::call(Seat& seat) {
  const uint64_t rings = seat.bell->rings();
  if (seat.idle && rings == seat.seen && !seat.worker->awaits_outside()) return false;
  seat.seen = rings;
  seat.idle = !seat.worker->run_one();
  return !seat.idle;
}

bool HandRun::step() {
  std::ranges::shuffle(seats_, random_);
  return std::ranges::any_of(seats_, [&](Seat& seat) { return call(seat); });
}

void HandRun::run() {
  while (step()) {
  }
}

std::exception_ptr error_saying(const std::string& text) {
  return std::make_exception_ptr(std::runtime_error(text));
}

std::string text_of(const std::exception_ptr& error) {
  if (!error) return "";
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& caught) {
    return caught.what();
  }
}

}  // namespace pccheck::test
