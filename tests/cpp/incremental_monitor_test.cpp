// Incremental saves with the real monitor's process: links are asked for and made there.
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <thread>

#include "cpp/engine.h"
#include "cpp/host_copier.h"
#include "cpp/manual_copier.h"
#include "cpp/monitor_client.h"
#include "cpp/recovery.h"
#include "tests/cpp/layer_files.h"

namespace pccheck::test {
namespace {

using enum Checkpoint::State;
using namespace messages;

struct MonitorWorld {
  explicit MonitorWorld(const TempDir& temp, std::shared_ptr<Book> book,
                        std::unique_ptr<Copier> copier = std::make_unique<HostCopier>(),
                        uint64_t keep_last = 0) {
    auto slots = std::make_unique<SharedSlots>(8 * kBlockBytes);
    Hello hello{.path = temp.path(),
                .block_bytes = kBlockBytes,
                .writer_threads = 2,
                .keep_last = keep_last,
                .max_spares = 1};
    auto made = std::make_unique<MonitorClient>(
        MonitorOptions{PCCHECK_MONITOR, std::chrono::seconds(60)}, hello, *slots, [] {});
    client = made.get();
    engine = std::make_unique<Engine>(EngineOptions{kBlockBytes, 2}, std::move(copier),
                                      std::move(slots), std::move(made), std::move(book));
  }

  ~MonitorWorld() {
    engine->wait_idle(in_a_minute());
    client->close();
  }

  Ticket begin(uint64_t step, const State& state) {
    EXPECT_TRUE(engine->wait_room(in_a_minute()));
    return engine->begin(identity_of(step), name_of_step(step), state.layout, nullptr);
  }

  Ticket save(uint64_t step, const State& state) {
    Ticket ticket = begin(step, state);
    hand_over_all(*ticket, state);
    ticket->seal(kManifest, std::nullopt);
    EXPECT_TRUE(ticket->wait_finished(in_a_minute()));
    return ticket;
  }

  MonitorClient* client;
  std::unique_ptr<Engine> engine;
};

class IncrementalMonitor : public testing::Test {
 protected:
  std::string file(uint64_t step, const std::string& name) const {
    return temp / name_of_step(step) + "/" + name;
  }

  bool is_shared(const std::string& name, uint64_t one, uint64_t other) const {
    return inode_of(file(one, name)) == inode_of(file(other, name));
  }

  void expect_on_disk(const Ticket& ticket, const State& state) {
    ASSERT_EQ(ticket->state(), committed) << text_of(ticket->error());
    const uint64_t step = ticket->identity().step;
    for (size_t f = 0; f < state.layout->files().size(); ++f)
      ASSERT_EQ(read_file(file(step, state.layout->files()[f].name)), state.file(f));
    const CheckpointReader reader(temp.path(), name_of_step(step));
    reader.verify(2);
    for (size_t f = 0; f < state.layout->files().size(); ++f)
      EXPECT_EQ(reader.checksums().files[f].digest, digest(state.file(f)));
  }

