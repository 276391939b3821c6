#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <optional>
#include <system_error>

#include "cpp/file.h"
#include "cpp/staging_pool.h"
#include "tests/cpp/file_size_limit.h"
#include "tests/cpp/temp_dir.h"

namespace pccheck::test {
namespace {

// The error of a system call that has to fail, with its text.
template <typename Call>
std::system_error failure_of(Call call) {
  try {
    call();
  } catch (const std::system_error& error) {
    return error;
  }
  ADD_FAILURE() << "nothing failed";
  return std::system_error(0, std::generic_category());
}

testing::AssertionResult contains(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "'" << text << "' lacks '" << part << "'";
}

class PosixFile : public testing::Test {
 protected:
  TempDir temp;
  std::unique_ptr<Directory> directory = open_posix_directory(temp.path(), false);
};

TEST_F(PosixFile, WhateverIsWrittenAnywhereIsThereAlignedOrNot) {
  const std::unique_ptr<SlotMemory> memory = allocate_host_slots(64 << 10);
  const std::span<std::byte> aligned = memory->bytes();
  Random random(1);
  std::ranges::generate(aligned, [&] { return static_cast<std::byte>(random()); });
  const std::unique_ptr<File> file = directory->create_file("f");
  Bytes expected(200'000);
  file->allocate(expected.size());
  for (int round = 0; round < 300; ++round) {
    const bool odd = below(random, 2) == 0;
    const size_t size = below(random, odd ? 20'000 : 6) * (odd ? 1 : kDirectAlignment) +
                        (below(random, 3) == 0 ? below(random, 4096) : 0);
    const size_t from = odd ? below(random, 5000) : 0;
    const uint64_t offset =
        below(random, 3) == 0 ? below(random, 150'000) : below(random, 36) * kDirectAlignment;
    file->pwrite(aligned.subspan(from, size), offset);
    std::ranges::copy(aligned.subspan(from, size),
                      expected.begin() + static_cast<ptrdiff_t>(offset));
    Bytes back(size + 10);
    const std::unique_ptr<SlotMemory> target = allocate_host_slots(64 << 10);
    const auto into = odd ? std::span(back).subspan(5, size) : target->bytes().first(size);
    file->pread(into, offset);
    ASSERT_TRUE(std::ranges::equal(into, aligned.subspan(from, size))) << "round " << round;
  }
  file->sync_data();
  EXPECT_EQ(file->size_bytes(), expected.size());
  EXPECT_TRUE(read_file(temp / "f") == expected);
}

TEST_F(PosixFile, GoesPastThePageCacheWhereTheFileSystemAllowsIt) {
  const std::unique_ptr<File> file = directory->create_file("f");
  const int fd = ::open((temp / "f").c_str(), O_RDWR | O_DIRECT | O_CLOEXEC);
  EXPECT_EQ(file->is_direct(), fd >= 0);
  if (fd >= 0) ::close(fd);
}

TEST_F(PosixFile, FallsBackToThePageCacheWhereItIsRefused) {
  struct stat status{};
  if (::stat("/proc/self/status", &status) != 0) FAIL() << "no /proc";
  const std::unique_ptr<Directory> proc = open_posix_directory("/proc/self", false);
  const std::unique_ptr<File> file = proc->open_file("status");
  EXPECT_FALSE(file->is_direct());
  Bytes begin(5);
  file->pread(begin, 0);
  EXPECT_EQ(to_text(begin), "Name:");
}

TEST_F(PosixFile, AFileThatEndsEarlyIsAnErrorWithPathAndOffset) {
  write_file(temp / "f", Bytes(10'000));
  const std::unique_ptr<File> file = directory->open_file("f");
  const std::unique_ptr<SlotMemory> memory = allocate_host_slots(16 << 10);
  for (const size_t size : {size_t{10'001}, size_t{12'288}, size_t{16'384}}) {
    const std::system_error error =
        failure_of([&] { file->pread(memory->bytes().first(size), 0); });
    EXPECT_EQ(error.code().value(), EIO);
    EXPECT_TRUE(contains(error.what(), "pread " + temp / "f" + " @10000"));
  }
  failure_of([&] { file->pread(memory->bytes().first(1), 10'000); });
  failure_of([&] { file->pread(memory->bytes().first(4096), 1 << 20); });
  file->pread(memory->bytes().first(10'000), 0);
  file->pread({}, 99'999);
}

TEST_F(PosixFile, AWriteThatIsCutShortGoesOnAndEndsInTheErrorThatCutIt) {
  const std::unique_ptr<SlotMemory> memory = allocate_host_slots(64 << 10);
  for (const size_t skew : {size_t{0}, size_t{3}}) {
    const std::string name = "f" + std::to_string(skew);
    const std::unique_ptr<File> file = directory->create_file(name);
    std::optional<std::system_error> error;
    {
      const FileSizeLimit limit(16 << 10);
      error = failure_of([&] { file->pwrite(memory->bytes().subspan(skew, 32 << 10), 0); });
    }
    EXPECT_EQ(error->code().value(), EFBIG);
    EXPECT_TRUE(contains(error->what(), "pwrite " + temp / name + " @16384"));
    EXPECT_EQ(file->size_bytes(), uint64_t{16} << 10);
  }
}

TEST_F(PosixFile, WhatCannotBeAllocatedIsAnErrorNamingTheFile) {
  const std::unique_ptr<File> file = directory->create_file("f");
  std::optional<std::system_error> error;
  {
    const FileSizeLimit limit(16 << 10);
    error = failure_of([&] { file->allocate(1 << 20); });
  }
  EXPECT_EQ(error->code().value(), EFBIG);
  EXPECT_TRUE(contains(error->what(), temp / "f"));
}

TEST_F(PosixFile, AllocateGivesExactlyTheSizeWithItsBlocksReserved) {
  const std::unique_ptr<File> file = directory->create_file("f");
  for (const uint64_t size : {100'000u, 50'000u, 0u, 123'457u}) {
    file->allocate(size);
    EXPECT_EQ(file->size_bytes(), size);
  }
  const int fd = ::open((temp / "probe").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  const bool can_reserve = ::fallocate(fd, 0, 0, 4096) == 0;
  ::close(fd);
  struct stat status{};
  ASSERT_EQ(::stat((temp / "f").c_str(), &status), 0);
  EXPECT_TRUE(!can_reserve || status.st_blocks * 512 >= status.st_size);
}

TEST_F(PosixFile, WhatIsNotARegularFileIsRefusedAndNeverWaitedFor) {
  ASSERT_EQ(::mkfifo((temp / "fifo").c_str(), 0600), 0);
  ASSERT_EQ(::mkdir((temp / "directory").c_str(), 0700), 0);
  write_file(temp / "file", to_bytes("x"));
  ASSERT_EQ(::symlink("file", (temp / "link").c_str()), 0);
  ASSERT_EQ(::symlink("nowhere", (temp / "dangling").c_str()), 0);
  EXPECT_EQ(failure_of([&] { directory->open_file("fifo"); }).code().value(), EINVAL);
  EXPECT_EQ(failure_of([&] { directory->open_file("directory"); }).code().value(), EINVAL);
  EXPECT_EQ(failure_of([&] { directory->open_file("link"); }).code().value(), ELOOP);
  EXPECT_EQ(failure_of([&] { directory->open_file("dangling"); }).code().value(), ELOOP);
  EXPECT_EQ(failure_of([&] { directory->open_file("missing"); }).code().value(), ENOENT);
  for (const char* name : {"fifo", "directory", "file", "link", "dangling"})
    EXPECT_EQ(failure_of([&] { directory->create_file(name); }).code().value(), EEXIST) << name;
  for (const char* name : {"fifo", "directory", "link", "dangling", "missing"})
    EXPECT_EQ(directory->reuse_file(name), nullptr) << name;
  EXPECT_TRUE(contains(failure_of([&] { directory->open_file("fifo"); }).what(), temp / "fifo"));
}

TEST_F(PosixFile, AFileOfOursIsReusedAsItIs) {
  const Bytes before = to_bytes("what was there");
  write_file(temp / "f", before);
  const ino_t inode = inode_of(temp / "f");
  const std::unique_ptr<File> file = directory->reuse_file("f");
  ASSERT_TRUE(file) << "no write leases here?";
  EXPECT_EQ(file->size_bytes(), before.size());
  file->pwrite(to_bytes("WHAT"), 0);
  EXPECT_EQ(read_file(temp / "f"), to_bytes("WHAT was there")) << "a reader may come at any time";
  EXPECT_EQ(inode_of(temp / "f"), inode);
}

TEST_F(PosixFile, AFileThatSomebodyElseCouldSeeChangeIsNotReused) {
  write_file(temp / "f", Bytes(4096));
  EXPECT_NE(directory->reuse_file("f"), nullptr);

  ASSERT_EQ(::link((temp / "f").c_str(), (temp / "second name").c_str()), 0);
  EXPECT_EQ(directory->reuse_file("f"), nullptr) << "two links";
  ASSERT_EQ(::unlink((temp / "second name").c_str()), 0);
  EXPECT_NE(directory->reuse_file("f"), nullptr);

  const int fd = ::open((temp / "f").c_str(), O_RDONLY | O_CLOEXEC);
  ASSERT_GE(fd, 0);
  EXPECT_EQ(directory->reuse_file("f"), nullptr) << "open elsewhere";
  void* const mapped = ::mmap(nullptr, 4096, PROT_READ, MAP_SHARED, fd, 0);
  ASSERT_NE(mapped, MAP_FAILED);
  ::close(fd);
  EXPECT_EQ(directory->reuse_file("f"), nullptr) << "mapped elsewhere";
  ::munmap(mapped, 4096);
  EXPECT_NE(directory->reuse_file("f"), nullptr);

  const std::unique_ptr<File> ours = directory->reuse_file("f");
  EXPECT_EQ(directory->reuse_file("f"), nullptr) << "being written";
}

TEST_F(PosixFile, ReadingAWholeFileIsBounded) {
  write_file(temp / "f", to_bytes("0123456789"));
  EXPECT_EQ(read_whole(*directory, "f", 10), to_bytes("0123456789"));
  try {
    read_whole(*directory, "f", 9);
    FAIL() << "not bounded";
  } catch (const std::length_error& error) {
    EXPECT_TRUE(contains(error.what(), temp / "f"));
  }
}

}  // namespace
}  // namespace pccheck::test
