// The trainer's side against the real monitor: the executable, started, fed, stopped and killed.
#include "cpp/monitor_client.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <map>
#include <thread>

#include "cpp/engine.h"
#include "cpp/host_copier.h"
#include "tests/cpp/hand_run.h"
#include "tests/cpp/monitor_world.h"

namespace pccheck::test {
namespace {

using enum Checkpoint::State;
using Ticket = std::shared_ptr<Checkpoint>;

const Bytes kManifest = to_bytes(R"({"a":"manifest"})");

struct Options {
  size_t slots = 16;
  size_t max_in_flight = 2;
  size_t keep_last = 0;
  double lock_timeout_s = 0;
  std::string executable = PCCHECK_MONITOR;
};

messages::Hello hello_for(const std::string& run, const Options& options) {
  return {.path = run,
          .block_bytes = kBlockBytes,
          .writer_threads = 2,
          .keep_last = options.keep_last,
          .max_spares = 2,
          .lock_timeout_s = options.lock_timeout_s};
}

std::unique_ptr<MonitorClient> start_client(
    const std::string& run, const SharedSlots& slots, const Options& options = {},
    const std::function<void()>& interrupted = [] {}) {
  return std::make_unique<MonitorClient>(
      MonitorOptions{options.executable, std::chrono::seconds(60)}, hello_for(run, options), slots,
      interrupted);
}

// A trainer without its tensors' owners: an engine whose persister is a monitor.
class Trainer {
 public:
  explicit Trainer(const std::string& run, Options options = {}) : run_(run) {
    auto slots = std::make_unique<SharedSlots>(options.slots * kBlockBytes);
    std::unique_ptr<MonitorClient> client = start_client(run, *slots, options);
    client_ = client.get();
    engine_.emplace(EngineOptions{kBlockBytes, options.max_in_flight},
                    std::make_unique<HostCopier>(), std::move(slots), std::move(client));
  }
  ~Trainer() {
    if (engine_) resume();
  }

  Ticket begin(uint64_t step, const State& state) {
    EXPECT_TRUE(engine_->wait_room(in_a_minute()));
    return engine_->begin(identity_of(step), name_of_step(step), state.layout, nullptr);
  }
  Ticket save(uint64_t step, const State& state, const Bytes& manifest = kManifest) {
    Ticket ticket = begin(step, state);
    for (size_t layer = 0; layer < state.tensors.size(); ++layer)
      ticket->hand_over(layer, state.hand_over(layer));
    ticket->seal(manifest, std::nullopt);
    return ticket;
  }

  void signal(int number) { ::kill(client_->process(), number); }
  // Takes nothing from its socket any more, and writes nothing.
  void stop() {
    signal(SIGSTOP);
    siginfo_t info{};
    while (::waitid(P_PID, static_cast<id_t>(client_->process()), &info, WSTOPPED | WNOWAIT) < 0) {
    }
  }
  void resume() { signal(SIGCONT); }
  void kill() { signal(SIGKILL); }

  std::exception_ptr wait_death() {
    const auto until = in_a_minute();
    while (!client_->death() && Clock::now() < until) std::this_thread::yield();
    return client_->death();
  }

  // After the monitor's death: nothing hangs, nothing is held, and nothing more is begun.
  void expect_all_lost(const std::vector<Ticket>& lost) {
    for (const Ticket& ticket : lost) {
      ASSERT_TRUE(ticket->wait_all_staged(in_a_minute())) << "its gates stay shut";
      ASSERT_TRUE(ticket->wait_finished(in_a_minute()));
      EXPECT_EQ(ticket->state(), failed);
      expect_says_killed(ticket->error());
    }
    ASSERT_TRUE(engine_->wait_idle(in_a_minute()));
    EXPECT_EQ(engine_->free_slots(), engine_->slot_count());
    EXPECT_EQ(engine_->counts().failed, lost.size());
    expect_says_killed(wait_death());
    EXPECT_THROW(begin(99, simple_state({1})), MonitorDied);
  }

  static void expect_says_killed(const std::exception_ptr& error) {
    EXPECT_NE(text_of(error).find("was killed by signal 9"), std::string::npos) << text_of(error);
  }

  Engine& engine() { return *engine_; }
  MonitorClient& client() { return *client_; }
  pid_t process() const { return client_->process(); }
  void end() { engine_.reset(); }

