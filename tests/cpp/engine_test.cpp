// The engine with its threads, over a disk in memory that a test can hold back.
#include "cpp/engine.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <future>
#include <latch>
#include <mutex>
#include <thread>

#include "cpp/host_copier.h"
#include "cpp/manual_copier.h"
#include "tests/cpp/run_on_disk.h"

namespace pccheck::test {
namespace {

using enum Checkpoint::State;

// What a slow disk waits for.
class Gate {
 public:
  void wait() {
    std::unique_lock lock(mutex_);
    ++waiting_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return open_; });
  }
  void open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  bool somebody_waits() {
    std::unique_lock lock(mutex_);
    return changed_.wait_until(lock, in_a_minute(), [&] { return waiting_ > 0; });
  }

 private:
  std::mutex mutex_;  // guards everything below
  std::condition_variable changed_;
  bool open_ = false;
  int waiting_ = 0;
};

struct World {
  explicit World(size_t slots, unsigned writers = 2, size_t max_in_flight = 2,
                 RunDirectory::Options options = {.keep_last = 2, .max_spares = 2})
      : disk(options),
        engine(std::in_place, EngineOptions{kBlockBytes, max_in_flight},
               std::make_unique<HostCopier>(), allocate_host_slots(slots * kBlockBytes),
               std::make_unique<LocalPersister>(writers)) {}

  Ticket begin(uint64_t step, const State& state) {
    EXPECT_TRUE(engine->wait_room(in_a_minute()));
    return engine->begin(identity_of(step), name_of_step(step), state.layout, disk.target(step));
  }

  Ticket save(uint64_t step, const State& state) {
    Ticket ticket = begin(step, state);
    hand_over_all(*ticket, state);
    ticket->seal(kManifest, std::nullopt);
    return ticket;
  }

  // Until the engine's own clearing up is over, too.
  void close() { engine.reset(); }

  RunOnDisk disk;
  std::optional<Engine> engine;
};

TEST(Engine, ManyCheckpointsInARowAllReachTheDiskWhole) {
  Random random(1);
  for (int round = 0; round < 12; ++round) {
    const State shape = random_state(random);
    if (shape.layout->block_bytes() != kBlockBytes) continue;
    World world(shape.layout->open_blocks() + 1 + below(random, 3),
                static_cast<unsigned>(1 + below(random, 4)), 1 + below(random, 3));
    std::vector<State> states;
    std::vector<Ticket> tickets;
    for (uint64_t step = 1; step <= 12; ++step) {
      states.push_back(fill(shape.layout, random));
      tickets.push_back(world.save(step, states.back()));
    }
    for (const Ticket& ticket : tickets) {
      ASSERT_TRUE(ticket->wait_finished(in_a_minute()));
      ASSERT_EQ(ticket->state(), committed) << text_of(ticket->error());
    }
    EXPECT_EQ(world.engine->counts().committed, 12u);
    EXPECT_TRUE(world.engine->wait_idle(in_a_minute()));
    world.close();
    for (uint64_t step = 11; step <= 12; ++step)
      expect_saved(world.disk, tickets[step - 1], states[step - 1]);
  }
}

TEST(Engine, WhoFindsItIdleFindsEveryTicketEnded) {
  const State state = simple_state({10});
  World world(2, 1, 1);
  for (uint64_t step = 1; step <= 300; ++step) {
    const Ticket ticket = world.save(step, state);
    while (world.engine->in_flight() > 0) {  // no waiting: the very first moment counts
    }
    ASSERT_EQ(ticket->state(), committed) << text_of(ticket->error());
    ASSERT_EQ(world.engine->counts().committed, step);
  }
}

