// Memory that two processes see: of fixed size, there from the start, and not a forked child's.
#include "cpp/shared_slots.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <system_error>

#include "tests/cpp/bytes.h"
#include "tests/cpp/file_size_limit.h"
#include "tests/cpp/monitor_world.h"

namespace pccheck::test {
namespace {

constexpr size_t kBytes = 64 << 10;

Descriptor again(const SharedSlots& slots) {
  return Descriptor(::fcntl(slots.descriptor(), F_DUPFD_CLOEXEC, 0));
}

Descriptor memory_with_seals(int seals) {
  Descriptor memory(::memfd_create("pccheck-test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (::ftruncate(memory.get(), kBytes) != 0 || ::fcntl(memory.get(), F_ADD_SEALS, seals) != 0)
    throw std::runtime_error("cannot make memory for a test");
  return memory;
}

TEST(SharedSlots, WhatOneSideWritesTheOtherReads) {
  Random random(1);
  SharedSlots ours(kBytes);
  SharedSlots theirs(again(ours));
  ASSERT_EQ(ours.bytes().size(), kBytes);
  ASSERT_EQ(theirs.bytes().size(), kBytes);
  ASSERT_NE(ours.bytes().data(), theirs.bytes().data());
  const Bytes bytes = random_bytes(random, kBytes);
  std::ranges::copy(bytes, ours.bytes().begin());
  EXPECT_TRUE(std::ranges::equal(theirs.bytes(), bytes));
  theirs.bytes()[kBytes - 1] ^= std::byte{1};
  EXPECT_NE(ours.bytes()[kBytes - 1], bytes[kBytes - 1]);
}

TEST(SharedSlots, TheOtherSideStaysWhenTheMakerHasGone) {
  auto ours = std::make_unique<SharedSlots>(kBytes);
  SharedSlots theirs(again(*ours));
  ours->bytes()[7] = std::byte{77};
  ours.reset();
  EXPECT_EQ(theirs.bytes()[7], std::byte{77});
}

TEST(SharedSlots, NobodyChangesTheirSize) {
  const SharedSlots slots(kBytes);
  for (const size_t size : {kBytes - 1, kBytes + 1, size_t{0}}) {
    EXPECT_EQ(::ftruncate(slots.descriptor(), static_cast<off_t>(size)), -1) << size;
    EXPECT_EQ(errno, EPERM);
  }
  EXPECT_EQ(::fcntl(slots.descriptor(), F_ADD_SEALS, F_SEAL_WRITE), -1) << "the seals are sealed";
}

TEST(SharedSlots, AllOfThemIsReservedAtOnce) {
  const SharedSlots slots(size_t{3} << 20);
  struct stat status{};
  ASSERT_EQ(::fstat(slots.descriptor(), &status), 0);
  EXPECT_EQ(status.st_size, 3 << 20);
  EXPECT_GE(status.st_blocks * 512, 3 << 20);
}

TEST(SharedSlots, MemoryThatMightShrinkIsRefused) {
  EXPECT_NO_THROW(SharedSlots{memory_with_seals(F_SEAL_SHRINK)});
  EXPECT_THROW(SharedSlots{memory_with_seals(F_SEAL_GROW)}, std::runtime_error);
  EXPECT_THROW(SharedSlots{memory_with_seals(0)}, std::runtime_error);
}

TEST(SharedSlots, WhatIsNoMemoryIsRefused) {
  EXPECT_THROW(SharedSlots{Descriptor(::open("/dev/null", O_RDWR | O_CLOEXEC))}, std::system_error);
  EXPECT_THROW(SharedSlots{Descriptor()}, std::system_error);
}

TEST(SharedSlots, MemoryThatIsNotToBeHadIsAnErrorThatSaysSo) {
  const size_t open = open_descriptors().size();
  {
    const FileSizeLimit limit(4096);
    try {
      const SharedSlots slots(kBytes);
      FAIL() << "there is no memory for it";
    } catch (const std::system_error& error) {
      EXPECT_NE(std::string(error.what()).find("65536 bytes of staging memory"), std::string::npos)
          << error.what();
    }
  }
  EXPECT_EQ(open_descriptors().size(), open);
}

TEST(SharedSlots, AForkedChildHasNeitherTheMemoryNorItsDescriptor) {
  SharedSlots slots(kBytes);
  slots.bytes()[0] = std::byte{1};
  const pid_t child = ::fork();
  if (child == 0) {
    if (::fcntl(slots.descriptor(), F_GETFD) >= 0) ::_exit(1);
    unsigned char there = 0;
    const bool mapped = ::mincore(slots.bytes().data(), 1, &there) == 0;
    ::_exit(mapped ? 2 : 0);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(WEXITSTATUS(status), 0) << "1: the descriptor is open in it, 2: the memory is mapped";
}

TEST(SharedSlots, AreGoneWithTheirLastOwner) {
  const size_t open = open_descriptors().size();
  std::byte* begin = nullptr;
  {
    SharedSlots slots(kBytes);
    begin = slots.bytes().data();
    EXPECT_EQ(open_descriptors().size(), open + 1);
  }
  EXPECT_EQ(open_descriptors().size(), open);
  unsigned char there = 0;
  EXPECT_EQ(::mincore(begin, 1, &there), -1);
}

// Profilers and alarms interrupt system calls; reserving memory takes long enough to be hit often.
TEST(SharedSlots, SignalsDoNotKeepMemoryFromBeingReserved) {
  const SignalStorm storm(std::chrono::milliseconds(2));
  for (int time = 0; time < 3; ++time) EXPECT_NO_THROW(SharedSlots{size_t{128} << 20});
}

}  // namespace
}  // namespace pccheck::test
