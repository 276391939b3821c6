// What fails, fails alone: whatever goes wrong, and whenever, the checkpoint concerned ends as
// failed and leaves nothing behind, the others stay as they are, and the next one is committed.
#include <gtest/gtest.h>

#include <cerrno>
#include <new>

#include "cpp/host_copier.h"
#include "cpp/manual_copier.h"
#include "tests/cpp/run_on_disk.h"

namespace pccheck::test {
namespace {

using enum Checkpoint::State;

constexpr RunDirectory::Options kKeepOne{.keep_last = 1, .max_spares = 1};

class Faults : public testing::Test {
 protected:
  Faults() : random_(7) {
    state_ = fill(
        Layout::make({{"model.safetensors", {}, {{"a", "F32", {2000}, 0}, {"b", "F16", {3000}, 1}}},
                      {"optimizer.safetensors", {}, {{"m", "F64", {900}, 2}}}},
                     {.block_bytes = kBlockBytes, .layer_count = 3}),
        random_);
  }

  size_t slots() const { return state_.layout->open_blocks() + 1; }

  // Four checkpoints, two at a time, over a run that recycles.
  std::vector<Ticket> save_four(HandRun& hands, RunOnDisk& disk) {
    std::vector<Ticket> tickets;
    for (const uint64_t step : {1, 3}) {
      tickets.push_back(begin_whole(hands, disk, step, state_));
      tickets.push_back(begin_whole(hands, disk, step + 1, state_));
      hands.run();
    }
    return tickets;
  }

  void expect_nothing_held(const HandRun& hands, const RunOnDisk& disk) {
    EXPECT_EQ(hands.pool.free_slots(), hands.pool.slot_count());
    EXPECT_EQ(hands.committer.in_flight(), 0u);
    EXPECT_LE(disk.open_handles(), 2 + kKeepOne.max_spares) << "the run, its lock, the spares";
  }

  // After everything has ended: what is on disk is what was acknowledged, and the next one goes
  // through.
  void expect_recovered(HandRun& hands, RunOnDisk& disk, const std::vector<Ticket>& tickets) {
    expect_nothing_held(hands, disk);
    Ticket newest;
    for (const Ticket& ticket : tickets) {
      ASSERT_NE(ticket->state(), in_flight) << ticket->name() << " never ended";
      ASSERT_EQ(ticket->state() == failed, ticket->error() != nullptr);
      if (ticket->state() == committed) newest = ticket;
    }
    if (newest) expect_saved(disk, newest, state_);
    if (hands.committer.outcome_unknown()) return;  // nothing may follow
    const Ticket next = save(hands, disk, 9, state_);
    expect_saved(disk, next, state_);
    expect_nothing_held(hands, disk);
    // A new process finds nothing that it would not know how to clear away.
    disk.reopen();
    disk.run->remove_spares();
    for (const std::string& name : disk.directories()) {
      const auto step = step_of_name(name);
      ASSERT_TRUE(step) << name << " is left behind";
      ASSERT_TRUE(*step == 9 || tickets.at(*step - 1)->state() == committed) << name;
    }
  }