TEST(Engine, ASlowDiskDelaysAndNothingElse) {
  // More than the pool holds, so that staging must wait for the disk in the middle of a layer.
  const State state = simple_state({40 * kBlockBytes / 4, 100, 30 * kBlockBytes / 4});
  Gate gate;
  World world(3);
  world.disk.before = [&](const Operation& operation) {
    if (operation.call == "pwrite") gate.wait();
  };
  const Ticket ticket = world.save(1, state);  // returns though the disk takes nothing
  EXPECT_TRUE(gate.somebody_waits());
  EXPECT_FALSE(ticket->wait_staged(0, at_once()));
  EXPECT_EQ(ticket->state(), in_flight);
  gate.open();
  EXPECT_TRUE(ticket->wait_all_staged(in_a_minute()));
  EXPECT_TRUE(ticket->wait_finished(in_a_minute()));
  world.close();
  expect_saved(world.disk, ticket, state);
}

// A run whose committer is held up while it clears up: step 1 is being retired, step 2 committed.
struct HeldUpWhileClearingUp : World {
  HeldUpWhileClearingUp() : World(4, 2, 2, {.keep_last = 1, .max_spares = 2}) {
    disk.before = [this](const Operation& operation) {
      const bool retires = operation.call == "rename" && operation.path == RunOnDisk::path(1);
      if (retires) gate.wait();
    };
    for (const uint64_t step : {uint64_t{1}, uint64_t{2}})
      EXPECT_TRUE(save(step, state)->wait_finished(in_a_minute()));
    EXPECT_TRUE(gate.somebody_waits());
  }
  ~HeldUpWhileClearingUp() {
    gate.open();
    close();
  }

  const State state = simple_state({10});
  Gate gate;
};

TEST(Engine, ItIsSettledWhenItsClearingUpIsOverToo) {
  HeldUpWhileClearingUp world;
  EXPECT_TRUE(world.engine->wait_idle(in_a_minute()));
  EXPECT_FALSE(world.engine->wait_settled(at_once()));
  EXPECT_FALSE(world.engine->wait_settled(Clock::now() + std::chrono::milliseconds(20)));
  world.gate.open();
  EXPECT_TRUE(world.engine->wait_settled(in_a_minute()));
  EXPECT_EQ(world.disk.directories(),
            (std::vector<std::string>{name_of_step(1) + kPartialSuffix, name_of_step(2)}));
}

TEST(Engine, WhatFailedIsSettledToo) {
  const State state = simple_state({10});
  World world(4);
  world.disk.before = [](const Operation& operation) {
    if (operation.call == "pwrite") fail_operation(operation, EIO);
  };
  EXPECT_TRUE(world.save(1, state)->wait_finished(in_a_minute()));
  EXPECT_TRUE(world.engine->wait_settled(in_a_minute()));
}

TEST(Engine, NamingWhatIsKeptDoesNotWaitForTheDisk) {
  HeldUpWhileClearingUp world;
  std::future<void> named = std::async(std::launch::async, [&] { world.disk.run->keep({2}); });
  EXPECT_EQ(named.wait_for(std::chrono::seconds(10)), std::future_status::ready);
  world.gate.open();
  named.get();
  EXPECT_TRUE(world.save(3, world.state)->wait_finished(in_a_minute()));
  EXPECT_TRUE(world.engine->wait_settled(in_a_minute()));
  EXPECT_TRUE(world.disk.exists(RunOnDisk::path(2)));
}

TEST(Engine, StagingRunsAheadOfTheDiskAsFarAsThePoolAllows) {
  const State state = simple_state({1000, 1000});
  Gate gate;
  World world(8);
  world.disk.before = [&](const Operation& operation) {
    if (operation.call == "pwrite") gate.wait();
  };
  const Ticket ticket = world.save(1, state);
  EXPECT_TRUE(ticket->wait_all_staged(in_a_minute())) << "the gates wait for the disk";
  EXPECT_EQ(ticket->state(), in_flight);
  gate.open();
  EXPECT_TRUE(ticket->wait_finished(in_a_minute()));
  expect_saved(world.disk, ticket, state);
}