 private:
  const std::string run_;
  std::optional<Engine> engine_;
  MonitorClient* client_;  // inside it
};

bool has_children() {
  siginfo_t info{};
  return ::waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) == 0;
}

template <typename Call>
std::string error_of(Call call) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

class MonitorClientTest : public testing::Test {
 protected:
  void TearDown() override {
    EXPECT_FALSE(has_children()) << "a monitor, or what is left of one, is still there";
    EXPECT_EQ(open_descriptors(), open_before_);
  }
  void expect_committed(uint64_t step, const State& state) {
    expect_on_disk(run, name_of_step(step), identity_of(step), state, kManifest);
  }

  const TempDir temp;
  const std::string run = temp / "run";

 private:
  const std::set<int> open_before_ = open_descriptors();
};

// -- saving ---------------------------------------------------------------------------------------

TEST_F(MonitorClientTest, ManyCheckpointsInARowAllReachTheDiskWhole) {
  Random random(1);
  std::vector<std::pair<uint64_t, State>> saved;
  uint64_t step = 0;
  for (int round = 0; round < 8; ++round) {
    const State shape = random_state(random);
    if (shape.layout->block_bytes() != kBlockBytes) continue;
    Trainer trainer(run, {.slots = shape.layout->open_blocks() + 1 + below(random, 3),
                          .max_in_flight = 1 + below(random, 3)});
    std::vector<Ticket> tickets;
    for (int time = 0; time < 6; ++time) {
      saved.emplace_back(++step, fill(shape.layout, random));
      tickets.push_back(trainer.save(step, saved.back().second));
    }
    for (const Ticket& ticket : tickets) {
      ASSERT_TRUE(ticket->wait_finished(in_a_minute()));
      ASSERT_EQ(ticket->state(), committed) << text_of(ticket->error());
    }
    EXPECT_TRUE(trainer.engine().wait_idle(in_a_minute()));
    EXPECT_EQ(trainer.engine().counts().committed, 6u);
    EXPECT_EQ(trainer.engine().counts().last_committed_step, step);
    EXPECT_EQ(trainer.engine().counts().bytes, 6 * shape.layout->total_bytes());
    EXPECT_GT(trainer.engine().counts().last_durable_seconds, 0);
    EXPECT_EQ(trainer.engine().free_slots(), trainer.engine().slot_count());
    EXPECT_EQ(trainer.client().last_sealed_step(), step);
    EXPECT_EQ(trainer.client().close(), std::nullopt);
    EXPECT_TRUE(lock_is_free(run));
  }
  for (const auto& [number, state] : saved) expect_committed(number, state);
  EXPECT_EQ(checkpoints_in(run).size(), saved.size());
}

TEST_F(MonitorClientTest, WhoFindsItIdleFindsEveryTicketEndedAndEverySlotFree) {
  const State state = simple_state({10});
  Trainer trainer(run, {.slots = 2, .max_in_flight = 1, .keep_last = 1});
  for (uint64_t step = 1; step <= 100; ++step) {
    const Ticket ticket = trainer.save(step, state);
    while (trainer.engine().in_flight() > 0) {  // no waiting: the very first moment counts
    }
    ASSERT_EQ(ticket->state(), committed) << text_of(ticket->error());
    ASSERT_EQ(trainer.engine().counts().committed, step);
    ASSERT_EQ(trainer.engine().free_slots(), 2u);
  }
}

TEST_F(MonitorClientTest, WhatIsAddedAtTheEndAndALongManifestArrive) {
  Trainer trainer(run);
  const State model = simple_state({3000}, 1);
  Random random(2);
  std::vector<FileSpec> specs = simple_files({2500});
  specs[0].name = "extra.safetensors";
  const State extra =
      fill(Layout::make(specs, {.block_bytes = kBlockBytes, .layer_count = 1}), random);
  const Bytes manifest(100'000, std::byte{' '});
  const Ticket ticket = trainer.begin(1, model);
  ticket->hand_over(0, model.hand_over(0));
  ticket->seal(manifest, Checkpoint::Addition{extra.layout, extra.hand_over(0)});
  ASSERT_TRUE(ticket->wait_finished(in_a_minute()));
  ASSERT_EQ(ticket->state(), committed) << text_of(ticket->error());
  const std::string path = run + "/" + name_of_step(1) + "/";
  EXPECT_EQ(read_file(path + "model.safetensors"), model.file(0));
  EXPECT_EQ(read_file(path + "extra.safetensors"), extra.file(0));
  EXPECT_EQ(read_file(path + kManifestName), manifest);
  CheckpointReader(run, name_of_step(1)).verify(1);
}

// The thread that sends looks at every checkpoint in flight, then at the queue of blocks. So many
// are in flight here that the looking takes long, and meanwhile comes what it has not seen.
TEST_F(MonitorClientTest, NoBlockOvertakesWhatAnnouncesIt) {
  auto slots = std::make_unique<SharedSlots>(8 * kBlockBytes);
  const SharedSlots& memory = *slots;
  StagingPool pool(std::move(slots), kBlockBytes, [] {});
  Doorbell pushed, popped;
  BlockQueue full(pushed, popped);
  const auto layout = Layout::of_files({{.name = "model.safetensors",
                                         .header = {},
                                         .grid_begin = 0,
                                         .size_bytes = kBlockBytes,
                                         .tensors = {}}},
                                       kBlockBytes);
  std::vector<FileSpec> specs = simple_files({10});
  specs[0].name = "extra.safetensors";
  const auto more = Layout::make(specs, {.block_bytes = kBlockBytes, .layer_count = 1});
  const Bytes tensor(40);
  std::vector<Ticket> tickets;
  const std::unique_ptr<MonitorClient> client = start_client(run, memory);
  const auto add = [&] {
    const uint64_t step = tickets.size() + 1;
    tickets.push_back(std::make_shared<Checkpoint>(identity_of(step), name_of_step(step), layout,
                                                   nullptr, Checkpoint::Bells{[] {}, [] {}}));
    client->add(tickets.back());
    return tickets.back();
  };
  const auto push = [&](const Ticket& ticket, uint32_t file, size_t bytes) {
    auto block = std::make_unique<Block>(ticket, file, 0, bytes, *pool.try_acquire());
    block->filled = bytes;
    full.push(std::move(block));
  };
  const auto all_came_back = [&] {
    const auto until = in_a_minute();
    while (pool.free_slots() < pool.slot_count() && !client->death() && Clock::now() < until)
      std::this_thread::yield();
    EXPECT_EQ(text_of(client->death()), "");
    return pool.free_slots() == pool.slot_count();
  };

  client->start(full, pushed);
  while (tickets.size() < 1000) add();
  push(tickets.back(), 0, kBlockBytes);  // comes back when all of them have been announced
  ASSERT_TRUE(all_came_back());
  for (int time = 0; time < 20; ++time) {
    client->look();
    const Ticket late = add();
    push(late, 0, kBlockBytes);
    ASSERT_TRUE(all_came_back());
    client->look();
    late->seal(kManifest, Checkpoint::Addition{more, {{{tensor.data(), tensor.size()}}, {}, {}}});
    push(late, 1, more->block_size(0, 0));
    ASSERT_TRUE(all_came_back());
  }
  for (const Ticket& ticket : tickets) {
    ticket->fail(error_saying("enough"));
    ticket->stop_staging();
  }
  client->look();
  for (const Ticket& ticket : tickets) ASSERT_TRUE(ticket->wait_finished(in_a_minute()));
}

TEST_F(MonitorClientTest, LaterCheckpointsAreSetAside) {
  Trainer trainer(run);
  const State state = simple_state({100});
  for (uint64_t step = 1; step <= 3; ++step)
    ASSERT_TRUE(trainer.save(step, state)->wait_finished(in_a_minute()));
  EXPECT_EQ(trainer.client().set_aside_after(2), std::vector<std::string>{"step-00000003"});
  EXPECT_EQ(trainer.client().set_aside_after(2), std::vector<std::string>{});
}

TEST_F(MonitorClientTest, ADirectoryThatCannotBeReadIsToldOfWhenLaterOnesAreSetAside) {
  Trainer trainer(run);
  std::filesystem::remove_all(run);
  EXPECT_NO_THROW(trainer.client().set_aside_after(0));  // nothing is there any more
  const State state = simple_state({100});
  const Ticket ticket = trainer.save(1, state);
  ASSERT_TRUE(ticket->wait_finished(in_a_minute()));
  EXPECT_EQ(ticket->state(), failed);
  EXPECT_NE(text_of(ticket->error()).find(run), std::string::npos) << text_of(ticket->error());
  try {
    std::rethrow_exception(ticket->error());
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code().value(), ENOENT);
  }
}

TEST_F(MonitorClientTest, ADiskErrorFailsItsCheckpointAndLeavesTheOthers) {
  Trainer trainer(run, {.slots = 4});
  const State big = simple_state({60 * kBlockBytes / 4}), small = simple_state({100});
  const Ticket first = trainer.save(1, small);
  ASSERT_TRUE(first->wait_finished(in_a_minute()));
  rlimit none{}, little{};
  ASSERT_EQ(::prlimit(trainer.process(), RLIMIT_FSIZE, nullptr, &none), 0);
  little = none;
  little.rlim_cur = 2 * kBlockBytes;
  ASSERT_EQ(::prlimit(trainer.process(), RLIMIT_FSIZE, &little, nullptr), 0);
  const Ticket full = trainer.save(2, big);
  const Ticket next = trainer.save(3, small);
  for (const Ticket& ticket : {full, next}) ASSERT_TRUE(ticket->wait_finished(in_a_minute()));
  EXPECT_EQ(full->state(), failed);
  try {
    std::rethrow_exception(full->error());
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code().value(), EFBIG) << "a full disk is an error and no signal";
  } catch (const std::exception& error) {
    ADD_FAILURE() << error.what();
  }
  EXPECT_EQ(next->state(), committed) << text_of(next->error());
  EXPECT_TRUE(trainer.engine().wait_idle(in_a_minute()));
  EXPECT_EQ(trainer.engine().free_slots(), 4u);
  EXPECT_EQ(trainer.engine().counts().failed, 1u);
  expect_committed(3, small);
  EXPECT_EQ(checkpoints_in(run).size(), 2u);
}

