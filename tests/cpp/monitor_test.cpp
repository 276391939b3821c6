// A monitor on a thread, to which a test speaks as a trainer would: message by message, over a real
// channel and real memory, with a child process whose death stands for the trainer's.
#include "cpp/monitor.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/mman.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <thread>

#include "cpp/crc32c.h"
#include "cpp/monitor_process.h"
#include "tests/cpp/file_size_limit.h"
#include "tests/cpp/hand_run.h"
#include "tests/cpp/monitor_world.h"

namespace pccheck::test {
namespace {

using namespace messages;
using Outcome = Monitor::Outcome;

const Bytes kManifest = to_bytes(R"({"a":"manifest"})");

std::vector<FilePlan> plans_of(const Layout& layout) {
  std::vector<FilePlan> plans;
  for (const PayloadFile& file : layout.files())
    plans.push_back({file.name, file.size_bytes, file.grid_begin});
  return plans;
}

// A part of a trainer: what it says, what it hears, its memory and its process.
class HandTrainer {
 public:
  explicit HandTrainer(size_t slots = 64) : HandTrainer(Channel::make_pair(), slots) {}
  ~HandTrainer() {
    kill();
    hang_up();
    if (monitor_.joinable()) monitor_.join();
  }

  Hello hello() const {
    return {.path = run(),
            .block_bytes = kBlockBytes,
            .writer_threads = 2,
            .keep_last = 0,
            .max_spares = 2,
            .lock_timeout_s = 0,
            .drain_timeout_s = 60};
  }

  void say(const FromTrainer& message) { say_raw(encode(message)); }
  void say_raw(const Bytes& bytes) { channel_->send(bytes); }
  void greet(const Hello& hello) {
    const Descriptor pidfd = open_pidfd(child_.id());
    const std::array<int, 2> descriptors{slots_->descriptor(), pidfd.get()};
    channel_->send(encode(FromTrainer{hello}), descriptors);
  }

  // From here on the monitor serves; what was said before it finds all at once.
  void start_monitor() {
    monitor_ = std::thread([this, channel = std::move(monitors_end_)]() mutable {
      try {
        Monitor monitor(std::move(*channel));
        outcome_ = monitor.run();
      } catch (const std::exception& error) {
        error_ = error.what();
      }
    });
  }
  void start() {
    greet(hello());
    start_monitor();
    ASSERT_TRUE(std::holds_alternative<Ready>(hear()));
  }

  // The next thing the monitor says; what it says about slots is noted.
  FromMonitor hear() {
    while (true) {
      const FromMonitor message = decode_from_monitor(next_bytes());
      if (!std::holds_alternative<Freed>(message)) return message;
      note(std::get<Freed>(message));
    }
  }
  void hear_freed() { note(std::get<Freed>(decode_from_monitor(next_bytes()))); }
  template <typename Kind>
  Kind hear_a() {
    const FromMonitor message = hear();
    if (!std::holds_alternative<Kind>(message))
      throw std::runtime_error("the monitor said something of kind " +
                               std::to_string(message.index()));
    return std::get<Kind>(message);
  }

  // How the checkpoint ended. That it is failing need not be said before, where it has ended by
  // then.
  Ended hear_end(uint64_t ticket) {
    while (true) {
      const FromMonitor message = hear();
      if (const auto* failing = std::get_if<Failing>(&message)) {
        EXPECT_EQ(failing->ticket, ticket);
        continue;
      }
      EXPECT_EQ(std::get<Ended>(message).ticket, ticket);
      return std::get<Ended>(message);
    }
  }

  void begin(uint64_t ticket, uint64_t step, const State& state) {
    say(Begin{ticket, identity_of(step), name_of_step(step), plans_of(*state.layout)});
  }
  // Puts a block into a slot and lends it.
  void lend(uint64_t ticket, const State& state, uint32_t file, uint64_t block) {
    lend_part(ticket, *state.layout, state.file(file), file, block, Lending());
  }
  struct Lending {
    uint32_t first_file = 0;
    bool summed = true;
  };
  void lend_all(uint64_t ticket, const State& state) { lend_all(ticket, state, Lending()); }
  void lend_all(uint64_t ticket, const State& state, Lending how) {
    for (uint32_t file = 0; file < state.layout->files().size(); ++file) {
      const Bytes whole = state.file(file);
      for (uint64_t block = 0; block < state.layout->block_count(file); ++block)
        lend_part(ticket, *state.layout, whole, file, block, how);
    }
  }
  void save(uint64_t ticket, uint64_t step, const State& state) {
    begin(ticket, step, state);
    lend_all(ticket, state);
    say(Seal{ticket, kManifest});
  }

