#include "cpp/staging_pool.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <set>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>

#include "cpp/file.h"

namespace pccheck::test {
namespace {

constexpr size_t kSlot = kDirectAlignment;

StagingPool make_pool(size_t slots, std::function<void()> on_release = [] {}) {
  return {allocate_host_slots(slots * kSlot), kSlot, std::move(on_release)};
}

TEST(StagingPool, SlotsAreAlignedForDirectIoAndDoNotOverlap) {
  StagingPool pool = make_pool(7);
  EXPECT_EQ(pool.slot_count(), 7u);
  EXPECT_EQ(pool.slot_bytes(), kSlot);
  std::vector<SlotLease> leases;
  std::set<std::byte*> begins;
  while (std::optional<SlotLease> lease = pool.try_acquire()) {
    const std::span<std::byte> bytes = lease->bytes();
    ASSERT_EQ(bytes.size(), kSlot);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(bytes.data()) % kDirectAlignment, 0u);
    begins.insert(bytes.data());
    std::memset(bytes.data(), static_cast<int>(leases.size()), bytes.size());
    leases.push_back(std::move(*lease));
  }
  ASSERT_EQ(leases.size(), 7u);
  EXPECT_EQ(begins.size(), 7u);
  for (size_t i = 0; i < leases.size(); ++i)
    for (const std::byte byte : leases[i].bytes()) ASSERT_EQ(byte, static_cast<std::byte>(i));
}

TEST(StagingPool, AnEmptyPoolGivesNothingUntilASlotIsBack) {
  StagingPool pool = make_pool(2);
  std::optional<SlotLease> first = pool.try_acquire();
  const std::optional<SlotLease> second = pool.try_acquire();
  ASSERT_TRUE(first && second);
  EXPECT_EQ(pool.free_slots(), 0u);
  EXPECT_FALSE(pool.try_acquire());
  first->release();
  EXPECT_EQ(pool.free_slots(), 1u);
  EXPECT_TRUE(pool.try_acquire());
}

TEST(StagingPool, ALeaseGivesItsSlotBackOnceHoweverOftenItMoves) {
  int released = 0;
  StagingPool pool = make_pool(2, [&] { ++released; });
  {
    SlotLease a = std::move(*pool.try_acquire());
    SlotLease b = std::move(a);
    SlotLease c;
    EXPECT_FALSE(c);
    c = std::move(b);
    EXPECT_TRUE(c);
    SlotLease& same = c;
    c = std::move(same);
    EXPECT_TRUE(c);
    EXPECT_EQ(pool.free_slots(), 1u);
    c = std::move(*pool.try_acquire());  // what it held before goes back
    EXPECT_EQ(pool.free_slots(), 1u);
    EXPECT_EQ(released, 1);
    c.release();
    c.release();
  }
  EXPECT_EQ(pool.free_slots(), 2u);
  EXPECT_EQ(released, 1);  // the second release came to a pool that had a slot
}

TEST(StagingPool, TellsOfTheFirstSlotThatComesBackAndItIsFreeByThen) {
  const StagingPool* in_callback = nullptr;
  std::vector<size_t> free_when_told;
  StagingPool pool = make_pool(2, [&] { free_when_told.push_back(in_callback->free_slots()); });
  in_callback = &pool;
  {
    const std::optional<SlotLease> first = pool.try_acquire();
    const std::optional<SlotLease> second = pool.try_acquire();
    EXPECT_TRUE(free_when_told.empty());
  }
  EXPECT_EQ(free_when_told, (std::vector<size_t>{1}));  // a second one nobody waited for
}

TEST(StagingPool, MemoryWithoutRoomForASlotIsRefused) {
  for (const size_t slot_bytes : {2 * kSlot, size_t{0}}) try {
      const StagingPool pool(allocate_host_slots(kSlot), slot_bytes, [] {});
      ADD_FAILURE() << "a slot of " << slot_bytes;
    } catch (const std::invalid_argument& error) {
      EXPECT_NE(std::string(error.what()).find(std::to_string(slot_bytes)), std::string::npos);
    }
}

TEST(StagingPool, MemoryThatCannotBeHadIsASystemError) {
  EXPECT_THROW(allocate_host_slots(size_t{1} << 60), std::system_error);
}

TEST(StagingPool, ThreadsNeverShareASlot) {
  StagingPool pool = make_pool(3);
  std::array<std::atomic<int>, 3> users{};
  std::byte* const base = pool.try_acquire()->bytes().data();
  std::atomic<bool> shared = false;
  {
    std::vector<std::jthread> threads;
    for (int t = 0; t < 6; ++t)
      threads.emplace_back([&] {
        for (int round = 0; round < 2000; ++round) {
          const std::optional<SlotLease> lease = pool.try_acquire();
          if (!lease) continue;
          const auto slot = static_cast<size_t>(lease->bytes().data() - base) / kSlot;
          if (users.at(slot).fetch_add(1) != 0) shared = true;
          lease->bytes()[0] = std::byte{1};  // a data race, were it shared
          users.at(slot).fetch_sub(1);
        }
      });
  }
  EXPECT_FALSE(shared);
  EXPECT_EQ(pool.free_slots(), 3u);
}

// The kernel's own word on it. Looking from a child would not do: a sanitizer's runtime may put
// something else in the hole there.
TEST(StagingPool, SlotsAreLeftOutOfForkedChildren) {
  const std::unique_ptr<SlotMemory> memory = allocate_host_slots(kSlot);
  const auto at = reinterpret_cast<uintptr_t>(memory->bytes().data());
  std::ifstream mappings("/proc/self/smaps");
  bool ours = false;
  for (std::string line; std::getline(mappings, line);) {
    uintptr_t begin = 0, end = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &begin, &end) == 2)
      ours = begin <= at && at < end;
    else if (ours && line.starts_with("VmFlags:")) {
      EXPECT_NE((line + " ").find(" dc "), std::string::npos) << line;
      return;
    }
  }
  FAIL() << "the slots are in no mapping";
}

}  // namespace
}  // namespace pccheck::test