  const State first = layer_state({5000, 2000, 40});
  const std::shared_ptr<Book> book = std::make_shared<Book>();
  TempDir temp;
};

TEST_F(IncrementalMonitor, UnchangedFilesAreLinkedAndChangedOnesWritten) {
  const State second = changed(first, 1);
  MonitorWorld world(temp, book);
  expect_on_disk(world.save(1, first), first);
  expect_on_disk(world.save(2, second), second);
  EXPECT_TRUE(is_shared(model_file(0), 1, 2));
  EXPECT_TRUE(is_shared(kIndexName, 1, 2));
  EXPECT_FALSE(is_shared(model_file(1), 1, 2));
  const CommitCounts counts = world.engine->counts();
  const uint64_t of_changed = std::filesystem::file_size(file(2, model_file(1)));
  EXPECT_EQ(counts.bytes, first.layout->total_bytes() + of_changed);
  EXPECT_EQ(counts.bytes_linked, first.layout->total_bytes() - of_changed);
  EXPECT_EQ(world.engine->links_refused(), 0u);
}

TEST_F(IncrementalMonitor, ADevicesLayersToo) {
  auto copier = std::make_unique<ManualCopier>();
  copier->release_all();
  MonitorWorld world(temp, book, std::move(copier));
  State state = first;
  for (uint64_t step = 1; step <= 4; ++step) {
    expect_on_disk(world.save(step, state), state);
    state = changed(state, 0, 1000 * step);
  }
  EXPECT_TRUE(is_shared(model_file(1), 1, 4));
  EXPECT_FALSE(is_shared(model_file(0), 3, 4));
}

TEST_F(IncrementalMonitor, ManyStepsWithRetiringAndTwoInFlight) {
  MonitorWorld world(temp, book, std::make_unique<HostCopier>(), 1);
  State state = first;
  std::vector<State> states;
  std::vector<Ticket> tickets;
  for (uint64_t step = 1; step <= 30; ++step) {
    state = changed(state, step % 2, step);
    states.push_back(state);
    tickets.push_back(world.begin(step, states.back()));
    hand_over_all(*tickets.back(), states.back());
    tickets.back()->seal(kManifest, std::nullopt);
    ASSERT_TRUE(tickets.back()->wait_all_staged(in_a_minute()));  // the tensors change now
  }
  ASSERT_TRUE(world.engine->wait_idle(in_a_minute()));
  for (const Ticket& ticket : tickets)
    ASSERT_EQ(ticket->state(), committed) << text_of(ticket->error());
  expect_on_disk(tickets.back(), states.back());
  EXPECT_GT(world.engine->counts().bytes_linked, 0u);
  EXPECT_EQ(world.engine->links_refused(), 0u);
}

TEST_F(IncrementalMonitor, ABaseThatIsGoneIsNotLinkedTo) {
  MonitorWorld world(temp, book);
  expect_on_disk(world.save(1, first), first);
  EXPECT_EQ(world.client->set_aside_after(0), std::vector<std::string>{name_of_step(1)});
  expect_on_disk(world.save(2, first), first);
  EXPECT_EQ(world.engine->links_refused(), 6u);
  EXPECT_EQ(world.engine->counts().bytes_linked, 0u);
}

TEST_F(IncrementalMonitor, ANewMonitorLinksToWhatTheOldOneHasCommitted) {
  {
    MonitorWorld world(temp, book);
    expect_on_disk(world.save(1, first), first);
    const Ticket half = world.begin(2, first);
    ::kill(world.client->process(), SIGKILL);
    hand_over_all(*half, first);
    half->seal(kManifest, std::nullopt);
    ASSERT_TRUE(half->wait_finished(in_a_minute()));
    EXPECT_EQ(half->state(), failed);
  }
  MonitorWorld world(temp, book);
  expect_on_disk(world.save(2, first), first);
  EXPECT_TRUE(is_shared(model_file(0), 1, 2));
}

TEST_F(IncrementalMonitor, WhenTheMonitorDiesNobodyWaitsForItsAnswer) {
  // The second of each pair may be there although nobody was told: its number is not used again.
  for (uint64_t step = 1; step <= 60; step += 2) {
    MonitorWorld world(temp, book);
    expect_on_disk(world.save(step, first), first);
    std::jthread killer([&] { ::kill(world.client->process(), SIGKILL); });
    try {
      const Ticket ticket = world.begin(step + 1, first);
      hand_over_all(*ticket, first);
      ticket->seal(kManifest, std::nullopt);
      ASSERT_TRUE(ticket->wait_finished(in_a_minute()));
    } catch (const MonitorDied&) {
      // Before it was begun: as good.
    }
  }
}

TEST_F(IncrementalMonitor, ALinkThatCannotBeMadeFailsTheCheckpointWithTheMonitorsWords) {
  MonitorWorld world(temp, book);
  expect_on_disk(world.save(1, first), first);
  // In the way of what it has to make.
  std::filesystem::create_directories(temp / name_of_step(2));
  const Ticket ticket = world.save(2, first);
  EXPECT_EQ(ticket->state(), failed);
  EXPECT_NE(text_of(ticket->error()).find("exists already"), std::string::npos)
      << text_of(ticket->error());
  std::filesystem::remove_all(temp / name_of_step(2));
  expect_on_disk(world.save(3, first), first);
}

TEST(IncrementalMessages, ArriveAsTheyWereSent) {
  const Digest digest{1, ~uint64_t{0}};
  const auto link = std::get<messages::Link>(
      decode_from_trainer(encode(FromTrainer(messages::Link{3, 4, "step-00000001", digest}))));
  EXPECT_EQ(link.ticket, 3u);
  EXPECT_EQ(link.file, 4u);
  EXPECT_EQ(link.from, "step-00000001");
  EXPECT_EQ(link.digest, digest);
  for (const bool yes : {false, true})
    EXPECT_EQ(std::get<Linked>(decode_from_monitor(encode(FromMonitor(Linked{yes})))).linked, yes);
  const auto seal = std::get<Seal>(
      decode_from_trainer(encode(FromTrainer(Seal{9, kManifest, {{1, digest}, {7, {}}}}))));
  EXPECT_EQ(seal.manifest, kManifest);
  EXPECT_EQ(seal.digests, (std::vector<DigestOf>{{1, digest}, {7, {}}}));
}

TEST(IncrementalMessages, CutShortOrTooLongAreRefused) {
  for (const Bytes& whole : {encode(FromTrainer(messages::Link{3, 4, "step", {1, 2}})),
                             encode(FromTrainer(Seal{9, kManifest, {{1, {3, 4}}}})),
                             encode(FromMonitor(Linked{true}))}) {
    const auto decode = [&](const Bytes& bytes) {
      if (whole.size() == 2)
        decode_from_monitor(bytes);
      else
        decode_from_trainer(bytes);
    };
    EXPECT_NO_THROW(decode(whole));
    for (size_t size = 0; size < whole.size(); ++size)
      EXPECT_THROW(decode({whole.begin(), whole.begin() + static_cast<ptrdiff_t>(size)}),
                   std::runtime_error);
    Bytes longer = whole;
    longer.push_back(std::byte{0});
    EXPECT_THROW(decode(longer), std::runtime_error);
  }
}

// A trainer that speaks to a monitor by hand.
class LinkProtocol : public testing::Test {
 protected:
  LinkProtocol() : slots_(4 * kBlockBytes), ends_(Channel::make_pair()) {
    process_.emplace(PCCHECK_MONITOR, "test", ends_.second);
    {
      const Channel its = std::move(ends_.second);
    }
    const Descriptor self = open_pidfd(::getpid());
    const std::array<int, 2> descriptors{slots_.descriptor(), self.get()};
    ends_.first.send(encode(FromTrainer(Hello{.path = temp_.path(),
                                              .block_bytes = kBlockBytes,
                                              .writer_threads = 1,
                                              .lock_timeout_s = 10,
                                              .drain_timeout_s = 10})),
                     descriptors);
  }