  void kill() { child_.kill(); }
  void hang_up() { channel_.reset(); }

  // What the monitor's run() came to.
  Outcome outcome() {
    const Clock::time_point asked = Clock::now();
    join();
    EXPECT_LT(Clock::now() - asked, std::chrono::seconds(30)) << "it waited for its deadline";
    EXPECT_EQ(error_, "");
    return outcome_.value_or(Outcome::refused);
  }
  std::string error() {
    join();
    return error_;
  }

  std::string run() const { return temp_ / "run"; }
  size_t lent() const { return lent_.size(); }
  size_t freed() const { return freed_; }
  SharedSlots& slots() { return *slots_; }
  Channel& channel() { return *channel_; }

  void expect_committed(uint64_t step, const State& state) {
    expect_on_disk(run(), name_of_step(step), identity_of(step), state, kManifest);
  }
  std::vector<std::string> checkpoints() const { return checkpoints_in(run()); }

  const TempDir& temp() const { return temp_; }
  pid_t child() const { return child_.id(); }

 private:
  HandTrainer(std::pair<Channel, Channel> ends, size_t slots)
      : slots_(std::in_place, slots * kBlockBytes),
        channel_(std::move(ends.first)),
        monitors_end_(std::move(ends.second)) {}

  void lend_part(uint64_t ticket, const Layout& layout, const Bytes& whole, uint32_t file,
                 uint64_t block, Lending how) {
    size_t slot = 0;
    while (lent_.contains(slot)) ++slot;
    ASSERT_LE((slot + 1) * kBlockBytes, slots_->bytes().size()) << "no slot is free";
    const size_t bytes = layout.block_size(file, block);
    const auto part = std::span(whole).subspan(layout.block_offset(file, block), bytes);
    std::ranges::copy(part, slots_->bytes().begin() + static_cast<ptrdiff_t>(slot * kBlockBytes));
    lent_.insert(slot);
    say(Staged{.ticket = ticket,
               .file = how.first_file + file,
               .block = block,
               .bytes = bytes,
               .slot = slot,
               .crc = how.summed ? crc32c(0, part) : 0,
               .summed = how.summed});
  }

  void note(const Freed& freed) {
    EXPECT_TRUE(lent_.erase(freed.slot)) << "slot " << freed.slot << " was not lent";
    ++freed_;
  }