TEST_F(MonitorClientTest, WhatTheTrainerGivesUpIsGivenUpThereToo) {
  Trainer trainer(run, {.slots = 4});
  const State state = simple_state({1000, 1000});
  const Ticket ticket = trainer.begin(1, state);
  ticket->hand_over(0, state.hand_over(0));
  ticket->fail(error_saying("voided"));
  ASSERT_TRUE(ticket->wait_finished(in_a_minute()));
  EXPECT_EQ(ticket->state(), failed);
  EXPECT_EQ(text_of(ticket->error()), "voided");
  EXPECT_EQ(trainer.engine().free_slots(), 4u);
  EXPECT_TRUE(checkpoints_in(run).empty());
  ASSERT_TRUE(trainer.save(1, state)->wait_finished(in_a_minute()));
  expect_committed(1, state);
}

TEST_F(MonitorClientTest, WhatTheTripwireFindsAfterTheLastBlockIsNotCommitted) {
  struct Changed final : SourceWatch {
    std::string changed() const override { return "tensor 't' was changed"; }
  };
  Trainer trainer(run);
  const State state = simple_state({100});
  const Changed watch;
  const Ticket ticket = trainer.begin(1, state);
  HandOver hand_over = state.hand_over(0);
  hand_over.watch = &watch;
  ticket->hand_over(0, std::move(hand_over));
  ticket->seal(kManifest, std::nullopt);
  ASSERT_TRUE(ticket->wait_finished(in_a_minute()));
  EXPECT_EQ(text_of(ticket->error()), "tensor 't' was changed");
  EXPECT_EQ(trainer.client().last_sealed_step(), 0u);
  EXPECT_TRUE(checkpoints_in(run).empty());
}