  ~LinkProtocol() override {
    ends_.first.hang_up();
    EXPECT_TRUE(gave_up());
  }

  void say(const FromTrainer& message) { ends_.first.send(encode(message)); }

  // Whether the monitor has given up, as it does with a trainer that it cannot understand.
  bool gave_up() { return process_->wait_end(std::chrono::seconds(30)); }

  TempDir temp_;
  SharedSlots slots_;
  std::pair<Channel, Channel> ends_;
  std::optional<MonitorProcess> process_;
};

TEST_F(LinkProtocol, ALinkOfAFileThatIsNoneEndsTheMonitor) {
  say(Begin{1, identity_of(1), name_of_step(1), {{"a.safetensors", 10, 0}}});
  say(messages::Link{1, 1, name_of_step(0), {}});
  EXPECT_TRUE(gave_up());
}

TEST_F(LinkProtocol, ALinkOfACheckpointThatIsNoneEndsTheMonitor) {
  say(messages::Link{1, 0, name_of_step(0), {}});
  EXPECT_TRUE(gave_up());
}

TEST_F(LinkProtocol, TheDigestOfAFileThatIsNoneEndsTheMonitor) {
  say(Begin{1, identity_of(1), name_of_step(1), {}});
  say(Seal{1, kManifest, {{0, {}}}});
  EXPECT_TRUE(gave_up());
}

TEST_F(LinkProtocol, ALinkToWhateverIsNoCheckpointIsAnsweredWithNo) {
  std::filesystem::create_directories(temp_ / "outside");
  write_file(temp_ / "outside/a.safetensors", Bytes(10));
  say(Begin{1, identity_of(1), name_of_step(1), {{"a.safetensors", 10, 0}}});
  for (const char* from : {"outside", "../outside", "", ".", "/", "step-00000000", ".lock"})
    say(messages::Link{1, 0, from, {}});
  size_t refusals = 0;
  while (refusals < 7) {
    std::array<pollfd, 1> awaited{{{ends_.first.descriptor(), POLLIN, 0}}};
    ASSERT_GT(::poll(awaited.data(), 1, 30'000), 0);
    while (const std::optional<Message> message = ends_.first.receive()) {
      const FromMonitor answer = decode_from_monitor(message->bytes);
      ASSERT_FALSE(std::holds_alternative<Failing>(answer));
      if (const auto* linked = std::get_if<Linked>(&answer)) {
        EXPECT_FALSE(linked->linked);
        ++refusals;
      }
    }
  }
  EXPECT_EQ(names_in(temp_ / name_of_step(1) + ".partial"), std::vector<std::string>{});
  say(Abandon{1, "enough"});
}

}  // namespace
}  // namespace pccheck::test