  Bytes next_bytes() {
    pollfd readable{channel_->descriptor(), POLLIN, 0};
    while (true) {
      if (std::optional<Message> message = channel_->receive()) return std::move(message->bytes);
      const int ready = ::poll(&readable, 1, 60'000);
      if (ready == 0) throw std::runtime_error("the monitor says nothing");
    }
  }

  void join() {
    if (monitor_.joinable()) monitor_.join();
  }

  IdleChild child_;  // first: no thread has been started yet
  TempDir temp_;
  std::optional<SharedSlots> slots_;
  std::optional<Channel> channel_, monitors_end_;
  std::set<size_t> lent_;
  size_t freed_ = 0;
  std::optional<Outcome> outcome_;
  std::string error_;
  std::thread monitor_;
};

// -- a trainer that lives -------------------------------------------------------------------------

TEST(Monitor, CommitsWhatIsSealedAndGivesEverySlotBackBeforeItSaysSo) {
  HandTrainer trainer;
  trainer.start();
  Random random(1);
  size_t blocks = 0;
  for (uint64_t step = 1; step <= 8; ++step) {
    State state = random_state(random);
    while (state.layout->block_bytes() != kBlockBytes) state = random_state(random);
    for (uint32_t f = 0; f < state.layout->files().size(); ++f)
      blocks += state.layout->block_count(f);
    trainer.save(step, step, state);
    const auto ended = trainer.hear_a<Ended>();
    EXPECT_EQ(ended.ticket, step);
    EXPECT_TRUE(ended.committed) << ended.failure.text;
    EXPECT_FALSE(ended.outcome_unknown);
    EXPECT_EQ(trainer.lent(), 0u);
    trainer.expect_committed(step, state);
  }
  EXPECT_EQ(trainer.freed(), blocks);
  trainer.say(Close{});
  EXPECT_EQ(trainer.hear_a<Closed>().complaint, "");
  EXPECT_TRUE(lock_is_free(trainer.run())) << "the lock is free before it is said that it is";
  EXPECT_EQ(trainer.outcome(), Outcome::closed);
}

TEST(Monitor, HoldsTheDirectoryUntilItEnds) {
  HandTrainer trainer;
  trainer.start();
  EXPECT_FALSE(lock_is_free(trainer.run()));
  trainer.kill();
  EXPECT_EQ(trainer.outcome(), Outcome::trainer_died);
  EXPECT_TRUE(lock_is_free(trainer.run()));
}

TEST(Monitor, SumsBlocksThatTheTrainerHasNotSummed) {
  HandTrainer trainer;
  trainer.start();
  const State state = simple_state({3000, 1, 2000});
  trainer.begin(1, 1, state);
  trainer.lend_all(1, state, {.summed = false});
  trainer.say(Seal{1, kManifest});
  EXPECT_TRUE(trainer.hear_a<Ended>().committed);
  trainer.expect_committed(1, state);
}

TEST(Monitor, TakesFilesThatAreKnownOnlyAtTheEnd) {
  HandTrainer trainer;
  trainer.start();
  const State model = simple_state({3000}, 1);
  State extra = simple_state({500, 900}, 2);
  Random random(3);
  std::vector<FileSpec> specs = simple_files({500, 900});
  specs[0].name = "extra.safetensors";
  extra = fill(Layout::make(specs, {.block_bytes = kBlockBytes, .layer_count = 2}), random);
  trainer.begin(1, 1, model);
  trainer.lend_all(1, model);
  trainer.say(Addition{1, plans_of(*extra.layout)});
  trainer.lend_all(1, extra, {.first_file = 1});
  trainer.say(Seal{1, kManifest});
  EXPECT_TRUE(trainer.hear_a<Ended>().committed);
  const std::string path = trainer.run() + "/" + name_of_step(1) + "/";
  EXPECT_EQ(read_file(path + "model.safetensors"), model.file(0));
  EXPECT_EQ(read_file(path + "extra.safetensors"), extra.file(0));
  CheckpointReader(trainer.run(), name_of_step(1)).verify(1);
}

TEST(Monitor, BlocksOfSeveralCheckpointsMayComeMixed) {
  HandTrainer trainer;
  trainer.start();
  const State one = simple_state({5000}, 1), other = simple_state({5000}, 2);
  trainer.begin(11, 1, one);
  trainer.begin(22, 2, other);
  for (uint64_t block = 0; block < one.layout->block_count(0); ++block) {
    trainer.lend(22, other, 0, block);
    trainer.lend(11, one, 0, block);
  }
  trainer.say(Seal{22, kManifest});
  trainer.say(Seal{11, kManifest});
  EXPECT_EQ(trainer.hear_a<Ended>().ticket, 11u) << "in the order in which they were begun";
  EXPECT_EQ(trainer.hear_a<Ended>().ticket, 22u);
  trainer.expect_committed(1, one);
  trainer.expect_committed(2, other);
}

TEST(Monitor, AnAbandonedCheckpointLeavesNothingAndItsSlotsComeBack) {
  HandTrainer trainer;
  trainer.start();
  const State state = simple_state({9000});
  trainer.begin(1, 1, state);
  for (uint64_t block = 0; block < 5; ++block) trainer.lend(1, state, 0, block);
  trainer.say(Abandon{1, "the scaler voided the step"});
  const Ended ended = trainer.hear_end(1);
  EXPECT_FALSE(ended.committed);
  EXPECT_EQ(ended.failure.text, "the scaler voided the step");
  EXPECT_EQ(trainer.lent(), 0u);
  EXPECT_TRUE(trainer.checkpoints().empty());
  trainer.save(2, 2, state);
  EXPECT_TRUE(trainer.hear_a<Ended>().committed);
}

TEST(Monitor, TellsOfADiskErrorAtOnceAndEndsTheCheckpointWhenTheTrainerLetsGo) {
  HandTrainer trainer;
  trainer.start();
  const State state = simple_state({20'000});
  {
    const FileSizeLimit limit(kBlockBytes);
    trainer.begin(1, 1, state);
    for (uint64_t block = 0; block < 10; ++block) trainer.lend(1, state, 0, block);
    const auto failing = trainer.hear_a<Failing>();
    EXPECT_EQ(failing.ticket, 1u);
    EXPECT_EQ(failing.failure.code, EFBIG);
    EXPECT_NE(failing.failure.text.find("step-00000001.partial/model.safetensors"),
              std::string::npos)
        << failing.failure.text;
    trainer.say(Abandon{1, "what the monitor said"});
    const auto ended = trainer.hear_a<Ended>();
    EXPECT_FALSE(ended.committed);
    EXPECT_FALSE(ended.outcome_unknown);
    EXPECT_EQ(ended.failure.code, EFBIG) << "the first error counts";
    EXPECT_EQ(trainer.lent(), 0u);
  }
  EXPECT_TRUE(trainer.checkpoints().empty());
  trainer.save(2, 2, state);
  EXPECT_TRUE(trainer.hear_a<Ended>().committed) << "the next one is not concerned";
  trainer.expect_committed(2, state);
}

// Its Seal was on its way when it failed: nothing more will ever be heard of it.
TEST(Monitor, ACheckpointThatIsSealedAfterItFailedEndsToo) {
  HandTrainer trainer;
  trainer.start();
  const State state = simple_state({1000});
  const FileSizeLimit limit(kBlockBytes / 2);
  trainer.begin(1, 1, state);
  trainer.lend_all(1, state);
  EXPECT_EQ(trainer.hear_a<Failing>().failure.code, EFBIG);
  while (trainer.lent() > 0) trainer.hear_freed();
  trainer.say(Seal{1, kManifest});
  EXPECT_EQ(trainer.hear_end(1).failure.code, EFBIG);
}

TEST(Monitor, ACheckpointThatIsThereAlreadyIsNotTouched) {
  HandTrainer trainer;
  trainer.start();
  const State first = simple_state({1000}, 1), second = simple_state({1000}, 2);
  trainer.save(1, 1, first);
  EXPECT_TRUE(trainer.hear_a<Ended>().committed);
  trainer.save(2, 1, second);
  const Ended ended = trainer.hear_end(2);
  EXPECT_FALSE(ended.committed);
  EXPECT_EQ(ended.failure.code, EEXIST);
  trainer.expect_committed(1, first);
}

TEST(Monitor, ANameThatLeadsElsewhereFailsItsCheckpointAlone) {
  HandTrainer trainer;
  trainer.start();
  const State state = simple_state({100});
  for (const std::string name : {"../escaped", "/tmp", "."}) {
    trainer.say(Begin{1, identity_of(1), name, plans_of(*state.layout)});
    trainer.lend_all(1, state);
    trainer.say(Seal{1, kManifest});
    EXPECT_FALSE(trainer.hear_end(1).committed) << name;
  }
  EXPECT_EQ(names_in(trainer.temp().path()), std::vector<std::string>{"run"});
  trainer.save(2, 2, state);
  EXPECT_TRUE(trainer.hear_a<Ended>().committed);
}

TEST(Monitor, SetsLaterCheckpointsAsideAndSaysWhich) {
  HandTrainer trainer;
  trainer.start();
  const State state = simple_state({100});
  for (uint64_t step = 1; step <= 3; ++step) {
    trainer.save(step, step, state);
    EXPECT_TRUE(trainer.hear_a<Ended>().committed);
  }
  trainer.say(SetAside{1});
  EXPECT_EQ(trainer.hear_a<Names>().names,
            (std::vector<std::string>{"step-00000002", "step-00000003"}));
  EXPECT_EQ(trainer.checkpoints(), (std::vector<std::string>{"step-00000001", "step-00000002.stale",
                                                             "step-00000003.stale"}));
}

TEST(Monitor, RetiresRecyclesAndClearsWhatIsLeftAtTheEnd) {
  HandTrainer trainer;
  Hello hello = trainer.hello();
  hello.keep_last = 1;
  trainer.greet(hello);
  trainer.start_monitor();
  trainer.hear_a<Ready>();
  const State state = simple_state({5000});
  std::set<ino_t> inodes;
  for (uint64_t step = 1; step <= 12; ++step) {
    trainer.save(step, step, state);
    EXPECT_TRUE(trainer.hear_a<Ended>().committed);
    inodes.insert(inode_of(trainer.run() + "/" + name_of_step(step) + "/model.safetensors"));
  }
  EXPECT_LT(inodes.size(), 8u) << "no file was overwritten";
  trainer.kill();
  EXPECT_EQ(trainer.outcome(), Outcome::trainer_died);
  EXPECT_EQ(trainer.checkpoints(), std::vector<std::string>{"step-00000012"});
  trainer.expect_committed(12, state);
}

// A socket holds some hundred messages. The last of them must not be left unsent for want of an
// event when the trainer reads again.
TEST(Monitor, ATrainerThatDoesNotReadForALongTimeStillHearsEverything) {
  size_t capacity = 0;
  {
    auto [one, other] = Channel::make_pair();
    while (one.try_send(encode(FromMonitor{Freed{1}}))) ++capacity;
  }
  // Around the number at which the very last message is the first for which there is no room.
  for (size_t blocks = capacity - 2; blocks <= capacity + 2; ++blocks)
    for (int time = 0; time < 4; ++time) {
      HandTrainer trainer(blocks);
      trainer.start();
      const State state = simple_state({(blocks - 1) * kBlockBytes / 4});
      ASSERT_EQ(state.layout->block_count(0), blocks);
      trainer.save(1, 1, state);
      const std::string committed = trainer.run() + "/" + name_of_step(1);
      while (!std::filesystem::exists(committed)) std::this_thread::yield();
      ASSERT_TRUE(trainer.hear_a<Ended>().committed);
      ASSERT_EQ(trainer.freed(), blocks);
    }
}

TEST(Monitor, OneWithoutASingleTensorIsACheckpointToo) {
  HandTrainer trainer;
  trainer.start();
  trainer.say(Begin{1, identity_of(1), name_of_step(1), {}});
  trainer.say(Seal{1, kManifest});
  EXPECT_TRUE(trainer.hear_a<Ended>().committed);
  CheckpointReader(trainer.run(), name_of_step(1)).verify(1);
}

TEST(Monitor, AManifestLongerThanAPacketArrives) {
  HandTrainer trainer;
  trainer.start();
  const Bytes manifest(3 << 20, std::byte{' '});
  const State state = simple_state({100});
  trainer.begin(1, 1, state);
  trainer.lend_all(1, state);
  trainer.say(Seal{1, manifest});
  EXPECT_TRUE(trainer.hear_a<Ended>().committed);
  expect_on_disk(trainer.run(), name_of_step(1), identity_of(1), state, manifest);
}

// -- a trainer that dies --------------------------------------------------------------------------

TEST(Monitor, WhatWasSealedIsCommittedAfterTheTrainerWasKilled) {
  for (int time = 0; time < 5; ++time) {
    HandTrainer trainer;
    trainer.start();
    const State one = simple_state({20'000}, 1), other = simple_state({5000, 8000}, 2);
    trainer.save(1, 1, one);
    trainer.save(2, 2, other);
    trainer.kill();  // the channel stays open, as in a forked worker that lives on
    EXPECT_EQ(trainer.outcome(), Outcome::trainer_died);
    trainer.expect_committed(1, one);
    trainer.expect_committed(2, other);
    EXPECT_EQ(trainer.checkpoints().size(), 2u);
    EXPECT_TRUE(lock_is_free(trainer.run()));
  }
}

TEST(Monitor, WhatATrainerSaidBeforeItDiedCountsThoughItWasNotReadYet) {
  HandTrainer trainer;
  const State state = simple_state({20'000});
  trainer.greet(trainer.hello());
  trainer.save(1, 1, state);
  trainer.kill();
  trainer.start_monitor();
  EXPECT_EQ(trainer.outcome(), Outcome::trainer_died);
  trainer.expect_committed(1, state);
}

TEST(Monitor, ATrainerThatLetsGoOfTheChannelHasGoneThoughItLives) {
  HandTrainer trainer;
  trainer.start();
  const State state = simple_state({20'000});
  trainer.save(1, 1, state);
  trainer.hang_up();
  EXPECT_EQ(trainer.outcome(), Outcome::trainer_died);
  trainer.expect_committed(1, state);
  EXPECT_TRUE(lock_is_free(trainer.run()));
}

TEST(Monitor, WhatWasNotSealedLeavesNothing) {
  HandTrainer trainer;
  trainer.start();
  const State state = simple_state({9000});
  trainer.save(1, 1, state);
  trainer.hear_a<Ended>();
  trainer.save(2, 2, state);
  trainer.begin(3, 3, state);
  trainer.lend_all(3, state);  // all of it, and no Seal
  trainer.begin(4, 4, state);
  trainer.lend(4, state, 0, 3);
  trainer.begin(5, 5, state);  // nothing of it
  trainer.kill();
  EXPECT_EQ(trainer.outcome(), Outcome::trainer_died);
  EXPECT_EQ(trainer.checkpoints(), (std::vector<std::string>{"step-00000001", "step-00000002"}));
  trainer.expect_committed(2, state);
}

TEST(Monitor, ADyingTrainersLateCheckpointDoesNotHoldUpTheOnesBehindIt) {
  HandTrainer trainer;
  trainer.start();
  const State state = simple_state({9000});
  trainer.begin(1, 1, state);
  trainer.lend(1, state, 0, 0);
  trainer.save(2, 2, state);
  trainer.kill();
  EXPECT_EQ(trainer.outcome(), Outcome::trainer_died);
  EXPECT_EQ(trainer.checkpoints(), (std::vector<std::string>{"step-00000002"}));
}

TEST(Monitor, ADiskErrorAfterTheTrainersDeathEndsItToo) {
  HandTrainer trainer;
  trainer.greet(trainer.hello());
  const State state = simple_state({20'000}), small = simple_state({10});
  trainer.save(1, 1, state);
  trainer.save(2, 2, small);
  trainer.kill();
  const FileSizeLimit limit(2 * kBlockBytes);
  trainer.start_monitor();
  EXPECT_EQ(trainer.outcome(), Outcome::trainer_died);
  EXPECT_EQ(trainer.checkpoints(), (std::vector<std::string>{"step-00000002"}));
  EXPECT_TRUE(lock_is_free(trainer.run()));
}

TEST(Monitor, ATrainerThatDiesWhileItClosesLeavesNothingEither) {
  HandTrainer trainer;
  trainer.greet(trainer.hello());
  const State state = simple_state({20'000});
  trainer.save(1, 1, state);
  trainer.say(Close{});
  trainer.kill();
  trainer.start_monitor();
  const Outcome outcome = trainer.outcome();
  EXPECT_TRUE(outcome == Outcome::closed || outcome == Outcome::trainer_died);
  trainer.expect_committed(1, state);
  EXPECT_TRUE(lock_is_free(trainer.run()));
}

TEST(Monitor, NeverDrainsLongerThanItMay) {
  HandTrainer trainer(260);
  Hello hello = trainer.hello();
  hello.drain_timeout_s = 0;
  trainer.greet(hello);
  const State state = simple_state({250 * kBlockBytes / 4});
  trainer.save(1, 1, state);
  trainer.kill();
  trainer.start_monitor();
  EXPECT_EQ(trainer.outcome(), Outcome::drain_timeout);
}

TEST(Monitor, AsLongAsThereIsTimeItDrains) {
  // Beyond what a clock or poll() can count: not a moment, but for ever.
  for (const double seconds : {1e3, 4294967.3, 1e7, 1e10, 1e12}) {
    HandTrainer trainer;
    Hello hello = trainer.hello();
    hello.drain_timeout_s = seconds;
    trainer.greet(hello);
    const State state = simple_state({20'000});
    trainer.save(1, 1, state);
    trainer.kill();
    trainer.start_monitor();
    EXPECT_EQ(trainer.outcome(), Outcome::trainer_died) << seconds;
    trainer.expect_committed(1, state);
  }
}

// -- trainers that cannot be served ---------------------------------------------------------------

Failure refusal(HandTrainer& trainer) {
  trainer.start_monitor();
  const auto refused = trainer.hear_a<Refused>();
  EXPECT_EQ(trainer.outcome(), Outcome::refused);
  return refused.failure;
}

TEST(Monitor, RefusesADirectoryThatAnotherHolds) {
  HandTrainer trainer;
  const auto other = open_run_directory(trainer.run(), {.keep_last = 0, .max_spares = 0},
                                        std::chrono::seconds(0), [] {});
  trainer.greet(trainer.hello());
  const Failure failure = refusal(trainer);
  EXPECT_EQ(failure.code, 0);
  EXPECT_NE(failure.text.find("another process is writing checkpoints to " + trainer.run()),
            std::string::npos)
      << failure.text;
}

TEST(Monitor, WaitsForADirectoryThatComesFree) {
  HandTrainer trainer;
  auto other = open_run_directory(trainer.run(), {.keep_last = 0, .max_spares = 0},
                                  std::chrono::seconds(0), [] {});
  Hello hello = trainer.hello();
  hello.lock_timeout_s = 60;
  trainer.greet(hello);
  trainer.start_monitor();
  EXPECT_FALSE(trainer.channel().receive());
  other.reset();
  EXPECT_NO_THROW(trainer.hear_a<Ready>());
}

TEST(Monitor, StopsWaitingForTheDirectoryWhenTheTrainerDies) {
  HandTrainer trainer;
  const auto other = open_run_directory(trainer.run(), {.keep_last = 0, .max_spares = 0},
                                        std::chrono::seconds(0), [] {});
  Hello hello = trainer.hello();
  hello.lock_timeout_s = 1e6;
  trainer.greet(hello);
  trainer.start_monitor();
  trainer.kill();
  EXPECT_EQ(trainer.outcome(), Outcome::refused);
}

TEST(Monitor, StopsWaitingForTheDirectoryWhenTheTrainerLetsGo) {
  HandTrainer trainer;
  const auto other = open_run_directory(trainer.run(), {.keep_last = 0, .max_spares = 0},
                                        std::chrono::seconds(0), [] {});
  Hello hello = trainer.hello();
  hello.lock_timeout_s = 1e6;
  trainer.greet(hello);
  trainer.start_monitor();
  trainer.hang_up();  // interrupted from the keyboard, say; the process lives on
  EXPECT_EQ(trainer.outcome(), Outcome::refused);
}

TEST(Monitor, RefusesWhatItCannotBeginWith) {
  {
    HandTrainer trainer;
    write_file(trainer.run(), {});
    trainer.greet(trainer.hello());
    EXPECT_EQ(refusal(trainer).code, ENOTDIR);
  }
  const auto refusal_of = [](auto change) {
    HandTrainer trainer;
    Hello hello = trainer.hello();
    change(hello);
    trainer.greet(hello);
    const Failure failure = refusal(trainer);
    EXPECT_FALSE(std::filesystem::exists(trainer.run())) << "refused after something was made";
    return failure.text;
  };
  EXPECT_NE(refusal_of([](Hello& hello) { ++hello.version; }).find("not built together"),
            std::string::npos);
  EXPECT_NE(refusal_of([](Hello& hello) { hello.writer_threads = 0; }).find("writer threads"),
            std::string::npos);
  EXPECT_NE(refusal_of([](Hello& hello) { hello.block_bytes = 0; }).find("block"),
            std::string::npos);
}

TEST(Monitor, RefusesMemoryThatMightShrinkAndGreetingsWithoutIt) {
  {
    HandTrainer trainer;
    const Descriptor memory(::memfd_create("pccheck-test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    ASSERT_EQ(::ftruncate(memory.get(), kBlockBytes), 0);
    const Descriptor pidfd = open_pidfd(trainer.child());
    const std::array<int, 2> descriptors{memory.get(), pidfd.get()};
    trainer.channel().send(encode(FromTrainer{trainer.hello()}), descriptors);
    EXPECT_NE(refusal(trainer).text.find("shrink"), std::string::npos);
  }
  {
    HandTrainer trainer;
    trainer.say(trainer.hello());
    EXPECT_NE(refusal(trainer).text.find("not built together"), std::string::npos);
  }
}

TEST(Monitor, RefusesOtherWordsThanAGreeting) {
  for (const Bytes& bytes : {encode(FromTrainer{Close{}}), to_bytes("\xff"), Bytes{}}) {
    HandTrainer trainer;
    trainer.say_raw(bytes);
    EXPECT_NE(refusal(trainer).text, "");
  }
}

TEST(Monitor, ATrainerThatIsGoneBeforeItGreetsIsNoTrouble) {
  HandTrainer trainer;
  trainer.hang_up();
  trainer.start_monitor();
  EXPECT_EQ(trainer.outcome(), Outcome::refused);
}

// -- a trainer that talks nonsense ----------------------------------------------------------------

// What must end it, said between a sealed checkpoint and an unsealed one.
void expect_gives_up_at(const FromTrainer& nonsense, const std::string& saying) {
  HandTrainer trainer;
  trainer.greet(trainer.hello());
  const State state = simple_state({20'000});
  trainer.save(1, 1, state);
  trainer.begin(2, 2, state);
  trainer.lend(2, state, 0, 0);
  trainer.say(nonsense);
  trainer.start_monitor();
  EXPECT_NE(trainer.error().find(saying), std::string::npos) << trainer.error();
  trainer.expect_committed(1, state);
  EXPECT_EQ(trainer.checkpoints(), std::vector<std::string>{"step-00000001"});
  EXPECT_TRUE(lock_is_free(trainer.run()));
}

TEST(Monitor, CommitsWhatIsSealedBeforeItGivesUpOnNonsense) {
  const Staged fits{.ticket = 2, .file = 0, .block = 1, .bytes = kBlockBytes, .slot = 60};
  const auto with = [&](auto change) {
    Staged staged = fits;
    change(staged);
    return staged;
  };
  const std::string cannot_be = "a block that cannot be";
  expect_gives_up_at(with([](Staged& s) { s.ticket = 3; }), "a ticket that is not in flight");
  expect_gives_up_at(with([](Staged& s) { s.file = 1; }), cannot_be);
  expect_gives_up_at(with([](Staged& s) { s.block = 1 << 20; }), cannot_be);
  expect_gives_up_at(with([](Staged& s) { s.bytes = kBlockBytes - 1; }), cannot_be);
  expect_gives_up_at(with([](Staged& s) { s.slot = 64; }), cannot_be);
  expect_gives_up_at(with([](Staged& s) { s.slot = ~uint64_t{0}; }), cannot_be);
  expect_gives_up_at(Seal{3, {}}, "a ticket that is not in flight");
  expect_gives_up_at(Abandon{3, ""}, "a ticket that is not in flight");
  expect_gives_up_at(Addition{3, {}}, "a ticket that is not in flight");
  expect_gives_up_at(Hello{}, "a second greeting");
  expect_gives_up_at(Begin{3, identity_of(3), "step-00000003", {{"f", 1, 2}}}, "ends before");
}

TEST(Monitor, WhenItGivesUpTheTrainerFindsTheChannelEnded) {
  HandTrainer trainer;
  trainer.start();
  trainer.say_raw(to_bytes("\xff nonsense"));
  EXPECT_THROW(trainer.hear(), ChannelClosed);
  EXPECT_NE(trainer.error().find("unknown kind"), std::string::npos);
  EXPECT_TRUE(lock_is_free(trainer.run()));
}

TEST(Monitor, LeavesNoDescriptorOpen) {
  const std::set<int> before = open_descriptors();
  for (const bool killed : {false, true}) {
    HandTrainer trainer;
    trainer.start();
    const State state = simple_state({5000});
    trainer.save(1, 1, state);
    trainer.begin(2, 2, state);
    trainer.lend(2, state, 0, 0);
    if (killed)
      trainer.kill();
    else
      trainer.hang_up();
    EXPECT_EQ(trainer.outcome(), Outcome::trainer_died);
  }
  EXPECT_EQ(open_descriptors(), before);
}

}  // namespace
}  // namespace pccheck::test