  Random random_;
  State state_;
};

TEST_F(Faults, AnOperationThatFailsFailsOneCheckpointWhicheverItIs) {
  HostCopier copier;
  size_t operations = 0;
  for (size_t index = 0;; ++index) {
    SCOPED_TRACE("operation " + std::to_string(index));
    RunOnDisk disk(kKeepOne);
    HandRun hands(slots(), kBlockBytes, copier, 11);
    const size_t first = disk.operations();
    std::optional<Operation> hit;
    disk.before = [&](const Operation& operation) {
      if (!hit && disk.operations() == first + index + 1) {
        hit = operation;
        if (index % 5 == 4) throw std::bad_alloc();
        fail_operation(operation, index % 2 == 0 ? EIO : ENOSPC);
      }
      if (!hit || operation.path != hit->path || hit->path == MemoryDisk::kRoot) return;
      EXPECT_FALSE(hit->call.starts_with("sync") && operation.call.starts_with("sync"))
          << "a failed sync was tried again";
      EXPECT_FALSE(hit->call == "sync_data" && operation.call == "pwrite")
          << "a file whose sync has failed was written to";
    };
    const std::vector<Ticket> tickets = save_four(hands, disk);
    if (!hit) {
      operations = index;
      break;
    }
    SCOPED_TRACE(hit->call + " " + hit->path);
    const auto failures = std::ranges::count_if(
        tickets, [](const Ticket& ticket) { return ticket->state() == failed; });
    if (!hands.committer.outcome_unknown()) {
      EXPECT_LE(failures, 1);
      EXPECT_TRUE(failures == 1 || hands.committer.take_complaint()) << "went unreported";
    }
    disk.before = {};
    expect_recovered(hands, disk, tickets);
    if (HasFailure()) break;
  }
  EXPECT_GT(operations, 100u);
}

TEST_F(Faults, ADirectoryWhoseSyncHasFailedIsRemovedNotRecycled) {
  HostCopier copier;
  RunOnDisk disk(kKeepOne);
  HandRun hands(slots(), kBlockBytes, copier, 1);
  bool failed_once = false;
  disk.before = [&](const Operation& operation) {
    if (operation.call == "sync_data" && !std::exchange(failed_once, true))
      fail_operation(operation, EIO);
  };
  const Ticket broken = save(hands, disk, 1, state_);
  EXPECT_EQ(broken->state(), failed);
  EXPECT_NE(text_of(broken->error()).find("sync_data"), std::string::npos);
  EXPECT_TRUE(disk.directories().empty());
  expect_saved(disk, save(hands, disk, 2, state_), state_);
}

TEST_F(Faults, ADiskThatFillsUpAndEmptiesAgainLosesWhatItCouldNotHoldAndNoMore) {
  HostCopier copier;
  RunOnDisk disk(kKeepOne);
  HandRun hands(slots(), kBlockBytes, copier, 1);
  const Ticket first = save(hands, disk, 1, state_);
  disk.before = [&](const Operation& operation) {
    if (operation.call == "pwrite" || operation.call == "allocate")
      fail_operation(operation, ENOSPC);
  };
  for (uint64_t step = 2; step <= 4; ++step) {
    const Ticket full = save(hands, disk, step, state_);
    EXPECT_EQ(full->state(), failed);
    EXPECT_NE(text_of(full->error()).find(name_of_step(step)), std::string::npos);
    expect_nothing_held(hands, disk);
  }
  expect_saved(disk, first, state_);
  EXPECT_EQ(disk.directories(), std::vector<std::string>{name_of_step(1)});
  disk.before = {};
  expect_saved(disk, save(hands, disk, 5, state_), state_);
}

// Fails the n-th call, from 0, to submit() or to done().
class FailingCopier final : public Copier {
 public:
  FailingCopier(int submit, int done) : submit_(submit), done_(done) {}
  bool sums_while_copying() const override { return true; }
  uint64_t submit(std::span<const Piece> pieces, ReadyMark* ready) override {
    if (submit_-- == 0) throw std::runtime_error("the copy could not be started");
    return host_.submit(pieces, ready);
  }
  bool done(uint64_t submission) override {
    if (done_-- == 0) throw std::runtime_error("the copy failed");
    return host_.done(submission);
  }

