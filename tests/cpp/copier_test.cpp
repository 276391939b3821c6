#include <gtest/gtest.h>

#include <array>

#include "cpp/crc32c.h"
#include "cpp/host_copier.h"
#include "cpp/manual_copier.h"
#include "tests/cpp/bytes.h"

namespace pccheck::test {
namespace {

TEST(HostCopier, HasCopiedAndSummedWhenSubmitReturns) {
  Random random(1);
  const Bytes from = random_bytes(random, 50'000);
  Bytes to(from.size());
  uint32_t crc = 0;
  HostCopier copier;
  ASSERT_TRUE(copier.sums_while_copying());
  // Two pieces of one running sum, one without any in between.
  const std::array<Piece, 3> pieces = {{{from.data(), to.data(), 20'000, &crc},
                                        {from.data() + 20'000, to.data() + 20'000, 10'000, nullptr},
                                        {from.data() + 30'000, to.data() + 30'000, 20'000, &crc}}};
  const uint64_t first = copier.submit(pieces, nullptr);
  EXPECT_TRUE(copier.done(first));
  EXPECT_EQ(to, from);
  const std::span<const std::byte> all(from);
  EXPECT_EQ(crc, crc32c(crc32c(0, all.first(20'000)), all.last(20'000)));
  EXPECT_EQ(copier.submit({}, nullptr), first + 1);
}

// How often each kind is chosen in a hundred submissions whose copies take so long.
size_t cached_of_a_hundred(StoreChoice& choice, double cached, double streamed) {
  size_t chosen = 0;
  for (int i = 0; i < 100; ++i) {
    const Stores stores = choice.next();
    chosen += stores == Stores::cached;
    choice.took(stores, stores == Stores::cached ? cached : streamed);
  }
  return chosen;
}

TEST(StoreChoice, KeepsToTheCachesUntilTheyCostMuchMoreAndComesBack) {
  StoreChoice choice;
  EXPECT_GE(cached_of_a_hundred(choice, 1.0, 1.1), 95u);
  EXPECT_GE(cached_of_a_hundred(choice, 1.3, 1.0), 95u) << "a little more is worth it";
  cached_of_a_hundred(choice, 3.0, 1.0);  // long enough to forget the times before
  EXPECT_LE(cached_of_a_hundred(choice, 3.0, 1.0), 5u);
  for (int i = 0; i < 3; ++i) cached_of_a_hundred(choice, 1.0, 1.0);
  EXPECT_GE(cached_of_a_hundred(choice, 1.0, 1.0), 95u) << "it tries the other kind again";
}

TEST(StoreChoice, ASlowCopyNowAndThenChangesNothing) {
  StoreChoice choice;
  cached_of_a_hundred(choice, 1.0, 1.0);
  for (int i = 0; i < 100; ++i) {
    const Stores stores = choice.next();
    choice.took(stores, stores == Stores::cached && i % 4 != 0 ? 50.0 : 1.0);
  }
  EXPECT_GE(cached_of_a_hundred(choice, 1.0, 1.0), 95u);
}

TEST(ManualCopier, ReadsTheSourceAtTheReleaseNotAtTheSubmission) {
  Bytes from = to_bytes("early"), to(5);
  ManualCopier copier;
  const std::array<Piece, 1> pieces = {{{from.data(), to.data(), 5, nullptr}}};
  const uint64_t number = copier.submit(pieces, nullptr);
  EXPECT_EQ(number, 1u);
  EXPECT_EQ(copier.submitted(), 1u);
  EXPECT_FALSE(copier.done(number));
  EXPECT_EQ(to, Bytes(5));
  std::ranges::copy(to_bytes("later"), from.begin());
  copier.release(1);
  EXPECT_TRUE(copier.done(number));
  std::ranges::copy(to_bytes("never"), from.begin());
  copier.release_all();
  EXPECT_EQ(to_text(to), "later");
}

TEST(ManualCopier, EndsSubmissionsInOrderAndOnlyAsManyAsAreReleased) {
  const Bytes from = to_bytes("abc");
  Bytes to(3);
  ManualCopier copier;
  const auto submit = [&](size_t i) {
    const std::array<Piece, 1> pieces = {{{from.data() + i, to.data() + i, 1, nullptr}}};
    return copier.submit(pieces, nullptr);
  };
  submit(0);
  copier.release(2);  // one made already, one still to come
  EXPECT_TRUE(copier.done(1));
  submit(1);
  EXPECT_TRUE(copier.done(2));
  submit(2);
  EXPECT_FALSE(copier.done(3));
  EXPECT_EQ(to[2], std::byte{0});
  copier.release_all();
  EXPECT_TRUE(copier.done(3));
  EXPECT_EQ(to, from);
}

}  // namespace
}  // namespace pccheck::test