TEST(Engine, TheFirstLayerIsOnItsWayToTheDiskBeforeTheLastIsHandedOver) {
  const State state = simple_state({4 * kBlockBytes, 10});
  std::latch written(1);
  std::atomic<bool> seen = false;
  World world(3);
  world.disk.before = [&](const Operation& operation) {
    if (operation.call == "pwrite" && !seen.exchange(true)) written.count_down();
  };
  const Ticket ticket = world.begin(1, state);
  ticket->hand_over(0, state.hand_over(0));
  written.wait();
  EXPECT_TRUE(ticket->wait_staged(0, in_a_minute()));
  ticket->hand_over(1, state.hand_over(1));
  ticket->seal(kManifest, std::nullopt);
  EXPECT_TRUE(ticket->wait_finished(in_a_minute()));
  expect_saved(world.disk, ticket, state);
}

TEST(Engine, OneMoreThanMayBeInFlightHasToWait) {
  const State state = simple_state({100});
  Gate gate;
  World world(8, 2, 2);
  world.disk.before = [&](const Operation& operation) {
    if (operation.call == "pwrite") gate.wait();
  };
  std::vector<Ticket> tickets = {world.save(1, state), world.save(2, state)};
  EXPECT_FALSE(world.engine->wait_room(at_once()));
  EXPECT_FALSE(world.engine->wait_idle(at_once()));
  EXPECT_THROW(world.engine->begin(identity_of(3), "third", state.layout, world.disk.target(3)),
               std::logic_error);
  gate.open();
  tickets.push_back(world.save(3, state));
  EXPECT_TRUE(world.engine->wait_idle(in_a_minute()));
  for (const Ticket& ticket : tickets) EXPECT_EQ(ticket->state(), committed);
}

TEST(Engine, TheNextBeginsOnlyWhenTheOneBeforeIsSealedOrHasFailed) {
  const State state = simple_state({100});
  World world(8, 1, 3);
  const Ticket open = world.begin(1, state);
  EXPECT_THROW(world.begin(2, state), std::logic_error);
  open->fail(error_saying("abandoned"));
  const Ticket next = world.save(2, state);
  EXPECT_TRUE(world.engine->wait_idle(in_a_minute()));
  EXPECT_EQ(open->state(), failed);
  expect_saved(world.disk, next, state);
  EXPECT_EQ(world.engine->counts().failed, 1u);
}