 private:
  HostCopier host_;
  int submit_, done_;
};

TEST_F(Faults, ACopyThatFailsFailsItsCheckpointAlone) {
  for (const bool at_submit : {true, false})
    for (int index = 0;; ++index) {
      SCOPED_TRACE((at_submit ? "submit " : "done ") + std::to_string(index));
      FailingCopier copier(at_submit ? index : -1, at_submit ? -1 : index);
      RunOnDisk disk(kKeepOne);
      HandRun hands(slots(), kBlockBytes, copier, 5);
      const std::vector<Ticket> tickets = save_four(hands, disk);
      const auto hit = std::ranges::find_if(
          tickets, [](const Ticket& ticket) { return ticket->state() == failed; });
      if (hit == tickets.end()) {
        EXPECT_GE(index, 12) << "three layers, four times";
        break;
      }
      EXPECT_TRUE(text_of((*hit)->error()).starts_with("the copy"));
      EXPECT_EQ(hands.committer.counts().failed, 1u);
      expect_recovered(hands, disk, tickets);
      ASSERT_FALSE(HasFailure());
    }
}

TEST_F(Faults, ATicketAbandonedAtAnyMomentReleasesEverything) {
  HostCopier copier;
  for (int steps = 0; steps < 40; ++steps)
    for (const bool sealed : {false, true}) {
      SCOPED_TRACE((sealed ? "sealed, " : "open, ") + std::to_string(steps) + " steps");
      RunOnDisk disk(kKeepOne);
      HandRun hands(slots(), kBlockBytes, copier, static_cast<uint64_t>(steps));
      const Ticket before = save(hands, disk, 1, state_);
      const Ticket ticket = hands.begin(2, state_.layout, disk.target(2));
      hand_over_all(*ticket, state_);
      if (sealed) ticket->seal(kManifest, std::nullopt);
      for (int i = 0; i < steps; ++i) hands.step();
      const bool too_late = ticket->state() == committed;
      ticket->fail(error_saying("abandoned"));
      hands.run();
      ASSERT_EQ(ticket->state(), too_late ? committed : failed);
      EXPECT_TRUE(ticket->wait_staged(2, at_once()));
      EXPECT_TRUE(ticket->wait_all_staged(at_once()));
      if (!too_late) expect_saved(disk, before, state_);
      expect_recovered(hands, disk, {before, ticket});
      ASSERT_FALSE(HasFailure());
    }
}

TEST_F(Faults, SlotsAndSourcesOfAnAbandonedTicketAreHeldUntilItsCopiesHaveEnded) {
  ManualCopier copier;
  RunOnDisk disk(kKeepOne);
  HandRun hands(slots(), kBlockBytes, copier, 1);
  const Ticket ticket = begin_whole(hands, disk, 1, state_);
  hands.run();
  ASSERT_GE(copier.submitted(), 1u);
  ticket->fail(error_saying("abandoned"));
  hands.run();
  EXPECT_EQ(ticket->state(), in_flight);
  EXPECT_LT(hands.pool.free_slots(), hands.pool.slot_count());
  EXPECT_FALSE(ticket->wait_staged(0, at_once())) << "its memory is still being read";
  copier.release_all();
  hands.run();
  EXPECT_EQ(ticket->state(), failed);
  EXPECT_TRUE(ticket->wait_staged(0, at_once()));
  expect_recovered(hands, disk, {ticket});
}

TEST_F(Faults, AFailureWhileALaterCheckpointIsInFlightLeavesThatOneAlone) {
  HostCopier copier;
  RunOnDisk disk(kKeepOne);
  HandRun hands(slots(), kBlockBytes, copier, 1);
  const Ticket first = begin_whole(hands, disk, 1, state_);
  const Ticket second = begin_whole(hands, disk, 2, state_);
  first->fail(error_saying("abandoned"));
  hands.run();
  EXPECT_EQ(first->state(), failed);
  expect_saved(disk, second, state_);
}

TEST_F(Faults, AFailedCheckpointThatNeverWroteLeavesDirectoriesThatAreNotItsOwn) {
  HostCopier copier;
  RunOnDisk disk(kKeepOne);
  const std::string spare = RunOnDisk::path(1) + ".partial",
                    foreign = RunOnDisk::path(2) + ".partial";
  disk.put(spare + "/model.safetensors", to_bytes("left by a crash"));
  disk.put(foreign + "/model.safetensors", to_bytes("somebody's"));
  disk.put(foreign + "/notes.txt", to_bytes("somebody's notes"));
  disk.reopen();
  HandRun hands(slots(), kBlockBytes, copier, 1);
  for (uint64_t step = 1; step <= 2; ++step) {
    const Ticket ticket = hands.begin(step, state_.layout, disk.target(step));
    ticket->fail(error_saying("abandoned"));
    hands.run();
    EXPECT_EQ(ticket->state(), failed);
  }
  EXPECT_EQ(disk.contents(foreign + "/notes.txt"), to_bytes("somebody's notes"));
  EXPECT_EQ(disk.contents(foreign + "/model.safetensors"), to_bytes("somebody's"));
  // The spare is still there for the next one to recycle.
  expect_saved(disk, save(hands, disk, 3, state_), state_);
  EXPECT_FALSE(disk.exists(spare));
}

}  // namespace
}  // namespace pccheck::test
