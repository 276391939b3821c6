// The engine's parts without its threads: one thread calls the workers' run_one() in an order drawn
// from a seed. A worker that had nothing to do is called again only when its bell has rung since,
// as its thread would be: a ring that is missing shows as work left undone.
#pragma once

#include <array>
#include <memory>
#include <string>

#include "cpp/block.h"
#include "cpp/committer.h"
#include "cpp/local_persister.h"
#include "cpp/stager.h"
#include "cpp/writer_pool.h"
#include "tests/cpp/state.h"

namespace pccheck::test {

class HandRun {
 private:
  Doorbell stager_bell_, writer_bell_, committer_bell_;
  LocalPersister linker_{1};  // never started: it makes links, and that is all

 public:
  HandRun(size_t slots, size_t block_bytes, Copier& copier, uint64_t seed);

  StagingPool pool;
  BlockQueue full{writer_bell_, stager_bell_};
  const std::shared_ptr<Book> book = std::make_shared<Book>();
  Stager stager;
  WriterPool writers{full};
  Committer committer;

  // `finished` is called when the acknowledgement is given.
  std::shared_ptr<Checkpoint> begin(uint64_t step, std::shared_ptr<const Layout> layout,
                                    std::unique_ptr<Target> target,
                                    std::function<void(Checkpoint::State)> finished = {});

  // Lets one worker do one piece of work; false when none of them has any.
  bool step();
  void run();  // until none of them has any

 private:
  struct Seat {
    Worker* worker;
    const Doorbell* bell;
    uint64_t seen;
    bool idle;
  };

  bool call(Seat& seat);

  Random random_;
  std::array<Seat, 3> seats_;
};

inline Clock::time_point at_once() { return Clock::time_point{}; }
inline Clock::time_point in_a_minute() { return Clock::now() + std::chrono::minutes(1); }

std::exception_ptr error_saying(const std::string& text);
std::string text_of(const std::exception_ptr& error);  // "" for none

}  // namespace pccheck::test
