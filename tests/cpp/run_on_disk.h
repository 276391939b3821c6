// A run's directory, on a disk in memory or a real one, and whole checkpoints saved to it by hand.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "cpp/run_directory.h"
#include "tests/cpp/hand_run.h"
#include "tests/cpp/memory_disk.h"
#include "tests/cpp/temp_dir.h"

namespace pccheck::test {

using Ticket = std::shared_ptr<Checkpoint>;

inline const Bytes kManifest = to_bytes(R"({"a":"manifest"})");

struct RunOnDisk : MemoryDisk {
  explicit RunOnDisk(RunDirectory::Options options = {.keep_last = 0, .max_spares = 2})
      : options(options) {
    reopen();
  }

  // As a new process would.
  void reopen() {
    run.reset();
    std::unique_ptr<Directory> directory = root();
    std::unique_ptr<File> lock = directory->try_lock_file(kLockName);
    run = std::make_shared<RunDirectory>(std::move(directory), std::move(lock), options);
  }

  std::unique_ptr<Target> target(uint64_t step) {
    return make_directory_target(run, name_of_step(step));
  }

  static std::string path(uint64_t step) { return std::string(kRoot) + "/" + name_of_step(step); }

  std::vector<std::string> directories() const {
    std::vector<std::string> found = names(kRoot);
    std::erase(found, kLockName);
    return found;
  }

  // "<file>@<offset>" of every pwrite so far.
  std::vector<std::string> writes() const {
    std::vector<std::string> found;
    for (const Operation& operation : log())
      if (operation.call == "pwrite")
        found.push_back(operation.path.substr(operation.path.rfind('/') + 1) + "@" +
                        std::to_string(operation.offset));
    return found;
  }

  const RunDirectory::Options options;
  std::shared_ptr<RunDirectory> run;
};

// On a real disk.
struct RealRun {
  explicit RealRun(RunDirectory::Options options = {.keep_last = 0, .max_spares = 2})
      : options(options) {
    reopen();
  }

  void reopen() {
    run.reset();
    run = open_run_directory(temp.path(), options, std::chrono::seconds(0), [] {});
  }

  std::unique_ptr<Target> target(uint64_t step) {
    return make_directory_target(run, name_of_step(step));
  }

  std::string path(uint64_t step) const { return temp / name_of_step(step); }

  std::vector<std::string> directories() const {
    std::vector<std::string> found = names_in(temp.path());
    std::erase(found, kLockName);
    return found;
  }

  const TempDir temp;
  const RunDirectory::Options options;
  std::shared_ptr<RunDirectory> run;
};

inline void hand_over_all(Checkpoint& ticket, const State& state) {
  for (size_t layer = 0; layer < state.tensors.size(); ++layer)
    ticket.hand_over(layer, state.hand_over(layer));
}

// Begun, handed over whole, sealed; nothing has run yet.
template <typename Run>
Ticket begin_whole(HandRun& hands, Run& disk, uint64_t step, const State& state,
                   std::function<void(Checkpoint::State)> finished = {}) {
  Ticket ticket = hands.begin(step, state.layout, disk.target(step), std::move(finished));
  hand_over_all(*ticket, state);
  ticket->seal(kManifest, std::nullopt);
  return ticket;
}

template <typename Run>
Ticket save(HandRun& hands, Run& disk, uint64_t step, const State& state) {
  Ticket ticket = begin_whole(hands, disk, step, state);
  hands.run();
  return ticket;
}

inline void expect_saved(const RunOnDisk& disk, const Ticket& ticket, const State& state) {
  EXPECT_EQ(ticket->state(), Checkpoint::State::committed) << text_of(ticket->error());
  const uint64_t step = ticket->identity().step;
  expect_checkpoint(disk, RunOnDisk::path(step), identity_of(step), state, kManifest);
}

}  // namespace pccheck::test