TEST_F(MonitorClientTest, SignalsInterruptNothing) {
  const SignalStorm storm(std::chrono::milliseconds(1));
  Trainer trainer(run, {.slots = 3, .keep_last = 1});
  const State state = simple_state({20 * kBlockBytes / 4});
  for (uint64_t step = 1; step <= 10; ++step) {
    const Ticket ticket = trainer.save(step, state);
    ASSERT_TRUE(ticket->wait_finished(in_a_minute()));
    ASSERT_EQ(ticket->state(), committed) << text_of(ticket->error());
  }
  EXPECT_EQ(trainer.client().close(), std::nullopt);
}

// -- the monitor is killed ------------------------------------------------------------------------

TEST_F(MonitorClientTest, KilledWhileItHasNothingToDoItIsToldOf) {
  Trainer trainer(run);
  EXPECT_EQ(text_of(trainer.client().death()), "");
  trainer.kill();
  trainer.expect_all_lost({});
  EXPECT_NE(text_of(trainer.client().death()).find(std::to_string(trainer.process())),
            std::string::npos);
}

TEST_F(MonitorClientTest, KilledBeforeABlockWasSentItFailsTheCheckpoint) {
  const State state = simple_state({100, 100});
  Trainer trainer(run);
  const Ticket ticket = trainer.begin(1, state);
  trainer.kill();
  EXPECT_TRUE(ticket->wait_staged(0, in_a_minute()));
  EXPECT_TRUE(trainer.wait_death());
  // What the trainer does in its step, not knowing of it yet, does no harm.
  ticket->hand_over(0, state.hand_over(0));
  ticket->hand_over(1, state.hand_over(1));
  ticket->open_gate(0);
  ticket->seal(kManifest, std::nullopt);
  trainer.expect_all_lost({ticket});
}

