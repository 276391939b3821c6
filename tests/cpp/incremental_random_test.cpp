// Incremental saves in random runs: whatever changes, fails, is retired or comes late, every
// checkpoint there is stays exactly what was saved, and nothing is written that need not be.
#include <gtest/gtest.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <set>

#include "cpp/host_copier.h"
#include "cpp/manual_copier.h"
#include "tests/cpp/layer_files.h"

namespace pccheck::test {
namespace {

using enum Checkpoint::State;

State random_layers(Random& random) {
  std::vector<uint64_t> elements(1 + below(random, 5));
  for (uint64_t& count : elements)
    count = below(random, 3) == 0 ? below(random, 4000) : below(random, 50);
  return layer_state(elements, random());
}

// Some layers changed, in a bit anywhere.
State next_of(State state, Random& random) {
  for (size_t layer = 0; layer < state.tensors.size(); ++layer)
    if (below(random, 3) == 0) state = changed(std::move(state), layer, random());
  return state;
}

// Every checkpoint that there is, as it was saved.
void expect_all_as_saved(const RunOnDisk& disk, const std::map<uint64_t, State>& saved) {
  for (const std::string& name : disk.directories())
    if (const auto step = step_of_name(name))
      expect_checkpoint(disk, RunOnDisk::path(*step), identity_of(*step), saved.at(*step),
                        kManifest);
}

struct Seen {
  uint64_t linked = 0;
  uint64_t failures = 0;
  uint64_t recycled = 0;
};

void random_run(uint64_t seed, Copier& copier, ManualCopier* manual, Seen& seen) {
  SCOPED_TRACE("seed " + std::to_string(seed));
  Random random(seed);
  State state = random_layers(random);
  RunOnDisk disk({.keep_last = below(random, 4), .max_spares = below(random, 3)});
  HandRun hands(2 + below(random, 5), kBlockBytes, copier, seed);
  if (below(random, 3) == 0) disk.most_links = 2 + below(random, 3);
  const auto stumble = [&] {
    for (uint64_t steps = below(random, 12); steps > 0; --steps) {
      hands.step();
      if (manual != nullptr && below(random, 3) == 0) manual->release(1);
    }
  };
  std::map<uint64_t, State> saved;
  uint64_t step = 0;
  for (int round = 0; round < 5; ++round) {
    std::vector<Ticket> tickets;
    for (uint64_t in_flight = 1 + below(random, 3); in_flight > 0; --in_flight) {
      state = next_of(std::move(state), random);
      saved[++step] = state;
      tickets.push_back(hands.begin(step, state.layout, disk.target(step)));
      if (below(random, 2) == 0) tickets.back()->update_began();
      for (size_t layer = 0; layer < state.tensors.size(); ++layer) {
        tickets.back()->hand_over(layer, saved[step].hand_over(layer));
        stumble();
      }
      if (below(random, 5) == 0) tickets.back()->fail(error_saying("drawn"));
      tickets.back()->seal(kManifest, std::nullopt);
      stumble();
    }
    if (manual != nullptr) manual->release(10'000);
    hands.run();
    for (const Ticket& ticket : tickets) {
      ASSERT_NE(ticket->state(), in_flight);
      const std::string why = text_of(ticket->error());
      ASSERT_TRUE(ticket->state() == committed || why == "drawn") << why;
      seen.failures += ticket->state() == failed;
    }
    expect_all_as_saved(disk, saved);
    ASSERT_EQ(hands.pool.free_slots(), hands.pool.slot_count());
    if (testing::Test::HasFailure()) return;
  }
  seen.linked += hands.committer.counts().bytes_linked;
  for (const Operation& operation : disk.log()) seen.recycled += operation.call == "reuse_file";
}

TEST(IncrementalRuns, EveryCheckpointThereIsStaysWhatWasSaved) {
  Seen seen;
  for (uint64_t seed = 1; seed <= 150 && !testing::Test::HasFailure(); ++seed) {
    HostCopier copier;
    random_run(seed, copier, nullptr, seen);
  }
  EXPECT_GT(seen.linked, 10'000'000u);
  EXPECT_GT(seen.failures, 100u);
  EXPECT_GT(seen.recycled, 500u);
}

TEST(IncrementalRuns, EveryCheckpointThereIsStaysWhatWasSavedFromADevice) {
  Seen seen;
  for (uint64_t seed = 1; seed <= 120 && !testing::Test::HasFailure(); ++seed) {
    ManualCopier copier;
    random_run(seed, copier, &copier, seen);
  }
  EXPECT_GT(seen.linked, 10'000'000u);
  EXPECT_GT(seen.failures, 100u);
}

// Which files of the two differ.
std::vector<std::string> differing(const State& one, const State& other) {
  std::vector<std::string> names;
  for (size_t f = 0; f < one.layout->files().size(); ++f)
    if (one.file(f) != other.file(f)) names.push_back(one.layout->files()[f].name);
  return names;
}

void expect_only_changes_written(uint64_t seed, Copier& copier) {
  SCOPED_TRACE("seed " + std::to_string(seed));
  Random random(seed);
  RunOnDisk disk({.keep_last = below(random, 3), .max_spares = below(random, 3)});
  HandRun hands(2 + below(random, 3), kBlockBytes, copier, seed);
  State state = random_layers(random);
  ASSERT_EQ(save(hands, disk, 1, state)->state(), committed);
  for (uint64_t step = 2; step <= 8; ++step) {
    const State next = next_of(state, random);
    const size_t since = disk.operations();
    ASSERT_EQ(save(hands, disk, step, next)->state(), committed);
    std::set<std::string> written;
    const std::vector<Operation> log = disk.log();
    for (size_t i = since; i < log.size(); ++i) {
      const std::string name = log[i].path.substr(log[i].path.rfind('/') + 1);
      if (log[i].call == "pwrite" && name != kManifestName && name != kChecksumsName)
        written.insert(name);
    }
    ASSERT_EQ(std::vector<std::string>(written.begin(), written.end()), [&] {
      std::vector<std::string> names = differing(state, next);
      std::ranges::sort(names);
      return names;
    }());
    state = next;
  }
}

TEST(IncrementalRuns, ExactlyTheFilesWhoseBytesDifferAreWritten) {
  for (uint64_t seed = 1; seed <= 60 && !testing::Test::HasFailure(); ++seed) {
    HostCopier host;
    expect_only_changes_written(seed, host);
    ManualCopier device;
    device.release_all();
    expect_only_changes_written(seed, device);
  }
}

// -- a device's copies ----------------------------------------------------------------------------

TEST(IncrementalFromADevice, ALayerIsStagedOnlyWhenWhatIsComparedWasCopied) {
  const State state = layer_state({3000, 40});
  ManualCopier copier;
  copier.release_all();
  RunOnDisk disk;
  HandRun first{4, kBlockBytes, copier, 1};
  expect_saved(disk, save(first, disk, 1, state), state);

  ManualCopier slow;
  HandRun hands{4, kBlockBytes, slow, 1};
  hands.book->enter(first.book->newest());
  const Ticket ticket = begin_whole(hands, disk, 2, state);
  hands.run();
  EXPECT_GE(slow.submitted(), 1u);
  EXPECT_FALSE(ticket->wait_staged(0, at_once()));
  EXPECT_TRUE(hands.stager.awaits_outside());
  EXPECT_EQ(disk.links(RunOnDisk::path(1) + "/" + model_file(0)), 1u);
  for (int copies = 0; copies < 100 && !ticket->wait_all_staged(at_once()); ++copies) {
    slow.release(1);
    hands.run();
  }
  EXPECT_TRUE(ticket->wait_all_staged(at_once()));
  hands.run();
  expect_saved(disk, ticket, state);
  EXPECT_EQ(disk.links(RunOnDisk::path(1) + "/" + model_file(0)), 2u);
  EXPECT_EQ(hands.pool.free_slots(), 4u);
}

TEST(IncrementalFromADevice, OfAFileThatHasChangedOnlyTheFirstBlockIsCopiedTwice) {
  Random random(3);
  const uint64_t blocks = 40;
  const auto layout =
      layer_layout({{model_file(0), {}, {{"w", "F32", {blocks * kBlockBytes / 4}, 0}}}}, 1);
  const State state = fill(layout, random);
  ManualCopier copier;
  copier.release_all();
  RunOnDisk disk;
  HandRun hands{60, kBlockBytes, copier, 1};
  struct Counting final : Copier {
    explicit Counting(Copier& to) : to(to) {}
    bool sums_while_copying() const override { return false; }
    uint64_t submit(std::span<const Piece> pieces, ReadyMark* ready) override {
      for (const Piece& piece : pieces) bytes += piece.bytes;
      return to.submit(pieces, ready);
    }
    bool done(uint64_t submission) override { return to.done(submission); }
    Copier& to;
    uint64_t bytes = 0;
  } counting(copier);
  HandRun counted{60, kBlockBytes, counting, 1};
  const auto bytes_of = [&](uint64_t step, const State& now) {
    counting.bytes = 0;
    expect_saved(disk, save(counted, disk, step, now), now);
    return counting.bytes;
  };
  const uint64_t all = blocks * kBlockBytes;
  EXPECT_EQ(bytes_of(1, state), all);
  EXPECT_EQ(bytes_of(2, state), all) << "compared";
  const State third = changed(state, 0, 5);
  EXPECT_EQ(bytes_of(3, third), all + kBlockBytes);
  EXPECT_EQ(bytes_of(4, changed(third, 0, 8 * all - 1)), 2 * all);
}

TEST(IncrementalFromADevice, ACopyThatFailsFailsTheCheckpointAndFreesItsSlots) {
  struct Failing final : Copier {
    bool sums_while_copying() const override { return false; }
    uint64_t submit(std::span<const Piece> pieces, ReadyMark*) override {
      for (const Piece& piece : pieces) std::memcpy(piece.to, piece.from, piece.bytes);
      return ++submitted;
    }
    bool done(uint64_t submission) override {
      if (fails_from != 0 && submission >= fails_from) throw std::runtime_error("a copy failed");
      return true;
    }
    uint64_t submitted = 0, fails_from = 0;
  } copier;
  const State state = layer_state({3000, 40});
  RunOnDisk disk;
  HandRun hands{4, kBlockBytes, copier, 1};
  expect_saved(disk, save(hands, disk, 1, state), state);
  for (uint64_t later = 1; later <= 4; ++later) {
    copier.fails_from = copier.submitted + later;
    const Ticket ticket = save(hands, disk, 1 + later, state);
    EXPECT_EQ(ticket->state(), failed);
    EXPECT_EQ(hands.pool.free_slots(), 4u);
    EXPECT_EQ(disk.directories(), std::vector<std::string>{name_of_step(1)});
  }
  copier.fails_from = 0;
  expect_saved(disk, save(hands, disk, 9, state), state);
}

// -- whatever goes wrong on the disk --------------------------------------------------------------

TEST(IncrementalFaults, AnOperationThatFailsFailsAtMostOneCheckpointWhicheverItIs) {
  std::vector<State> states = {layer_state({2000, 300})};
  for (uint64_t step = 2; step <= 4; ++step)
    states.push_back(changed(states.back(), step % 2, step));
  HostCopier copier;
  size_t operations = 0;
  for (size_t index = 0; !testing::Test::HasFailure(); ++index) {
    SCOPED_TRACE("operation " + std::to_string(index));
    RunOnDisk disk({.keep_last = 1, .max_spares = 1});
    HandRun hands(4, kBlockBytes, copier, 11);
    const size_t first = disk.operations();
    bool hit = false;
    disk.before = [&](const Operation& operation) {
      if (hit || disk.operations() != first + index + 1) return;
      hit = true;
      fail_operation(operation, index % 2 == 0 ? EIO : ENOSPC);
    };
    std::vector<Ticket> tickets;
    for (uint64_t step = 1; step <= 4; ++step) {
      tickets.push_back(begin_whole(hands, disk, step, states[step - 1]));
      if (step % 2 == 0) hands.run();
    }
    disk.before = {};
    if (!hit) {
      operations = index;
      break;
    }
    std::map<uint64_t, State> saved;
    size_t failures = 0;
    for (const Ticket& ticket : tickets) {
      ASSERT_NE(ticket->state(), in_flight);
      failures += ticket->state() == failed;
    }
    for (uint64_t step = 1; step <= 4; ++step) saved[step] = states[step - 1];
    if (hands.committer.outcome_unknown()) continue;
    EXPECT_LE(failures, 1u);
    expect_all_as_saved(disk, saved);
    saved[9] = states[0];
    expect_saved(disk, save(hands, disk, 9, saved[9]), saved[9]);
    expect_all_as_saved(disk, saved);
    EXPECT_EQ(hands.pool.free_slots(), hands.pool.slot_count());
  }
  EXPECT_GT(operations, 100u);
}

}  // namespace
}  // namespace pccheck::test