TEST(Engine, WhatItCannotDoIsRefusedAndNamed) {
  const auto refusal = [](EngineOptions options, unsigned writers) -> std::string {
    try {
      const Engine engine(options, std::make_unique<HostCopier>(), allocate_host_slots(kBlockBytes),
                          std::make_unique<LocalPersister>(writers));
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_NE(refusal({kBlockBytes, 1}, 0).find("writer threads"), std::string::npos);
  EXPECT_NE(refusal({kBlockBytes, 1}, 257).find("257"), std::string::npos);
  EXPECT_NE(refusal({kBlockBytes, 0}, 1).find("in flight"), std::string::npos);
  EXPECT_NE(refusal({2 * kBlockBytes, 1}, 1).find("staging memory"), std::string::npos);
  EXPECT_EQ(refusal({kBlockBytes, 1}, 1), "");
}

TEST(Engine, APoolTooSmallForTheStateIsRefusedWithWhatItNeeds) {
  Random random(1);
  const State state = fill(Layout::make({{"f", {}, {{"a", "F32", {9}, 0}, {"b", "U8", {9}, 0}}}},
                                        {.block_bytes = kBlockBytes, .layer_count = 1}),
                           random);
  ASSERT_EQ(state.layout->open_blocks(), 3u);
  World world(3);
  try {
    world.begin(1, state);
    FAIL() << "accepted";
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find("at least 4"), std::string::npos) << error.what();
  }
  const auto wide =
      Layout::make(simple_files({1}), {.block_bytes = 2 * kBlockBytes, .layer_count = 1});
  EXPECT_THROW(world.engine->begin(identity_of(1), "1", wide, world.disk.target(1)),
               std::invalid_argument);
  EXPECT_EQ(world.engine->in_flight(), 0u);
  EXPECT_EQ(world.disk.directories().size(), 0u);
}

TEST(Engine, ItsEndFinishesWhatIsSealedAndFailsWhatIsNot) {
  const State state = simple_state({3000, 10});
  Gate gate;
  World world(8, 2, 3);
  world.disk.before = [&](const Operation& operation) {
    if (operation.call == "pwrite") gate.wait();
  };
  const Ticket sealed = world.save(1, state);
  const Ticket open = world.begin(2, state);
  open->hand_over(0, state.hand_over(0));
  EXPECT_TRUE(gate.somebody_waits());
  std::jthread opener([&] { gate.open(); });
  world.close();
  expect_saved(world.disk, sealed, state);
  EXPECT_EQ(open->state(), failed);
  EXPECT_NE(text_of(open->error()).find("never sealed"), std::string::npos);
  EXPECT_EQ(world.disk.directories(), std::vector<std::string>{name_of_step(1)});
}

TEST(Engine, ATicketMayOutliveTheEngineAndTheRun) {
  const State state = simple_state({3000, 10});
  World world(8);
  const Ticket sealed = world.save(1, state);
  const Ticket open = world.begin(2, state);
  world.close();
  world.disk.run.reset();
  EXPECT_EQ(world.disk.open_handles(), 0u) << "a ticket holds the run's lock";
  open->fail(error_saying("late"));
  open->hand_over(0, state.hand_over(0));
  open->open_gate(0);
  open->seal({}, std::nullopt);
  EXPECT_TRUE(open->wait_all_staged(at_once()));
  EXPECT_TRUE(open->wait_finished(at_once()));
  EXPECT_EQ(sealed->state(), committed);
}

TEST(Engine, AnUnknownOutcomeRefusesWhateverWouldFollow) {
  const State state = simple_state({100});
  World world(4);
  std::atomic<bool> published = false;
  world.disk.before = [&](const Operation& operation) {
    if (operation.call == "rename" && step_of_name(operation.to.substr(6))) published = true;
    if (published && operation.call == "sync" && operation.path == MemoryDisk::kRoot)
      fail_operation(operation, EIO);
  };
  const Ticket ticket = world.save(1, state);
  EXPECT_TRUE(ticket->wait_finished(in_a_minute()));
  EXPECT_EQ(ticket->state(), failed);
  EXPECT_THROW(world.begin(2, state), OutcomeUnknown);
}

TEST(Engine, AnUpdateIsNotSparedWhereTrainingHasLatelyHadToWait) {
  const State state = simple_state({400 * kBlockBytes});
  World world(16);
  const auto held_back = [&](uint64_t step) {
    EXPECT_TRUE(world.engine->wait_room(in_a_minute()));
    const Ticket ticket = world.engine->begin(identity_of(step), name_of_step(step), state.layout,
                                              world.disk.target(step), true);
    ticket->block_full();
    const bool held = ticket->leaves_time_to_update();
    hand_over_all(*ticket, state);
    ticket->seal(kManifest, std::nullopt);
    EXPECT_TRUE(ticket->wait_finished(in_a_minute()));
    return std::pair(ticket, held);
  };
  EXPECT_TRUE(held_back(1).second);
  EXPECT_TRUE(held_back(2).second);
  const Ticket waited = world.engine->begin(identity_of(3), name_of_step(3), state.layout,
                                            world.disk.target(3), true);
  EXPECT_FALSE(waited->wait_staged(0, Clock::now() + std::chrono::milliseconds(1)));
  hand_over_all(*waited, state);
  waited->seal(kManifest, std::nullopt);
  EXPECT_FALSE(held_back(4).second);
  uint64_t step = 5;
  while (!held_back(step).second) ASSERT_LT(step++, 40u);
  EXPECT_GT(step, 10u) << "a single step in between proves little";
}

TEST(Engine, FailuresUnderLoadEndTheirTicketsAndFreeEverySlot) {
  const State state = simple_state({5000, 3000, 100});
  World world(3, 3, 3);
  std::atomic<uint64_t> count = 0;
  world.disk.before = [&](const Operation& operation) {
    if ((operation.call == "pwrite" || operation.call == "sync_data") && count++ % 37 == 36)
      fail_operation(operation, EIO);
  };
  std::vector<Ticket> tickets;
  for (uint64_t step = 1; step <= 60; ++step) {
    tickets.push_back(world.begin(step, state));
    for (size_t layer = 0; layer < 3; ++layer) {
      tickets.back()->hand_over(layer, state.hand_over(layer));
      if (step % 5 == 0 && layer == 1) tickets.back()->fail(error_saying("abandoned"));
    }
    tickets.back()->seal(kManifest, std::nullopt);
    ASSERT_TRUE(tickets.back()->wait_all_staged(in_a_minute())) << "step " << step;
  }
  ASSERT_TRUE(world.engine->wait_idle(in_a_minute()));
  EXPECT_EQ(world.engine->free_slots(), world.engine->slot_count());
  const CommitCounts counts = world.engine->counts();
  EXPECT_EQ(counts.committed + counts.failed, 60u);
  EXPECT_GE(counts.failed, 12u);
  EXPECT_GE(counts.committed, 10u);
  world.close();
  Ticket newest;
  for (const Ticket& ticket : tickets)
    if (ticket->state() == committed) newest = ticket;
  expect_saved(world.disk, newest, state);
}

TEST(Engine, ADevicesCopiesOpenTheGatesWithoutAnybodyRinging) {
  const State state = simple_state({2000, 2000});
  auto owned = std::make_unique<ManualCopier>();
  ManualCopier& copier = *owned;
  RunOnDisk disk;
  std::optional<Engine> engine(std::in_place, EngineOptions{kBlockBytes, 1}, std::move(owned),
                               allocate_host_slots(8 * kBlockBytes),
                               std::make_unique<LocalPersister>(1));
  const Ticket ticket =
      engine->begin(identity_of(1), name_of_step(1), state.layout, disk.target(1));
  hand_over_all(*ticket, state);
  ticket->seal(kManifest, std::nullopt);
  EXPECT_FALSE(ticket->wait_staged(0, at_once()));
  copier.release(1);
  EXPECT_TRUE(ticket->wait_staged(0, in_a_minute()));
  EXPECT_FALSE(ticket->wait_staged(1, at_once()));
  copier.release_all();
  EXPECT_TRUE(ticket->wait_finished(in_a_minute()));
  engine.reset();
  expect_saved(disk, ticket, state);
}

// What is begun has failed before the stager knows of it.
class DeadPersister final : public Persister {
 public:
  void start(BlockQueue& /*full*/, Doorbell& /*pushed*/) override {}
  void add(std::shared_ptr<Checkpoint> checkpoint) override {
    {
      const std::lock_guard lock(mutex_);
      checkpoint_ = checkpoint;
    }
    checkpoint->fail(error_saying("nobody is there"));
    for (int time = 0; time < 100; ++time) std::this_thread::yield();  // let the stager look
  }
  size_t in_flight() const override {
    const std::lock_guard lock(mutex_);
    return checkpoint_ ? 1 : 0;
  }
  CommitCounts counts() const override { return {}; }
  void look() override {
    std::shared_ptr<Checkpoint> over;
    {
      const std::lock_guard lock(mutex_);
      if (!checkpoint_ || !checkpoint_->ready_to_discard()) return;
      checkpoint_->end(failed);
      over.swap(checkpoint_);
    }
    over->announce_end();
  }
  std::exception_ptr refusal() const override { return nullptr; }
  std::optional<std::string> take_complaint() override { return std::nullopt; }

 private:
  mutable std::mutex mutex_;  // guards checkpoint_
  std::shared_ptr<Checkpoint> checkpoint_;
};

TEST(Engine, WhatFailsWhileItIsBegunEnds) {
  const State state = simple_state({2000});
  Engine engine({kBlockBytes, 1}, std::make_unique<HostCopier>(),
                allocate_host_slots(8 * kBlockBytes), std::make_unique<DeadPersister>());
  for (uint64_t step = 1; step <= 200; ++step) {
    const Ticket ticket =
        engine.begin(identity_of(step), name_of_step(step), state.layout, nullptr);
    const bool ended = ticket->wait_finished(in_a_minute());
    ticket->wait_all_staged(in_a_minute());  // which rings: or it would never come to an end
    ASSERT_TRUE(ended) << "step " << step;
  }
}

}  // namespace
}  // namespace pccheck::test