TEST_F(MonitorClientTest, KilledWithBlocksLentAndOthersWaitingItFailsTheCheckpointAndFreesAll) {
  const State state = simple_state({40 * kBlockBytes / 4, 10});
  Trainer trainer(run, {.slots = 5});
  const Ticket kept = trainer.save(1, state);
  ASSERT_TRUE(kept->wait_finished(in_a_minute()));
  trainer.stop();
  const Ticket ticket = trainer.save(2, state);
  while (trainer.engine().free_slots() > 0) std::this_thread::yield();
  EXPECT_FALSE(ticket->wait_staged(0, at_once())) << "more than the pool holds";
  trainer.kill();
  trainer.expect_all_lost({ticket});
  trainer.end();
  EXPECT_TRUE(lock_is_free(run));
  expect_committed(1, state);
}

TEST_F(MonitorClientTest, KilledAfterTheSealAndBeforeTheCommitItFailsTheCheckpoint) {
  const State state = simple_state({100});
  Trainer trainer(run);
  trainer.stop();
  const Ticket ticket = trainer.save(1, state);
  while (trainer.client().last_sealed_step() == 0) std::this_thread::yield();
  trainer.kill();
  trainer.expect_all_lost({ticket});
}

TEST_F(MonitorClientTest, KilledWithTheChannelFullItFailsWhatWasSentAndWhatWasNotEvenAnnounced) {
  // More messages than a socket takes, so that the sender waits in the middle of the first.
  const size_t blocks = 1500;
  const State state = simple_state({blocks * kBlockBytes / 4}), other = simple_state({100});
  std::vector<FileSpec> specs = simple_files({100});
  specs[0].name = "extra.safetensors";
  const auto layout = Layout::make(specs, {.block_bytes = kBlockBytes, .layer_count = 1});
  for (const bool with_addition : {false, true}) {
    Trainer trainer(run, {.slots = blocks + 4});
    trainer.stop();
    const Ticket first = trainer.begin(1, state);
    first->hand_over(0, state.hand_over(0));
    ASSERT_TRUE(first->wait_staged(0, in_a_minute())) << "staging needs but the pool";
    std::optional<Checkpoint::Addition> addition;
    if (with_addition) addition = {layout, other.hand_over(0)};
    first->seal(kManifest, std::move(addition));
    ASSERT_TRUE(first->wait_all_staged(in_a_minute()));
    std::vector<Ticket> tickets = {first};
    if (!with_addition) {
      tickets.push_back(trainer.save(2, other));
      ASSERT_TRUE(tickets.back()->wait_staged(0, in_a_minute()));
    }
    trainer.kill();
    trainer.expect_all_lost(tickets);
  }
}

TEST_F(MonitorClientTest, ACheckpointThatIsBegunAtTheVeryMomentOfTheDeathFailsToo) {
  Trainer trainer(run);
  trainer.kill();
  trainer.wait_death();
  // Engine::begin() has looked before, and found it alive.
  const State state = simple_state({100});
  const auto late = std::make_shared<Checkpoint>(identity_of(1), name_of_step(1), state.layout,
                                                 nullptr, Checkpoint::Bells{[] {}, [] {}});
  trainer.client().add(late);
  EXPECT_NE(text_of(late->error()), "") << "nobody else will ever fail it";
  late->stop_staging();  // as the stager does with what has failed
  trainer.client().look();
  EXPECT_TRUE(late->wait_finished(in_a_minute()));
  EXPECT_EQ(late->state(), failed);
}

