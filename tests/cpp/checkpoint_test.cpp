// The ticket's own rules: what it refuses, and what its waits answer.
#include "cpp/checkpoint.h"

#include <gtest/gtest.h>

#include <barrier>
#include <thread>

#include "tests/cpp/hand_run.h"

namespace pccheck::test {
namespace {

class NoTarget final : public Target {
 public:
  std::unique_ptr<File> open(const PayloadFile&) override { return nullptr; }
  std::unique_ptr<File> open_manifest(size_t) override { return nullptr; }
  void publish(const Identity&, std::vector<PersistedFile>&, std::span<const std::byte>) override {}
  void discard() override {}
  void retire() override {}
};

class CheckpointRules : public testing::Test {
 protected:
  State state = simple_state({10, 20});
  int changes = 0;
  Checkpoint ticket{identity_of(1), "step 1", state.layout, std::make_unique<NoTarget>(),
                    Checkpoint::Bells{[this] { ++changes; }, [this] { ++changes; }}};

  template <typename Error, typename Call>
  static std::string refusal(Call call) {
    try {
      call();
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  }
};

TEST_F(CheckpointRules, SourcesThatDoNotFitThePlanAreRefusedAndNamed) {
  const auto refused = [&](size_t layer, HandOver hand_over) {
    return refusal<std::invalid_argument>([&] { ticket.hand_over(layer, std::move(hand_over)); });
  };
  EXPECT_NE(refused(2, state.hand_over(1)).find("no layer 2"), std::string::npos);
  EXPECT_NE(refused(0, {}).find("1 tensors, not 0"), std::string::npos);
  EXPECT_NE(refused(0, state.hand_over(1)).find("80 bytes, not 40"), std::string::npos);
  HandOver two = state.hand_over(0);
  two.sources.push_back(two.sources[0]);
  EXPECT_NE(refused(0, std::move(two)).find("1 tensors, not 2"), std::string::npos);
  EXPECT_EQ(refused(0, state.hand_over(0)), "");
  EXPECT_NE(refused(0, state.hand_over(0)).find("already"), std::string::npos);
  EXPECT_EQ(changes, 1) << "whoever is refused has changed nothing";
}

TEST_F(CheckpointRules, ASealWithoutEveryLayerIsRefusedAndChangesNothing) {
  const auto refused = [&] {
    return refusal<std::logic_error>([&] { ticket.seal({}, std::nullopt); });
  };
  EXPECT_NE(refused().find("layer 0"), std::string::npos);
  ticket.hand_over(0, state.hand_over(0));
  EXPECT_NE(refused().find("layer 1"), std::string::npos);
  EXPECT_TRUE(ticket.awaits_seal());
  ticket.hand_over(1, state.hand_over(1));
  EXPECT_EQ(refused(), "");
  EXPECT_FALSE(ticket.awaits_seal());
  EXPECT_NE(refused().find("sealed already"), std::string::npos);
  EXPECT_THROW(ticket.hand_over(0, state.hand_over(0)), std::invalid_argument);
}

TEST_F(CheckpointRules, AnAdditionThatDoesNotFitIsRefusedAndChangesNothing) {
  for (size_t layer = 0; layer < 2; ++layer) ticket.hand_over(layer, state.hand_over(layer));
  const State one = simple_state({5}), two = simple_state({5, 6});
  const auto wide =
      Layout::make(simple_files({5}), {.block_bytes = 2 * kBlockBytes, .layer_count = 1});
  const auto refused = [&](std::shared_ptr<const Layout> layout, HandOver hand_over) {
    return refusal<std::invalid_argument>(
        [&] { ticket.seal({}, Checkpoint::Addition{std::move(layout), std::move(hand_over)}); });
  };
  EXPECT_NE(refused(one.layout, {}), "");
  EXPECT_NE(refused(one.layout, two.hand_over(1)), "");
  EXPECT_NE(refused(two.layout, two.hand_over(0)), "") << "two layers";
  EXPECT_NE(refused(wide, one.hand_over(0)), "") << "blocks larger than the slots";
  EXPECT_TRUE(ticket.awaits_seal());
  EXPECT_EQ(refused(one.layout, one.hand_over(0)), "");
}

TEST_F(CheckpointRules, TheFirstErrorCounts) {
  EXPECT_FALSE(ticket.error());
  ticket.fail(error_saying("first"));
  ticket.fail(error_saying("second"));
  EXPECT_EQ(text_of(ticket.error()), "first");
  EXPECT_FALSE(ticket.awaits_seal());
}

TEST_F(CheckpointRules, AFailedTicketTakesLayersAndSealsWithoutComplaint) {
  ticket.fail(error_saying("abandoned"));
  ticket.hand_over(0, state.hand_over(0));
  EXPECT_FALSE(ticket.next_layer());
  ticket.seal({}, std::nullopt);
  EXPECT_FALSE(ticket.ready_to_publish());
}

TEST_F(CheckpointRules, WhatHasEndedCanNoLongerFail) {
  ticket.end(Checkpoint::State::committed);
  ticket.announce_end();
  ticket.fail(error_saying("late"));
  EXPECT_EQ(ticket.state(), Checkpoint::State::committed);
  EXPECT_FALSE(ticket.error());
}

// The other process has died, and nobody else will say so.
TEST(CheckpointRace, WhatFailsElsewhereHasFailedThoughItsPublicationBeginsAtThatMoment) {
  const State state = simple_state({10});
  std::unique_ptr<Checkpoint> ticket;
  std::barrier together(2);
  constexpr int kTimes = 20'000;
  std::jthread publisher([&] {
    for (int time = 0; time < kTimes; ++time) {
      together.arrive_and_wait();
      try {
        ticket->begin_publishing();
      } catch (const std::runtime_error&) {
        // It came second.
      }
      together.arrive_and_wait();
    }
  });
  int lost = 0;
  for (int time = 0; time < kTimes; ++time) {
    ticket = std::make_unique<Checkpoint>(identity_of(1), "step 1", state.layout, nullptr,
                                          Checkpoint::Bells{[] {}, [] {}});
    together.arrive_and_wait();
    ticket->failed_elsewhere(error_saying("died"));
    together.arrive_and_wait();
    lost += ticket->error() == nullptr;
  }
  EXPECT_EQ(lost, 0);
}

TEST_F(CheckpointRules, NothingIsCalledBackAfterTheEnd) {
  // The engine that made it may be gone by then.
  ticket.fail(error_saying("abandoned"));
  ticket.end(Checkpoint::State::failed);
  ticket.announce_end();
  const int at_the_end = changes;
  ticket.hand_over(0, state.hand_over(0));
  ticket.open_gate(0);
  ticket.fail(error_saying("again"));
  ticket.seal({}, std::nullopt);
  EXPECT_EQ(changes, at_the_end);
}

TEST_F(CheckpointRules, WaitsEndWithTheirTimeOrWithTheEvent) {
  EXPECT_FALSE(ticket.wait_staged(0, at_once()));
  EXPECT_FALSE(ticket.wait_finished(at_once()));
  {
    std::jthread waiter([&] {
      EXPECT_TRUE(ticket.wait_staged(0, in_a_minute()));
      EXPECT_TRUE(ticket.wait_all_staged(in_a_minute()));
      EXPECT_TRUE(ticket.wait_finished(in_a_minute()));
    });
    for (size_t layer = 0; layer < 2; ++layer) ticket.hand_over(layer, state.hand_over(layer));
    ticket.layer_staged();
    ticket.layer_staged();
    ticket.seal({}, std::nullopt);
    ticket.end(Checkpoint::State::committed);
    ticket.announce_end();
  }
  EXPECT_TRUE(ticket.wait_finished(at_once()));
}

}  // namespace
}  // namespace pccheck::test
