// Publication: the order of the steps that make a checkpoint durable, then visible, then
// acknowledged, and only then retire what it replaces.
#include "cpp/committer.h"

#include <gtest/gtest.h>

#include <cerrno>

#include "cpp/host_copier.h"
#include "cpp/manual_copier.h"
#include "tests/cpp/run_on_disk.h"

namespace pccheck::test {
namespace {

using enum Checkpoint::State;

bool is_publication(const Operation& operation) {
  return operation.call == "rename" && operation.path.ends_with(kPartialSuffix) &&
         !operation.to.ends_with(kPartialSuffix);
}

bool is_retirement(const Operation& operation) {
  return operation.call == "rename" && !operation.path.ends_with(kPartialSuffix);
}

State many_layers() { return simple_state({1000, 3000, 10, 0, 2500}); }

struct Fixed final : SourceWatch {
  std::string text;
  std::string changed() const override { return text; }
};

TEST(Commit, NothingBecomesVisibleBeforeAllOfItIsDurable) {
  const State state = many_layers();
  HostCopier copier;
  RunOnDisk disk({.keep_last = 1, .max_spares = 1});
  int published = 0;
  disk.before = [&](const Operation& operation) {
    if (!is_publication(operation)) return;
    ++published;
    EXPECT_EQ(disk.unsynced(operation.path), std::vector<std::string>{}) << operation.to;
  };
  HandRun hands(3, kBlockBytes, copier, 1);
  for (uint64_t step = 1; step <= 5; ++step)
    expect_saved(disk, save(hands, disk, step, state), state);
  EXPECT_EQ(published, 5);
}

TEST(Commit, AFileIsSyncedAfterItsLastWriteEvenWhenWritersOverlap) {
  const State state = many_layers();
  HostCopier copier;
  RunOnDisk disk;
  HandRun hands(16, kBlockBytes, copier, 1);
  int depth = 0, deepest = 0;
  disk.before = [&](const Operation& operation) {
    if (is_publication(operation)) {
      EXPECT_EQ(disk.unsynced(operation.path), std::vector<std::string>{});
    }
    if (operation.call != "pwrite" || !operation.path.ends_with(".safetensors")) return;
    deepest = std::max(deepest, ++depth);
    hands.writers.run_one();  // another writer overtakes this one
    --depth;
  };
  const Ticket ticket = begin_whole(hands, disk, 1, state);
  ticket->wait_all_staged(Clock::now() + std::chrono::milliseconds(1));  // hurries the stager
  while (hands.stager.run_one()) {
  }
  hands.run();
  EXPECT_GE(deepest, 3);
  expect_saved(disk, ticket, state);
}

TEST(Commit, NothingIsAcknowledgedBeforeItsNameIsDurable) {
  const State state = many_layers();
  HostCopier copier;
  RunOnDisk disk({.keep_last = 1, .max_spares = 1});
  HandRun hands(3, kBlockBytes, copier, 1);
  int acknowledged = 0;
  for (uint64_t step = 1; step <= 5; ++step) {
    begin_whole(hands, disk, step, state, [&](Checkpoint::State ended) {
      ++acknowledged;
      EXPECT_EQ(ended, committed);
      EXPECT_EQ(disk.unsynced(RunOnDisk::path(step)), std::vector<std::string>{});
      const std::vector<std::string> durable = disk.durable_names(MemoryDisk::kRoot);
      EXPECT_EQ(std::ranges::count(durable, name_of_step(step)), 1) << "step " << step;
    });
    hands.run();
  }
  EXPECT_EQ(acknowledged, 5);
}

TEST(Commit, NothingIsRetiredBeforeItsSuccessorsAreAcknowledgedAndDurable) {
  const State state = many_layers();
  HostCopier copier;
  RunOnDisk disk({.keep_last = 2, .max_spares = 1});
  HandRun hands(3, kBlockBytes, copier, 1);
  std::vector<Ticket> tickets;
  int retired = 0;
  disk.before = [&](const Operation& operation) {
    if (!is_retirement(operation)) return;
    ++retired;
    const std::string name = operation.path.substr(operation.path.rfind('/') + 1);
    size_t newer = 0;
    for (const std::string& other : disk.durable_names(MemoryDisk::kRoot)) {
      const auto step = step_of_name(other);
      if (!step || other <= name) continue;
      EXPECT_EQ(tickets[*step - 1]->state(), committed) << other << " not yet acknowledged";
      ++newer;
    }
    EXPECT_GE(newer, 2u) << name << " is retired too early";
  };
  for (uint64_t step = 1; step <= 6; ++step) {
    tickets.push_back(begin_whole(hands, disk, step, state));
    hands.run();
  }
  EXPECT_EQ(retired, 4);
}

TEST(Commit, ARetiredDirectoryIsNotWrittenToBeforeItsOldNameIsDurablyGone) {
  const State state = many_layers();
  HostCopier copier;
  RunOnDisk disk({.keep_last = 1, .max_spares = 2});
  HandRun hands(3, kBlockBytes, copier, 1);
  size_t recycled = 0;
  disk.before = [&](const Operation& operation) {
    if (operation.call != "pwrite" && operation.call != "allocate") return;
    // Whatever durable name leads to the file's directory must not be a checkpoint's.
    const std::string parent = operation.path.substr(0, operation.path.rfind('/'));
    for (const std::string& name : disk.durable_names(MemoryDisk::kRoot)) {
      if (!step_of_name(name)) continue;
      const std::string path = std::string(MemoryDisk::kRoot) + "/" + name;
      EXPECT_TRUE(!disk.exists(path) || disk.identity(path) != disk.identity(parent));
      EXPECT_TRUE(disk.exists(path)) << name << " would be back after a crash, overwritten";
    }
  };
  const void* file = nullptr;
  for (uint64_t step = 1; step <= 5; ++step) {
    expect_saved(disk, save(hands, disk, step, state), state);
    const void* now = disk.identity(RunOnDisk::path(step) + "/model.safetensors");
    recycled += step % 2 == 0 ? 0 : now == file;
    if (step % 2 == 1) file = now;
  }
  EXPECT_EQ(recycled, 2u) << "steps 3 and 5 overwrite what step 1 wrote";
}

TEST(Commit, CheckpointsArePublishedInStepOrderEvenWhenALaterOneIsPersistedFirst) {
  const State first = simple_state({100}), second = simple_state({3000}, 2);
  HostCopier copier;
  RunOnDisk disk;
  HandRun hands(8, kBlockBytes, copier, 1);
  const Ticket older = begin_whole(hands, disk, 1, first);
  while (hands.stager.run_one()) {
  }
  std::unique_ptr<Block> held = hands.full.try_pop();  // a writer that takes its time
  ASSERT_TRUE(held);
  const Ticket newer = begin_whole(hands, disk, 2, second);
  hands.run();
  EXPECT_EQ(disk.contents(RunOnDisk::path(2) + ".partial/model.safetensors"), second.file(0));
  EXPECT_EQ(newer->state(), in_flight);
  EXPECT_FALSE(disk.exists(RunOnDisk::path(1)));
  EXPECT_FALSE(disk.exists(RunOnDisk::path(2)));
  older->write_block(held->file, held->index, held->contents(), held->crc);
  held.reset();
  hands.run();
  std::vector<std::string> published;
  for (const Operation& operation : disk.log())
    if (is_publication(operation)) published.push_back(operation.to);
  EXPECT_EQ(published, (std::vector<std::string>{RunOnDisk::path(1), RunOnDisk::path(2)}));
  expect_saved(disk, older, first);
  expect_saved(disk, newer, second);
}

TEST(Commit, WhatIsCountedAddsUp) {
  const State state = many_layers();
  HostCopier copier;
  RunOnDisk disk;
  HandRun hands(3, kBlockBytes, copier, 1);
  for (uint64_t step = 1; step <= 3; ++step) {
    const Ticket ticket = begin_whole(hands, disk, step, state);
    EXPECT_EQ(hands.committer.in_flight(), 1u);
    if (step == 2) ticket->fail(error_saying("no"));
    hands.run();
  }
  const CommitCounts counts = hands.committer.counts();
  EXPECT_EQ(counts.committed, 2u);
  EXPECT_EQ(counts.failed, 1u);
  EXPECT_EQ(counts.last_committed_step, 3u);
  EXPECT_EQ(counts.bytes, 2 * state.layout->total_bytes());
  EXPECT_GT(counts.last_durable_seconds, 0);
  EXPECT_GE(counts.durable_seconds, counts.last_durable_seconds);
}

TEST(Commit, ATripwireThatHasTrippedAtTheGateFailsTheCheckpoint) {
  const State state = many_layers();
  HostCopier copier;
  RunOnDisk disk;
  HandRun hands(3, kBlockBytes, copier, 1);
  Fixed watch;
  const Ticket ticket = hands.begin(1, state.layout, disk.target(1));
  for (size_t layer = 0; layer < state.tensors.size(); ++layer) {
    HandOver hand_over = state.hand_over(layer);
    if (layer == 1) hand_over.watch = &watch;
    ticket->hand_over(layer, std::move(hand_over));
  }
  hands.run();
  watch.text = "tensor h.0.weight was changed";
  ticket->open_gate(0);
  EXPECT_FALSE(ticket->error());
  ticket->open_gate(1);
  EXPECT_EQ(text_of(ticket->error()), watch.text);
  ticket->seal(kManifest, std::nullopt);
  hands.run();
  EXPECT_EQ(ticket->state(), failed);
  EXPECT_TRUE(disk.directories().empty());
}

TEST(Commit, ATripwireThatTripsOnlyBeforePublicationFailsTheCheckpoint) {
  const State state = many_layers();
  HostCopier copier;
  RunOnDisk disk;
  HandRun hands(3, kBlockBytes, copier, 1);
  Fixed watch;
  const Ticket ticket = hands.begin(1, state.layout, disk.target(1));
  for (size_t layer = 0; layer < state.tensors.size(); ++layer) {
    HandOver hand_over = state.hand_over(layer);
    hand_over.watch = &watch;
    ticket->hand_over(layer, std::move(hand_over));
  }
  hands.run();
  watch.text = "tensor wte.weight was changed";
  ticket->seal(kManifest, std::nullopt);
  hands.run();
  EXPECT_EQ(ticket->state(), failed);
  EXPECT_EQ(text_of(ticket->error()), watch.text);
  EXPECT_TRUE(disk.directories().empty());
  EXPECT_EQ(hands.pool.free_slots(), 3u);
  expect_saved(disk, save(hands, disk, 2, state), state);
}

TEST(Commit, ChangesBehindAnOpenGateAreNobodysBusiness) {
  const State state = many_layers();
  HostCopier copier;
  RunOnDisk disk;
  HandRun hands(3, kBlockBytes, copier, 1);
  const Ticket ticket = hands.begin(1, state.layout, disk.target(1));
  {
    Fixed watch;
    for (size_t layer = 0; layer < state.tensors.size(); ++layer) {
      HandOver hand_over = state.hand_over(layer);
      hand_over.watch = &watch;
      ticket->hand_over(layer, std::move(hand_over));
    }
    hands.run();
    for (size_t layer = 0; layer < state.tensors.size(); ++layer) ticket->open_gate(layer);
    watch.text = "the next update";
  }  // the watch itself may go, too
  ticket->open_gate(0);
  ticket->open_gate(99);
  ticket->seal(kManifest, std::nullopt);
  hands.run();
  expect_saved(disk, ticket, state);
}

TEST(Commit, WhatHasBeenPublishedCanNoLongerFail) {
  // The bytes were staged, unchanged, when publication began: to call it failed with its name on
  // disk would be a lie.
  const State state = many_layers();
  HostCopier copier;
  RunOnDisk disk;
  HandRun hands(3, kBlockBytes, copier, 1);
  const Ticket ticket = begin_whole(hands, disk, 1, state);
  disk.before = [&](const Operation& operation) {
    if (is_publication(operation)) ticket->fail(error_saying("too late"));
  };
  hands.run();
  expect_saved(disk, ticket, state);
  EXPECT_FALSE(ticket->error());
}

TEST(Commit, AFailureThatComesBeforePublicationPreventsIt) {
  const State state = many_layers();
  HostCopier copier;
  RunOnDisk disk;
  HandRun hands(3, kBlockBytes, copier, 1);
  const Ticket ticket = begin_whole(hands, disk, 1, state);
  while (!ticket->ready_to_publish()) ASSERT_TRUE(hands.step());
  ticket->fail(error_saying("in time"));
  hands.run();
  EXPECT_EQ(ticket->state(), failed);
  EXPECT_EQ(text_of(ticket->error()), "in time");
  EXPECT_TRUE(disk.directories().empty());
  EXPECT_EQ(hands.pool.free_slots(), 3u);
}

TEST(Commit, AnUnknownOutcomeStopsEverythingThatWouldFollow) {
  const State state = many_layers();
  HostCopier copier;
  RunOnDisk disk;
  HandRun hands(8, kBlockBytes, copier, 1);
  bool published = false;
  disk.before = [&](const Operation& operation) {
    if (is_publication(operation)) published = true;
    if (published && operation.call == "sync" && operation.path == MemoryDisk::kRoot)
      fail_operation(operation, EIO);
  };
  const Ticket unknown = begin_whole(hands, disk, 1, state);
  const Ticket next = begin_whole(hands, disk, 2, state);
  hands.run();
  ASSERT_TRUE(unknown->error() && next->error());
  EXPECT_EQ(unknown->state(), failed);
  EXPECT_THROW(std::rethrow_exception(unknown->error()), OutcomeUnknown);
  EXPECT_EQ(next->state(), failed);
  EXPECT_THROW(std::rethrow_exception(next->error()), OutcomeUnknown);
  EXPECT_TRUE(hands.committer.outcome_unknown());
  EXPECT_EQ(disk.directories(), std::vector<std::string>{name_of_step(1)}) << "left as it is";
}

TEST(Commit, ANameThatIsTakenFailsTheCheckpointAndHarmsNothing) {
  const State state = many_layers(), other = simple_state({77}, 9);
  HostCopier copier;
  RunOnDisk disk;
  HandRun hands(3, kBlockBytes, copier, 1);
  const Ticket first = save(hands, disk, 1, state);
  const Ticket again = save(hands, disk, 1, other);
  EXPECT_EQ(again->state(), failed);
  EXPECT_NE(text_of(again->error()).find("exists already"), std::string::npos);
  expect_saved(disk, first, state);
  EXPECT_EQ(disk.directories(), std::vector<std::string>{name_of_step(1)});
}

TEST(Commit, WhatGoesWrongInClearingUpIsAComplaintNotAFailure) {
  const State state = many_layers();
  HostCopier copier;
  RunOnDisk disk({.keep_last = 1, .max_spares = 0});
  HandRun hands(3, kBlockBytes, copier, 1);
  save(hands, disk, 1, state);
  disk.before = [&](const Operation& operation) {
    if (operation.call == "remove_file") fail_operation(operation, EIO);
  };
  const Ticket second = save(hands, disk, 2, state);
  expect_saved(disk, second, state);
  const std::optional<std::string> complaint = hands.committer.take_complaint();
  ASSERT_TRUE(complaint);
  EXPECT_NE(complaint->find("remove_file"), std::string::npos);
  EXPECT_FALSE(hands.committer.take_complaint());
  EXPECT_FALSE(hands.committer.outcome_unknown());
  disk.before = {};
  expect_saved(disk, save(hands, disk, 3, state), state);
}

}  // namespace
}  // namespace pccheck::test
