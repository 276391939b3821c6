// One run's directory on a real file system: names, the lock, what is reclaimed, kept, retired and
// left alone. Overwriting in place: recycling_test.cpp.
#include "cpp/run_directory.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "cpp/host_copier.h"
#include "cpp/recovery.h"
#include "tests/cpp/file_size_limit.h"
#include "tests/cpp/run_on_disk.h"

namespace pccheck::test {
namespace {

using enum Checkpoint::State;
using Names = std::vector<std::string>;

class RunDirectoryOnDisk : public testing::Test {
 protected:
  void save_steps(RealRun& run, std::initializer_list<uint64_t> steps) {
    for (const uint64_t step : steps) {
      const Ticket ticket = save(hands, run, step, state);
      ASSERT_EQ(ticket->state(), committed) << text_of(ticket->error());
    }
  }

  static Names names(std::initializer_list<uint64_t> steps) {
    Names result;
    for (const uint64_t step : steps) result.push_back(name_of_step(step));
    return result;
  }

  State state = simple_state({3000, 100});
  HostCopier copier;
  HandRun hands{4, kBlockBytes, copier, 1};
};

TEST(RunDirectoryNames, StepsHaveOneNameEach) {
  for (const uint64_t step : {uint64_t{0}, uint64_t{1}, uint64_t{99'999'999}, uint64_t{100'000'000},
                              uint64_t{999'999'999'999'999'999}})
    EXPECT_EQ(step_of_name(name_of_step(step)), step);
  EXPECT_EQ(name_of_step(100), "step-00000100");
  EXPECT_EQ(name_of_step(1'234'567'890), "step-1234567890");
  for (const char* name :
       {"", "step-", "step-1", "step-0000001", "step-000000001", "step-0100000000", "Step-00000001",
        "step-00000001.partial", "step-00000001.stale", "step-0000000x", "step--0000001",
        "step-+0000001", "step- 0000001", "step-00000001 ", "my-step-00000001",
        "step-1000000000000000000", "step-99999999999999999999999"})
    EXPECT_EQ(step_of_name(name), std::nullopt) << name;
}

TEST_F(RunDirectoryOnDisk, HasOneWriterAtATime) {
  RealRun run;
  int asked = 0;
  try {
    open_run_directory(run.temp.path(), run.options, std::chrono::milliseconds(50),
                       [&] { ++asked; });
    FAIL() << "a second writer";
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find(run.temp.path()), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("another process"), std::string::npos);
  }
  EXPECT_GE(asked, 1);
  run.run.reset();
  EXPECT_NO_THROW(run.reopen());
}

TEST_F(RunDirectoryOnDisk, WaitingForTheLockEndsWithItOrWithAnInterruption) {
  RealRun run;
  struct Interrupted {};
  EXPECT_THROW(open_run_directory(run.temp.path(), run.options, std::chrono::hours(1),
                                  [] { throw Interrupted(); }),
               Interrupted);
  const auto opened = open_run_directory(run.temp.path(), run.options, std::chrono::hours(1),
                                         [&] { run.run.reset(); });
  EXPECT_TRUE(opened);
}

TEST_F(RunDirectoryOnDisk, WhatACrashLeftIsRecycledOrRemoved) {
  RealRun run({.keep_last = 0, .max_spares = 1});
  for (const uint64_t step : {1, 2, 3}) {
    std::filesystem::create_directory(run.path(step) + ".partial");
    write_file(run.path(step) + ".partial/model.safetensors", Bytes(50'000));
    write_file(run.path(step) + ".partial/manifest.json", Bytes(10));
  }
  run.reopen();
  EXPECT_EQ(run.directories().size(), 1u);
  save_steps(run, {7});
  EXPECT_EQ(run.directories(), names({7}));
  EXPECT_EQ(read_file(run.path(7) + "/model.safetensors"), state.file(0));
  EXPECT_EQ(names_in(run.path(7)), (Names{"checksums.bin", "manifest.json", "model.safetensors"}));
}

TEST_F(RunDirectoryOnDisk, WhatIsNotOursIsLeftAlone) {
  RealRun run({.keep_last = 1, .max_spares = 1});
  std::filesystem::create_directories(run.temp / "a.partial/inner");
  std::filesystem::create_directories(run.temp / "b.partial");
  write_file(run.temp / "b.partial/notes.txt", to_bytes("mine"));
  std::filesystem::create_directories(run.temp / "c.partial");
  std::filesystem::create_symlink("/etc/passwd", run.temp / "c.partial/model.safetensors");
  write_file(run.temp / "d.partial", to_bytes("a file"));
  std::filesystem::create_directory_symlink("/etc", run.temp / "e.partial");
  std::filesystem::create_directories(run.temp / "logs");
  write_file(run.temp / "step-00000000", to_bytes("a file, too"));
  run.reopen();
  save_steps(run, {1, 2, 3});
  run.run->remove_spares();
  EXPECT_EQ(run.directories(), (Names{"a.partial", "b.partial", "c.partial", "d.partial",
                                      "e.partial", "logs", "step-00000000", "step-00000003"}));
  EXPECT_EQ(read_file(run.temp / "b.partial/notes.txt"), to_bytes("mine"));
  EXPECT_TRUE(std::filesystem::is_symlink(run.temp / "c.partial/model.safetensors"));
}

TEST_F(RunDirectoryOnDisk, WhatIsNotOursButHasTheNameThatIsNeededIsMovedAside) {
  RealRun run({.keep_last = 0, .max_spares = 2});
  for (const char* name : {"step-00000005.partial", "step-00000005.partial.stale"}) {
    std::filesystem::create_directory(run.temp / name);
    write_file(run.temp / name + "/notes.txt", to_bytes(name));
  }
  std::filesystem::create_directory(run.temp / "step-00000004.partial");  // a spare
  run.reopen();
  save_steps(run, {5});
  EXPECT_EQ(run.directories(), (Names{"step-00000005", "step-00000005.partial.stale",
                                      "step-00000005.partial.stale-2"}));
  EXPECT_EQ(read_file(run.temp / "step-00000005.partial.stale-2/notes.txt"),
            to_bytes("step-00000005.partial"));
}

TEST_F(RunDirectoryOnDisk, APartialDirectoryThatIsStillBeingWrittenToIsNotTaken) {
  // A process that was killed holds its locks until its last write has ended.
  RealRun run;
  std::filesystem::create_directory(run.path(1) + ".partial");
  write_file(run.path(1) + ".partial/model.safetensors", Bytes(10));
  const auto dying = open_posix_directory(run.path(1) + ".partial", false);
  ASSERT_TRUE(dying->try_lock(LockMode::exclusive));
  run.reopen();
  run.run->remove_spares();
  EXPECT_EQ(run.directories(), Names{"step-00000001.partial"});
  save_steps(run, {1});
  dying->create_file("late.safetensors");
  EXPECT_EQ(names_in(run.path(1)).size(), 3u);
  EXPECT_EQ(read_file(run.path(1) + "/model.safetensors"), state.file(0));
}

TEST_F(RunDirectoryOnDisk, KeepsTheNewestAndOnlyThose) {
  for (const size_t keep : {size_t{1}, size_t{3}}) {
    RealRun run({.keep_last = keep, .max_spares = 1});
    save_steps(run, {10, 20, 30, 40, 50});
    run.run->remove_spares();
    EXPECT_EQ(run.directories(), keep == 1 ? names({50}) : names({30, 40, 50}));
  }
  RealRun all({.keep_last = 0, .max_spares = 1});
  save_steps(all, {10, 20, 30, 40, 50});
  EXPECT_EQ(all.directories(), names({10, 20, 30, 40, 50}));
}

TEST_F(RunDirectoryOnDisk, CountsWhatEarlierProcessesCommitted) {
  RealRun run({.keep_last = 2, .max_spares = 0});
  save_steps(run, {1, 2});
  run.reopen();
  save_steps(run, {3});
  EXPECT_EQ(run.directories(), names({2, 3}));
  std::filesystem::remove_all(run.path(2));  // by the user, meanwhile
  save_steps(run, {4});
  EXPECT_EQ(run.directories(), names({3, 4}));
}

TEST_F(RunDirectoryOnDisk, EveryNthStepIsKeptBesideTheNewest) {
  RealRun run({.keep_last = 2, .max_spares = 1, .keep_every = 3});
  save_steps(run, {1, 2, 3, 4, 5, 6, 7, 8});
  EXPECT_EQ(run.directories(), names({3, 6, 7, 8}));
}

TEST_F(RunDirectoryOnDisk, NamedStepsAreKeptUntilOthersAreNamed) {
  RealRun run({.keep_last = 1, .max_spares = 0});
  run.run->keep({1, 3, 99});
  save_steps(run, {1, 2, 3, 4});
  EXPECT_EQ(run.directories(), names({1, 3, 4}));
  run.run->keep({3});
  EXPECT_EQ(run.directories(), names({1, 3, 4})) << "naming alone retires nothing";
  save_steps(run, {5});
  EXPECT_EQ(run.directories(), names({3, 5}));
}

TEST_F(RunDirectoryOnDisk, ADirectoryWithAnythingStrangeInItIsNotRetired) {
  RealRun run({.keep_last = 1, .max_spares = 0});
  save_steps(run, {1});
  write_file(run.path(1) + "/notes.txt", to_bytes("mine"));
  save_steps(run, {2, 3});
  EXPECT_EQ(run.directories(), names({1, 3}));
  EXPECT_EQ(read_file(run.path(1) + "/model.safetensors"), state.file(0));
}

TEST_F(RunDirectoryOnDisk, AReaderDefersRetirementUntilItHasGone) {
  RealRun run({.keep_last = 1, .max_spares = 0});
  save_steps(run, {1});
  std::optional<CheckpointReader> reader(std::in_place, run.temp.path(), name_of_step(1));
  save_steps(run, {2, 3});
  EXPECT_EQ(run.directories(), names({1, 3}));
  reader->verify(2);
  reader.reset();
  save_steps(run, {4});
  EXPECT_EQ(run.directories(), names({4}));
}

TEST_F(RunDirectoryOnDisk, ATakenNameIsRefusedAndTheCheckpointBehindItUntouched) {
  RealRun run;
  save_steps(run, {1});
  try {
    run.run->prepare(name_of_step(1));
    FAIL() << "taken twice";
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code().value(), EEXIST);
    EXPECT_NE(std::string(error.what()).find(run.path(1)), std::string::npos);
  }
  EXPECT_EQ(run.directories(), names({1}));
  CheckpointReader(run.temp.path(), name_of_step(1)).verify(1);
}

TEST_F(RunDirectoryOnDisk, ANameThatIsBeingWrittenIsTakenToo) {
  RealRun run;
  const Ticket first = hands.begin(1, state.layout, run.target(1));
  first->hand_over(0, state.hand_over(0));
  hands.run();
  EXPECT_EQ(run.directories(), Names{"step-00000001.partial"});
  EXPECT_THROW(run.run->prepare(name_of_step(1)), std::system_error);
  first->hand_over(1, state.hand_over(1));
  first->seal(kManifest, std::nullopt);
  const Ticket again = begin_whole(hands, run, 1, state);
  hands.run();
  EXPECT_EQ(first->state(), committed);
  EXPECT_EQ(again->state(), failed);
  CheckpointReader(run.temp.path(), name_of_step(1)).verify(1);
}

TEST_F(RunDirectoryOnDisk, GoingOnFromAnEarlierStepSetsLaterOnesAside) {
  RealRun run;
  save_steps(run, {1, 2, 3, 4});
  // Under a name of its own, known by the step that it seals.
  const Ticket custom = hands.begin(4, state.layout, make_directory_target(run.run, "best"));
  hand_over_all(*custom, state);
  custom->seal(kManifest, std::nullopt);
  hands.run();
  std::filesystem::create_directory(run.temp / "logs");
  EXPECT_EQ(run.run->set_aside_after(2), (Names{"best", "step-00000003", "step-00000004"}));
  EXPECT_EQ(run.directories(), (Names{"best.stale", "logs", "step-00000001", "step-00000002",
                                      "step-00000003.stale", "step-00000004.stale"}));
  EXPECT_EQ(run.run->set_aside_after(2), Names{});
  save_steps(run, {3});
  EXPECT_EQ(run.run->set_aside_after(2), (Names{"step-00000003"}));
  EXPECT_TRUE(std::filesystem::exists(run.path(3) + ".stale-2"));
  CheckpointReader(run.temp.path(), "step-00000003.stale").verify(1);
}

TEST_F(RunDirectoryOnDisk, WhatWasSetAsideIsNeitherCountedNorRetired) {
  RealRun run({.keep_last = 2, .max_spares = 0});
  save_steps(run, {5, 6});
  run.run->set_aside_after(4);
  save_steps(run, {5, 6, 7});
  EXPECT_EQ(run.directories(), (Names{"step-00000005.stale", "step-00000006", "step-00000006.stale",
                                      "step-00000007"}));
}

TEST_F(RunDirectoryOnDisk, IsSyncedBeforeWhatIsFoundInItIsBelieved) {
  RunOnDisk disk;
  const std::vector<Operation> log = disk.log();
  std::vector<std::string> calls;
  for (const Operation& operation : log) calls.push_back(operation.call);
  EXPECT_EQ(calls, (Names{"try_lock_file", "sync", "list"}));
}

TEST_F(RunDirectoryOnDisk, AFileSizeLimitFailsTheCheckpointWithItsPathAndTheNextGoesThrough) {
  RealRun run({.keep_last = 1, .max_spares = 1});
  save_steps(run, {1});
  {
    const FileSizeLimit limit(8 << 10);
    const Ticket ticket = save(hands, run, 2, state);
    ASSERT_EQ(ticket->state(), failed);
    EXPECT_NE(text_of(ticket->error()).find(run.path(2)), std::string::npos);
    EXPECT_THROW(std::rethrow_exception(ticket->error()), std::system_error);
  }
  EXPECT_EQ(run.directories(), names({1}));
  save_steps(run, {3});
  run.run->remove_spares();
  EXPECT_EQ(run.directories(), names({3}));
}

TEST_F(RunDirectoryOnDisk, ADirectoryRemovedUnderWayFailsTheCheckpointWithItsPath) {
  RealRun run;
  const Ticket ticket = hands.begin(1, state.layout, run.target(1));
  ticket->hand_over(0, state.hand_over(0));
  hands.run();
  std::filesystem::remove_all(run.path(1) + ".partial");
  ticket->hand_over(1, state.hand_over(1));
  ticket->seal(kManifest, std::nullopt);
  hands.run();
  EXPECT_EQ(ticket->state(), failed);
  EXPECT_NE(text_of(ticket->error()).find(run.path(1)), std::string::npos)
      << text_of(ticket->error());
  save_steps(run, {2});
}

}  // namespace
}  // namespace pccheck::test
