// Staging, writing and committing called by hand on one thread: what lands on the disk, and when
// the gates open.
#include "cpp/stager.h"

#include <gtest/gtest.h>

#include "cpp/host_copier.h"
#include "cpp/manual_copier.h"
#include "tests/cpp/run_on_disk.h"

namespace pccheck::test {
namespace {

using enum Checkpoint::State;

// Sums a block only when it is full, as for a device's copies.
class LateSums final : public Copier {
 public:
  bool sums_while_copying() const override { return false; }
  uint64_t submit(std::span<const Piece> pieces, ReadyMark* ready) override {
    return host_.submit(pieces, ready);
  }
  bool done(uint64_t submission) override { return host_.done(submission); }

 private:
  HostCopier host_;
};

// Several checkpoints of one layout at the same time; the caller's actions mixed with the workers'.
void expect_the_plan_on_disk(uint64_t seed, Copier& copier, ManualCopier* manual) {
  SCOPED_TRACE("seed " + std::to_string(seed));
  Random random(seed);
  const State first = random_state(random);
  const size_t block_bytes = first.layout->block_bytes();
  RunOnDisk disk;
  HandRun hands(first.layout->open_blocks() + 1 + below(random, 4), block_bytes, copier, seed);
  const auto stumble = [&] {
    for (uint64_t steps = below(random, 12); steps > 0; --steps) {
      hands.step();
      if (manual != nullptr && below(random, 3) == 0) manual->release(1);
    }
  };
  std::vector<State> states;
  std::vector<Ticket> tickets;
  for (uint64_t step = 1; step <= 3; ++step) {
    states.push_back(fill(first.layout, random));
    const State& state = states.back();
    tickets.push_back(hands.begin(step, state.layout, disk.target(step)));
    if (below(random, 2) == 0) tickets.back()->update_began();
    std::vector<size_t> layers(state.tensors.size());
    for (size_t i = 0; i < layers.size(); ++i) layers[i] = i;
    std::ranges::shuffle(layers, random);
    for (const size_t layer : layers) {
      tickets.back()->hand_over(layer, state.hand_over(layer));
      stumble();
    }
    if (below(random, 2) == 0) tickets.back()->update_ended();
    stumble();
    tickets.back()->seal(kManifest, std::nullopt);
    stumble();
  }
  if (manual != nullptr) manual->release_all();
  hands.run();
  for (uint64_t step = 1; step <= 3; ++step) {
    ASSERT_EQ(tickets[step - 1]->state(), committed) << text_of(tickets[step - 1]->error());
    expect_checkpoint(disk, RunOnDisk::path(step), identity_of(step), states[step - 1], kManifest);
  }
  EXPECT_EQ(hands.pool.free_slots(), hands.pool.slot_count());
  EXPECT_EQ(hands.committer.in_flight(), 0u);
  EXPECT_EQ(disk.directories().size(), 3u);
}

TEST(Stager, WhatLandsOnDiskIsThePlanWhateverTheLayoutAndTheOrderOfWork) {
  for (uint64_t seed = 1; seed <= 120 && !testing::Test::HasFailure(); ++seed) {
    HostCopier copier;
    expect_the_plan_on_disk(seed, copier, nullptr);
  }
}

TEST(Stager, WhatLandsOnDiskIsThePlanWhenBlocksAreSummedAtTheEnd) {
  for (uint64_t seed = 1; seed <= 40 && !testing::Test::HasFailure(); ++seed) {
    LateSums copier;
    expect_the_plan_on_disk(seed, copier, nullptr);
  }
}

TEST(Stager, WhatLandsOnDiskIsThePlanWhenCopiesEndLate) {
  for (uint64_t seed = 1; seed <= 80 && !testing::Test::HasFailure(); ++seed) {
    ManualCopier copier;
    expect_the_plan_on_disk(seed, copier, &copier);
  }
}

TEST(Stager, ChunksAndChecksumsInTheHeaderLandAsPlannedToo) {
  for (uint64_t seed = 1; seed <= 30; ++seed) {
    Random random(seed);
    const State state =
        fill(Layout::make(random_files(random, 1, 3000),
                          {.block_bytes = kBlockBytes,
                           .layer_count = 1,
                           .chunk_count = static_cast<uint32_t>(1 + below(random, 6))}),
             random);
    HostCopier copier;
    RunOnDisk disk;
    HandRun hands(state.layout->open_blocks() + 1, kBlockBytes, copier, seed);
    const Ticket ticket = hands.begin(1, state.layout, disk.target(1));
    hand_over_all(*ticket, state);
    ticket->seal(kManifest, std::nullopt);
    hands.run();
    ASSERT_EQ(ticket->state(), committed) << text_of(ticket->error());
    expect_checkpoint(disk, RunOnDisk::path(1), identity_of(1), state, kManifest);
  }
}

TEST(Stager, TheFirstLayersBlocksAreWrittenBeforeTheNextLayerIsHandedOver) {
  const State state = simple_state({4 * kBlockBytes, 10, 10});
  HostCopier copier;
  RunOnDisk disk;
  HandRun hands(4, kBlockBytes, copier, 1);
  const Ticket ticket = hands.begin(1, state.layout, disk.target(1));
  ticket->hand_over(0, state.hand_over(0));
  hands.run();
  const std::vector<std::string> writes = disk.writes();
  EXPECT_GE(writes.size(), 15u);  // 16 blocks' worth, less the one still open
  EXPECT_EQ(writes.front(), "model.safetensors@0");
  EXPECT_TRUE(ticket->wait_staged(0, at_once()));
  EXPECT_FALSE(ticket->wait_staged(1, at_once()));
  EXPECT_FALSE(ticket->wait_all_staged(at_once()));
}

// Lets the stager alone work until it has nothing to do; how many slots it has taken by then.
size_t slots_taken_by_staging(HandRun& hands) {
  while (hands.stager.run_one()) {
  }
  return hands.pool.slot_count() - hands.pool.free_slots();
}

TEST(Stager, KeepsJustAheadOfTheWritersUntilSomebodyWaitsAtAGate) {
  const State state = simple_state({20 * kBlockBytes});
  HostCopier copier;
  RunOnDisk disk;
  HandRun hands(40, kBlockBytes, copier, 1);
  const Ticket ticket = hands.begin(1, state.layout, disk.target(1));
  ticket->hand_over(0, state.hand_over(0));
  const size_t ahead = slots_taken_by_staging(hands);
  EXPECT_GE(ahead, 2u);
  EXPECT_LE(ahead, 4u);  // two that wait, and those still open
  ASSERT_TRUE(hands.writers.run_one());
  EXPECT_EQ(slots_taken_by_staging(hands), ahead) << "one written, one more staged";
  EXPECT_FALSE(ticket->wait_staged(0, at_once())) << "who only looks is not waited for";
  EXPECT_EQ(slots_taken_by_staging(hands), ahead);
  EXPECT_FALSE(ticket->wait_staged(0, Clock::now() + std::chrono::milliseconds(1)));
  EXPECT_EQ(slots_taken_by_staging(hands), 40u);
}

TEST(Stager, ADevicesCopiesTakeEverySlotThereIs) {
  const State state = simple_state({20 * kBlockBytes});
  LateSums copier;
  RunOnDisk disk;
  HandRun hands(40, kBlockBytes, copier, 1);
  const Ticket ticket = hands.begin(1, state.layout, disk.target(1));
  ticket->update_began();
  ticket->hand_over(0, state.hand_over(0));
  EXPECT_EQ(slots_taken_by_staging(hands), 40u);
}

TEST(Stager, WhileAnUpdateRunsItStagesTheFirstBlockAndTheRestAfterwards) {
  const State state = simple_state({20 * kBlockBytes, 20 * kBlockBytes});
  HostCopier copier;
  RunOnDisk disk;
  HandRun hands(8, kBlockBytes, copier, 1);
  const Ticket ticket = hands.begin(1, state.layout, disk.target(1));
  ticket->update_began();
  ticket->hand_over(0, state.hand_over(0));
  hands.run();
  const std::vector<std::string> first = {"model.safetensors@0", "model.safetensors@4096"};
  EXPECT_EQ(disk.writes(), first);  // nothing but header, and a block of the first layer
  ticket->hand_over(1, state.hand_over(1));
  hands.run();
  EXPECT_EQ(disk.writes(), first);
  ticket->update_ended();
  hands.run();
  EXPECT_GT(disk.writes().size(), 100u);
  ticket->seal(kManifest, std::nullopt);
  hands.run();
  expect_checkpoint(disk, RunOnDisk::path(1), identity_of(1), state, kManifest);
}

TEST(Stager, WhileAnUpdateRunsSmallLayersFillTheFirstBlockTogether) {
  const State state = simple_state(std::vector<size_t>(12, kBlockBytes / 4));
  HostCopier copier;
  RunOnDisk disk;
  HandRun hands(8, kBlockBytes, copier, 1);
  const Ticket ticket = hands.begin(1, state.layout, disk.target(1));
  ticket->update_began();
  for (size_t layer = 0; layer < 11; ++layer) {
    ticket->hand_over(layer, state.hand_over(layer));
    hands.run();
  }
  EXPECT_GE(disk.writes().size(), 1u) << "before the last layer is updated";
  EXPECT_LE(disk.writes().size(), 3u);
  ticket->hand_over(11, state.hand_over(11));
  ticket->seal(kManifest, std::nullopt);  // ends the update too
  hands.run();
  expect_checkpoint(disk, RunOnDisk::path(1), identity_of(1), state, kManifest);
}

TEST(Stager, WhoWaitsAtAGateDoesNotWaitForTheUpdateToEnd) {
  const State state = simple_state({20 * kBlockBytes});
  HostCopier copier;
  RunOnDisk disk;
  HandRun hands(8, kBlockBytes, copier, 1);
  const Ticket ticket = hands.begin(1, state.layout, disk.target(1));
  ticket->update_began();
  ticket->hand_over(0, state.hand_over(0));
  hands.run();
  EXPECT_FALSE(ticket->wait_staged(0, Clock::now() + std::chrono::milliseconds(1)));
  hands.run();
  EXPECT_TRUE(ticket->wait_staged(0, at_once()));
}

TEST(Stager, LayersAreStagedInLayoutOrderHoweverTheyComeIn) {
  const State state = simple_state({kBlockBytes, kBlockBytes, kBlockBytes});
  HostCopier copier;
  RunOnDisk disk;
  HandRun hands(3, kBlockBytes, copier, 1);
  const Ticket ticket = hands.begin(1, state.layout, disk.target(1));
  ticket->hand_over(2, state.hand_over(2));
  ticket->hand_over(1, state.hand_over(1));
  hands.run();
  EXPECT_TRUE(disk.writes().empty());
  EXPECT_FALSE(ticket->wait_staged(1, at_once()));
  ticket->hand_over(0, state.hand_over(0));
  hands.run();
  EXPECT_TRUE(ticket->wait_staged(2, at_once()));
  EXPECT_FALSE(ticket->wait_all_staged(at_once())) << "not sealed: more may come";
  ticket->seal(kManifest, std::nullopt);
  EXPECT_TRUE(ticket->wait_all_staged(at_once()));
  hands.run();
  expect_checkpoint(disk, RunOnDisk::path(1), identity_of(1), state, kManifest);
}

TEST(Stager, TheGateOpensWhenTheLayerIsCopiedAndNotBefore) {
  State state = simple_state({2000, 3000});
  const State handed_over = state;
  ManualCopier copier;
  RunOnDisk disk;
  HandRun hands(8, kBlockBytes, copier, 1);
  const Ticket ticket = hands.begin(1, state.layout, disk.target(1));
  hand_over_all(*ticket, state);
  ticket->seal(kManifest, std::nullopt);
  hands.run();
  EXPECT_EQ(copier.submitted(), 2u);
  EXPECT_FALSE(ticket->wait_staged(0, at_once())) << "open before the copy has ended";
  EXPECT_FALSE(ticket->wait_all_staged(at_once()));
  copier.release(1);
  hands.run();
  EXPECT_TRUE(ticket->wait_staged(0, at_once()));
  EXPECT_FALSE(ticket->wait_staged(1, at_once()));
  std::ranges::fill(state.tensors[0][0], std::byte{0xEE});  // the next update of layer 0
  copier.release(1);
  hands.run();
  EXPECT_TRUE(ticket->wait_staged(1, at_once()));
  std::ranges::fill(state.tensors[1][0], std::byte{0xEE});
  hands.run();
  EXPECT_EQ(ticket->state(), committed);
  expect_checkpoint(disk, RunOnDisk::path(1), identity_of(1), handed_over, kManifest);
}

TEST(Stager, AFullPoolMakesStagingWaitAndNothingElse) {
  const State state = simple_state({20 * kBlockBytes / 4, 20 * kBlockBytes / 4});
  HostCopier copier;
  RunOnDisk disk;
  HandRun hands(2, kBlockBytes, copier, 1);
  const Ticket ticket = hands.begin(1, state.layout, disk.target(1));
  hand_over_all(*ticket, state);
  ticket->seal(kManifest, std::nullopt);
  while (hands.stager.run_one()) {
  }
  EXPECT_EQ(hands.pool.free_slots(), 0u);
  EXPECT_FALSE(ticket->wait_staged(0, at_once()));
  // Each block the disk takes makes room for one more.
  size_t written = 0;
  while (hands.writers.run_one()) {
    ++written;
    EXPECT_GE(hands.pool.free_slots(), 1u);
    while (hands.stager.run_one()) {
    }
  }
  EXPECT_EQ(written, state.layout->block_count(0));
  hands.run();
  expect_checkpoint(disk, RunOnDisk::path(1), identity_of(1), state, kManifest);
}

TEST(Stager, ASlotIsFreeOnlyOnceItsBytesAreOnTheDisk) {
  const State state = simple_state({20 * kBlockBytes / 4});
  HostCopier copier;
  RunOnDisk disk;
  HandRun hands(2, kBlockBytes, copier, 1);
  const Ticket ticket = begin_whole(hands, disk, 1, state);
  while (hands.stager.run_one()) {
  }
  size_t writes = 0;
  disk.before = [&](const Operation& operation) {
    if (operation.call != "pwrite" || !operation.path.ends_with(".safetensors")) return;
    ++writes;
    EXPECT_LT(hands.pool.free_slots(), hands.pool.slot_count());
  };
  while (hands.writers.run_one()) {
  }
  EXPECT_EQ(writes, 2u);
  EXPECT_EQ(hands.pool.free_slots(), hands.pool.slot_count());
  hands.run();
  expect_saved(disk, ticket, state);
}

TEST(Stager, CheckpointsAreStagedInTheOrderInWhichTheyWereBegun) {
  Random random(2);
  const State first = simple_state({3000}), second = fill(first.layout, random);
  ManualCopier copier;
  RunOnDisk disk;
  HandRun hands(8, kBlockBytes, copier, 1);
  const Ticket older = hands.begin(1, first.layout, disk.target(1));
  const Ticket newer = hands.begin(2, second.layout, disk.target(2));
  hand_over_all(*newer, second);
  newer->seal(kManifest, std::nullopt);
  hands.run();
  EXPECT_EQ(copier.submitted(), 0u);
  hand_over_all(*older, first);
  older->seal(kManifest, std::nullopt);
  copier.release_all();
  hands.run();
  expect_checkpoint(disk, RunOnDisk::path(1), identity_of(1), first, kManifest);
  expect_checkpoint(disk, RunOnDisk::path(2), identity_of(2), second, kManifest);
}

TEST(Stager, AnAdditionKnownOnlyAtTheSealIsOneLayerMore) {
  for (const uint64_t elements : {0u, 5u, 5000u}) {
    const State state = simple_state({700, 900});
    Random random(3);
    const State addition =
        fill(Layout::make({{"extra.safetensors", {}, {{"rng", "U8", {elements}, 0}}}},
                          {.block_bytes = kBlockBytes, .layer_count = 1}),
             random);
    HostCopier copier;
    RunOnDisk disk;
    HandRun hands(3, kBlockBytes, copier, 1);
    const Ticket ticket = hands.begin(1, state.layout, disk.target(1));
    hand_over_all(*ticket, state);
    hands.run();
    ticket->seal(kManifest, Checkpoint::Addition{addition.layout, addition.hand_over(0)});
    EXPECT_FALSE(ticket->wait_all_staged(at_once()));
    hands.run();
    ASSERT_EQ(ticket->state(), committed) << text_of(ticket->error());
    EXPECT_EQ(disk.contents(RunOnDisk::path(1) + "/model.safetensors"), state.file(0));
    EXPECT_EQ(disk.contents(RunOnDisk::path(1) + "/extra.safetensors"), addition.file(0));
    const Checksums sums =
        decode_checksums(disk.contents(RunOnDisk::path(1) + "/" + kChecksumsName));
    EXPECT_EQ(sums.files.size(), 2u);
    EXPECT_EQ(ticket->payload_bytes(), state.file(0).size() + addition.file(0).size());
  }
}

TEST(Stager, WhatIsAddedOnTheWayIsStagedInItsTurn) {
  const auto of_bytes = [](const char* name, uint64_t bytes, Random& random) {
    return fill(Layout::make({{name, {}, {{"t", "U8", {bytes}, 0}}}},
                             {.block_bytes = kBlockBytes, .layer_count = 1}),
                random);
  };
  Random random(4);
  const State state = simple_state({700, 900});
  const State one = of_bytes("one.safetensors", 9000, random);
  const State two = of_bytes("two.safetensors", 10, random);
  const State three = of_bytes("three.safetensors", 20000, random);
  HostCopier copier;
  RunOnDisk disk;
  HandRun hands(4, kBlockBytes, copier, 1);
  const Ticket ticket = hands.begin(1, state.layout, disk.target(1));
  EXPECT_EQ(ticket->add({one.layout, one.hand_over(0)}), 2u);
  hands.run();
  EXPECT_FALSE(ticket->wait_staged(2, at_once())) << "ahead of the layers that were planned";
  hand_over_all(*ticket, state);
  hands.run();
  EXPECT_TRUE(ticket->wait_staged(2, at_once()));
  EXPECT_EQ(ticket->add({two.layout, two.hand_over(0)}), 3u);
  hands.run();
  EXPECT_TRUE(ticket->wait_staged(3, at_once()));
  ticket->seal(kManifest, Checkpoint::Addition{three.layout, three.hand_over(0)});
  hands.run();
  ASSERT_EQ(ticket->state(), committed) << text_of(ticket->error());
  EXPECT_THROW(ticket->add({two.layout, two.hand_over(0)}), std::invalid_argument);
  for (const State* added : {&one, &two, &three})
    EXPECT_EQ(disk.contents(RunOnDisk::path(1) + "/" + added->layout->files()[0].name),
              added->file(0));
  EXPECT_EQ(ticket->payload_bytes(),
            state.file(0).size() + one.file(0).size() + two.file(0).size() + three.file(0).size());
}

TEST(Stager, ACheckpointWithoutATensorIsCommittedToo) {
  const State state{Layout::make({}, {.block_bytes = kBlockBytes, .layer_count = 0}), {}};
  HostCopier copier;
  RunOnDisk disk;
  HandRun hands(1, kBlockBytes, copier, 1);
  const Ticket ticket = hands.begin(1, state.layout, disk.target(1));
  ticket->seal({}, std::nullopt);
  hands.run();
  ASSERT_EQ(ticket->state(), committed) << text_of(ticket->error());
  EXPECT_EQ(disk.names(RunOnDisk::path(1)).size(), 2u);
  const Checksums sums = decode_checksums(disk.contents(RunOnDisk::path(1) + "/" + kChecksumsName));
  EXPECT_TRUE(sums.files.empty());
}

}  // namespace
}  // namespace pccheck::test