TEST_F(MonitorClientTest, KilledAtAnyMomentItLosesNothingThatWasCommitted) {
  Random random(5);
  const State state = simple_state({3000, 10, 2000});
  uint64_t step = 0, acknowledged = 0;
  for (int kill = 0; kill < 25; ++kill) {
    Trainer trainer(run, {.slots = 4, .keep_last = 2, .lock_timeout_s = 10});
    std::vector<Ticket> tickets;
    if (kill % 2 == 0) {
      tickets.push_back(trainer.save(++step, state));
      ASSERT_TRUE(tickets.back()->wait_finished(in_a_minute()));
    }
    const Clock::time_point until = Clock::now() + std::chrono::microseconds(below(random, 20'000));
    std::jthread killing([&] {
      while (Clock::now() < until) std::this_thread::yield();
      trainer.kill();
    });
    try {
      while (true) tickets.push_back(trainer.save(++step, state));
    } catch (const MonitorDied&) {
    }
    killing.join();
    ASSERT_TRUE(trainer.engine().wait_idle(in_a_minute()));
    for (const Ticket& ticket : tickets) {
      ASSERT_NE(ticket->state(), in_flight);
      if (ticket->state() == committed) acknowledged = ticket->identity().step;
    }
    EXPECT_EQ(trainer.engine().free_slots(), 4u);
    EXPECT_EQ(trainer.client().close(), std::nullopt);
    trainer.end();
    const auto reopened =
        open_run_directory(run, {.keep_last = 2, .max_spares = 2}, std::chrono::seconds(0), [] {});
    if (acknowledged > 0) {
      expect_committed(acknowledged, state);
    }
  }
  EXPECT_GT(acknowledged, 0u);
}

TEST_F(MonitorClientTest, AMonitorThatDiesWhileItIsAskedToCloseIsAComplaintAndNoError) {
  Trainer trainer(run);
  trainer.stop();
  std::jthread killing([&] { trainer.kill(); });
  std::optional<std::string> complaint;
  EXPECT_NO_THROW(complaint = trainer.client().close());
  if (complaint) {
    EXPECT_NE(complaint->find("was killed by signal 9"), std::string::npos) << *complaint;
  }
}

TEST_F(MonitorClientTest, AMonitorThatDiesBeforeItAnswersIsAnErrorThatSaysSo) {
  Trainer trainer(run);
  trainer.stop();
  std::jthread killing([&] { trainer.kill(); });
  EXPECT_THROW(trainer.client().set_aside_after(1), MonitorDied);
}

TEST_F(MonitorClientTest, WaitingForAStoppedMonitorsAnswerCanBeInterrupted) {
  struct Interrupted {};
  Trainer trainer(run);
  trainer.stop();
  int looked = 0;
  const auto at_the_third_look = [&] {
    if (++looked == 3) throw Interrupted();
  };
  EXPECT_THROW(trainer.client().set_aside_after(1, at_the_third_look), Interrupted);
  trainer.resume();
  looked = -1'000'000;
  EXPECT_EQ(trainer.client().close(at_the_third_look), std::nullopt)
      << "the late answer is not taken for this one's";
}

TEST_F(MonitorClientTest, ClosingThatWasInterruptedGoesOnWhereItWas) {
  struct Interrupted {};
  Trainer trainer(run);
  trainer.stop();
  for (int time = 0; time < 2; ++time)
    EXPECT_THROW(trainer.client().close([] { throw Interrupted(); }), Interrupted);
  trainer.resume();
  for (int time = 0; time < 2; ++time) EXPECT_EQ(trainer.client().close(), std::nullopt);
  EXPECT_TRUE(lock_is_free(run)) << "closing waits for the monitor's end";
}

TEST_F(MonitorClientTest, AfterItsEndTheMonitorHasEndedAndIsReaped) {
  const State state = simple_state({100});
  Trainer trainer(run);
  const pid_t monitor = trainer.process();
  ASSERT_TRUE(trainer.save(1, state)->wait_finished(in_a_minute()));
  trainer.end();  // without a word
  EXPECT_EQ(::kill(monitor, 0), -1);
  EXPECT_EQ(errno, ESRCH);
  EXPECT_TRUE(lock_is_free(run));
}

TEST_F(MonitorClientTest, SignalsThatTellAJobToEndDoNotEndTheMonitor) {
  const State state = simple_state({100});
  Trainer trainer(run);
  for (const int number : {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGPIPE, SIGUSR1, SIGUSR2, SIGXCPU})
    trainer.signal(number);
  const Ticket ticket = trainer.save(1, state);
  ASSERT_TRUE(ticket->wait_finished(in_a_minute()));
  EXPECT_EQ(ticket->state(), committed) << text_of(ticket->error());
}

TEST_F(MonitorClientTest, TheMonitorIsAloneInItsSessionAndHasNothingOpenOfTheTrainers) {
  const int foreign = ::open("/dev/null", O_RDONLY);  // without O_CLOEXEC, as foreign code does it
  Trainer trainer(run);
  EXPECT_EQ(::getsid(trainer.process()), trainer.process());
  std::map<std::string, int> open;
  const std::string fds = "/proc/" + std::to_string(trainer.process()) + "/fd";
  for (const auto& entry : std::filesystem::directory_iterator(fds)) {
    std::error_code gone;
    std::string to = std::filesystem::read_symlink(entry.path(), gone).string();
    ++open[to.substr(0, to.find_first_of(":[("))];
  }
  std::string all;
  for (const auto& [to, count] : open) all += to + " x" + std::to_string(count) + ", ";
  EXPECT_EQ(open["/dev/null"], 2) << all;  // stdin and stdout, and not the foreign one
  EXPECT_EQ(open["socket"], 1) << all;
  EXPECT_EQ(open["/memfd"], 1) << all;
  EXPECT_EQ(open[run], 1) << all;
  EXPECT_GE(open[run + "/.lock"], 1) << all;
  const auto cwd =
      std::filesystem::read_symlink("/proc/" + std::to_string(trainer.process()) + "/cwd");
  EXPECT_EQ(cwd, "/");
  ::close(foreign);
}

// -- a trainer that is killed ---------------------------------------------------------------------

// A whole trainer in a process of its own, killed when it says that its checkpoint is sealed.
TEST_F(MonitorClientTest, WhatAKilledTrainerHadSealedIsCommittedAndTheMonitorEnds) {
  const State state = simple_state({50 * kBlockBytes / 4});
  std::array<int, 2> told{};
  ASSERT_EQ(::pipe2(told.data(), O_CLOEXEC), 0);
  ::prctl(PR_SET_CHILD_SUBREAPER, 1);  // its monitor becomes ours, and its end can be waited for
  const pid_t child = ::fork();
  if (child == 0) {
    Trainer trainer(run, {.slots = 60});
    const Ticket first = trainer.save(1, state);
    const Ticket unsealed = trainer.begin(2, state);
    unsealed->hand_over(0, state.hand_over(0));
    while (trainer.client().last_sealed_step() == 0) std::this_thread::yield();
    const pid_t monitor = trainer.process();
    if (::write(told[1], &monitor, sizeof monitor) < 0) ::_exit(1);
    while (true) ::pause();
  }
  pid_t monitor = -1;
  ASSERT_EQ(::read(told[0], &monitor, sizeof monitor), static_cast<ssize_t>(sizeof monitor));
  ::kill(child, SIGKILL);
  const Clock::time_point killed = Clock::now();
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_EQ(::waitpid(monitor, &status, 0), monitor);
  EXPECT_LT(Clock::now() - killed, std::chrono::seconds(30)) << "it waited for its deadline";
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
  ::prctl(PR_SET_CHILD_SUBREAPER, 0);
  for (const int end : told) ::close(end);
  EXPECT_TRUE(lock_is_free(run));
  EXPECT_EQ(checkpoints_in(run), std::vector<std::string>{name_of_step(1)});
  expect_committed(1, state);
}

TEST_F(MonitorClientTest, AForkedChildThatLivesOnHoldsNothingUp) {
  const State state = simple_state({100});
  auto trainer = std::make_unique<Trainer>(run);
  ASSERT_TRUE(trainer->save(1, state)->wait_finished(in_a_minute()));
  const pid_t monitor = trainer->process();
  {
    const IdleChild worker;
    ASSERT_TRUE(trainer->save(2, state)->wait_finished(in_a_minute()));
    trainer->end();
    EXPECT_EQ(::kill(monitor, 0), -1) << "the monitor waits for the worker";
    EXPECT_TRUE(lock_is_free(run));
  }
}

// -- a monitor that does not come up --------------------------------------------------------------

TEST_F(MonitorClientTest, ADirectoryThatAnotherHoldsIsRefusedInTheMonitorsWords) {
  const auto other =
      open_run_directory(run, {.keep_last = 0, .max_spares = 0}, std::chrono::seconds(0), [] {});
  const SharedSlots slots(kBlockBytes);
  const std::string error = error_of([&] { start_client(run, slots); });
  EXPECT_NE(error.find("another process is writing checkpoints to " + run), std::string::npos)
      << error;
}

TEST_F(MonitorClientTest, ADirectoryThatCannotBeMadeIsASystemError) {
  write_file(temp / "file", {});
  const SharedSlots slots(kBlockBytes);
  try {
    start_client(temp / "file" + "/run", slots);
    ADD_FAILURE() << "there is no such directory";
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code().value(), ENOTDIR);
  }
}

TEST_F(MonitorClientTest, AnExecutableThatIsNotThereOrCannotBeRunIsASystemErrorThatNamesIt) {
  write_file(temp / "text", to_bytes("not a program"));
  const SharedSlots slots(kBlockBytes);
  for (const std::string& executable : {temp / "nothing", temp / "text", temp.path()}) try {
      start_client(run, slots, {.executable = executable});
      ADD_FAILURE() << executable;
    } catch (const std::system_error& error) {
      EXPECT_NE(std::string(error.what()).find(executable), std::string::npos) << error.what();
    }
  EXPECT_FALSE(std::filesystem::exists(run));
}

TEST_F(MonitorClientTest, AnExecutableThatIsNoMonitorIsAnErrorThatSaysHowItEnded) {
  write_file(temp / "killed", to_bytes("#!/bin/sh\nkill -9 $$\n"));
  // Closes the channel first, so that the greeting itself fails.
  write_file(temp / "deaf", to_bytes("#!/bin/sh\nexec 3>&-\nexit 7\n"));
  for (const std::string& script : {temp / "killed", temp / "deaf"}) ::chmod(script.c_str(), 0755);
  const SharedSlots slots(kBlockBytes);
  const std::vector<std::pair<std::string, std::string>> endings = {
      {"/bin/true", "exited with status 0"},
      {"/bin/false", "exited with status 1"},
      {temp / "killed", "was killed by signal 9"},
      {temp / "deaf", "exited with status 7"}};
  for (int time = 0; time < 10; ++time)
    for (const auto& [executable, ending] : endings) {
      const std::string error =
          error_of([&] { start_client(run, slots, {.executable = executable}); });
      ASSERT_NE(error.find(executable), std::string::npos) << error;
      ASSERT_NE(error.find(ending), std::string::npos) << error;
    }
}

TEST_F(MonitorClientTest, WaitingForTheDirectoryCanBeInterruptedAndLeavesNoMonitor) {
  const auto other =
      open_run_directory(run, {.keep_last = 0, .max_spares = 0}, std::chrono::seconds(0), [] {});
  const SharedSlots slots(kBlockBytes);
  int looked = 0;
  const auto interrupted = [&] {
    if (++looked == 3) throw std::runtime_error("interrupted");
  };
  EXPECT_EQ(error_of([&] { start_client(run, slots, {.lock_timeout_s = 1e6}, interrupted); }),
            "interrupted");
}

// In a process of its own, to which the kernel refuses one system call as an old or a strict one
// does: exit status 0 if starting a monitor then fails with that error and leaves nothing behind.
int without(long call, int error, const std::string& run) {
  const pid_t child = ::fork();
  if (child == 0) {
    std::array<sock_filter, 4> filter{{
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<uint32_t>(call), 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | static_cast<uint32_t>(error)),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    }};
    const sock_fprog program{filter.size(), filter.data()};
    if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
        ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0)
      ::_exit(1);
    try {
      const SharedSlots slots(kBlockBytes);
      start_client(run, slots);
      ::_exit(2);
    } catch (const std::system_error& refused) {
      if (refused.code().value() != error) ::_exit(3);
    } catch (...) {
      ::_exit(4);
    }
    ::_exit(has_children() ? 5 : 0);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST_F(MonitorClientTest, WhereTheKernelRefusesWhatItNeedsItFailsAndLeavesNoProcess) {
  EXPECT_EQ(without(SYS_pidfd_open, ENOSYS, run), 0);
  EXPECT_EQ(without(SYS_pidfd_open, EPERM, run), 0);
  EXPECT_EQ(without(SYS_memfd_create, EACCES, run), 0);
  EXPECT_EQ(without(SYS_socketpair, EMFILE, run), 0);
  EXPECT_EQ(without(SYS_eventfd2, EMFILE, run), 0);
  EXPECT_EQ(without(SYS_execve, EACCES, run), 0);
}

}  // namespace
}  // namespace pccheck::test
