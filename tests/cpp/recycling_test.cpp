// Retired checkpoints are overwritten in place, and never where anybody could see it.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cpp/host_copier.h"
#include "cpp/recovery.h"
#include "tests/cpp/run_on_disk.h"

namespace pccheck::test {
namespace {

class Recycling : public testing::Test {
 protected:
  // Step `step` committed with bytes of its own; what it replaces becomes a spare.
  State save_step(uint64_t step, std::vector<uint64_t> elements = {6000, 2000}) {
    const State state = simple_state(elements, step);
    const Ticket ticket = save(hands, run, step, state);
    EXPECT_EQ(ticket->state(), Checkpoint::State::committed) << text_of(ticket->error());
    EXPECT_EQ(read_file(model(step)), state.file(0));
    CheckpointReader(run.temp.path(), name_of_step(step)).verify(1);
    return state;
  }

  std::string model(uint64_t step) const { return run.path(step) + "/model.safetensors"; }

  RealRun run{{.keep_last = 1, .max_spares = 1}};
  HostCopier copier;
  HandRun hands{4, kBlockBytes, copier, 1};
};

TEST_F(Recycling, TheThirdCheckpointOverwritesTheFilesOfTheFirst) {
  save_step(1);
  const std::vector<std::string> files = names_in(run.path(1));
  std::vector<ino_t> inodes;
  for (const std::string& file : files) inodes.push_back(inode_of(run.path(1) + "/" + file));
  save_step(2);
  EXPECT_EQ(run.directories(),
            (std::vector<std::string>{"step-00000001.partial", "step-00000002"}));
  save_step(3);
  EXPECT_EQ(names_in(run.path(3)), files);
  for (size_t i = 0; i < files.size(); ++i)
    EXPECT_EQ(inode_of(run.path(3) + "/" + files[i]), inodes[i]) << files[i];
}

TEST(RecyclingOnDisk, ADirectoryIsSyncedUnlessItsEntriesAreDurableAlready) {
  Random random(1);
  const State state = simple_state({20'000});
  HostCopier copier;
  RunOnDisk disk({.keep_last = 1, .max_spares = 1});
  HandRun hands{4, kBlockBytes, copier, 1};
  size_t synced = 0;  // of directories still called .partial
  disk.before = [&](const Operation& operation) {
    synced += operation.call == "sync" && operation.path.ends_with(".partial");
  };
  const auto syncs_of = [&](uint64_t step) {
    synced = 0;
    EXPECT_EQ(save(hands, disk, step, state)->state(), Checkpoint::State::committed);
    return synced;
  };
  EXPECT_EQ(syncs_of(1), 1u);
  EXPECT_EQ(syncs_of(2), 1u);
  EXPECT_EQ(syncs_of(3), 0u) << "the first one's files, every one of them";
  // A process that ended here has left its entries as they may be: synced when they are taken over.
  synced = 0;
  disk.reopen();
  EXPECT_EQ(synced, 1u);
  EXPECT_EQ(syncs_of(4), 0u);
}

TEST_F(Recycling, FilesOfOtherSizesAndNamesAreMadeToFit) {
  save_step(1, {20'000});
  save_step(2, {1});
  write_file(run.path(1) + ".partial/optimizer.safetensors", Bytes(100));  // of another layout
  save_step(3, {7});
  EXPECT_EQ(names_in(run.path(3)).size(), 3u);
  save_step(4, {50'000});
  save_step(5, {50'000});
}

TEST_F(Recycling, AFileWithASecondLinkKeepsItsBytes) {
  const State first = save_step(1);
  ASSERT_EQ(::link(model(1).c_str(), (run.temp / "copy.safetensors").c_str()), 0);
  save_step(2);
  save_step(3);
  EXPECT_EQ(read_file(run.temp / "copy.safetensors"), first.file(0));
  EXPECT_NE(inode_of(run.temp / "copy.safetensors"), inode_of(model(3)));
}

TEST_F(Recycling, AFileThatSomebodyHasOpenKeepsItsBytes) {
  const State first = save_step(1);
  const int fd = ::open(model(1).c_str(), O_RDONLY | O_CLOEXEC);
  ASSERT_GE(fd, 0);
  save_step(2);
  save_step(3);
  const Bytes expected = first.file(0);
  Bytes found(expected.size());
  EXPECT_EQ(::pread(fd, found.data(), found.size(), 0), static_cast<ssize_t>(found.size()));
  EXPECT_EQ(found, expected);
  ::close(fd);
}

TEST_F(Recycling, AFileThatSomebodyHasMappedKeepsItsBytes) {
  const State first = save_step(1);
  const Bytes expected = first.file(0);
  const int fd = ::open(model(1).c_str(), O_RDONLY | O_CLOEXEC);
  void* const mapped = ::mmap(nullptr, expected.size(), PROT_READ, MAP_SHARED, fd, 0);
  ::close(fd);
  ASSERT_NE(mapped, MAP_FAILED);
  save_step(2);
  save_step(3);
  save_step(4);
  EXPECT_TRUE(
      std::ranges::equal(std::span(static_cast<std::byte*>(mapped), expected.size()), expected));
  ::munmap(mapped, expected.size());
}

TEST_F(Recycling, ALinkPutInAFilesPlaceIsNotFollowed) {
  save_step(1);
  save_step(2);
  write_file(run.temp / "outside", to_bytes("stays"));
  const std::string spare = run.path(1) + ".partial";
  std::filesystem::remove(spare + "/model.safetensors");
  std::filesystem::create_symlink(run.temp / "outside", spare + "/model.safetensors");
  save_step(3);
  EXPECT_EQ(read_file(run.temp / "outside"), to_bytes("stays"));
  EXPECT_FALSE(std::filesystem::is_symlink(model(3)));
}

TEST_F(Recycling, AReaderThatComesTooLateIsToldSo) {
  save_step(1);
  const auto run_directory = open_posix_directory(run.temp.path(), false);
  const auto being_retired = run_directory->open_directory(name_of_step(1));
  ASSERT_TRUE(being_retired->try_lock(LockMode::exclusive));
  try {
    const CheckpointReader reader(run.temp.path(), name_of_step(1));
    FAIL() << "read while it is being retired";
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code().value(), ENOENT);
    EXPECT_NE(std::string(error.what()).find("retired"), std::string::npos);
  }
}

TEST_F(Recycling, NoMoreSparesAreKeptThanWanted) {
  run.run.reset();
  for (uint64_t step = 1; step <= 4; ++step)
    std::filesystem::create_directory(run.path(step) + ".partial");
  run.reopen();
  EXPECT_EQ(run.directories().size(), 1u);
  for (uint64_t step = 5; step <= 9; ++step) {
    save_step(step);
    EXPECT_LE(run.directories().size(), 2u);
  }
  run.run->remove_spares();
  EXPECT_EQ(run.directories(), std::vector<std::string>{"step-00000009"});
  save_step(10);
}

}  // namespace
}  // namespace pccheck::test
