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
