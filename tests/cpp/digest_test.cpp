#include "cpp/digest.h"

#include <gtest/gtest.h>

#include <set>
#include <utility>

#include "tests/cpp/bytes.h"

namespace pccheck::test {
namespace {

using detail::digest_folds;
using detail::DigestFold;

Digest digest_with(const DigestFold& fold, std::span<const std::byte> bytes) {
  Digester digester(fold);
  digester.update(bytes);
  return digester.finish();
}

// Byte i is i modulo a prime, so that no two stripes near each other are equal.
Bytes counted(size_t size) {
  Bytes text(size);
  for (size_t i = 0; i < size; ++i) text[i] = static_cast<std::byte>(i % 251);
  return text;
}

// What xxHash's own library gives. This prints them all (xxhash 4.1.0 of PyPI, on xxHash 0.8.4):
//
//   import xxhash
//   text = bytes(i % 251 for i in range(1_000_003))
//   for n in LENGTHS:
//       print(n, xxhash.xxh3_128_hexdigest(text[:n]))
//   every = "".join(xxhash.xxh3_128_hexdigest(text[:n]) for n in range(5000))
//   print("every", xxhash.xxh3_128_hexdigest(every.encode()))
//   many = xxhash.xxh3_128()
//   for _ in range(65537):
//       many.update(text[:65536])
//   print("many", many.hexdigest())
constexpr std::pair<size_t, const char*> kOfTheFirstBytes[] = {
    {0, "99aa06d3014798d86001c324468d497f"},       {1, "a6cd5e9392000f6ac44bdff4074eecdb"},
    {2, "6a4a5274c1b0d3add6645fc3051a9457"},       {3, "e3b55f57945a17cf5f4299fc161c9cbb"},
    {4, "eb70bf5fc779e9e6a6111d53e80a3db5"},       {5, "9434532106a7c141c920d2347a85929b"},
    {7, "61ce291bc3a4357ddbb207821e6d5efe"},       {8, "e1e4432a62217fe4cfd50c61c8bb98c1"},
    {9, "16c769d83e4aebce907931979dca3746"},       {12, "38f92247a7f73cc57780eb31198f13ca"},
    {15, "301a9f754e8f569a0017ea4be19bc787"},      {16, "72950631827607e2842812cc870dcae2"},
    {17, "685bc458b37d057fc06e233df7729217"},      {31, "4ed3946d393b687bb54de3993874ed20"},
    {32, "25e7c9b3424ceed2457d9566b6fcd697"},      {33, "02175c3aabb00637e08d84951339de86"},
    {63, "bb8d4c458fac1f120302a39b74a9cf52"},      {64, "9c6e140a465545e590c1971ddb04ce74"},
    {65, "ebedf05eeadc28f11aee64a1615de88f"},      {96, "c57556e9ccb97efa6e53ab55b4f5558b"},
    {97, "9b09227e063da5a25b3284a61f91e97d"},      {127, "d5add870c9c9e00f060c2e3ddf0f2fb9"},
    {128, "14792fc3af88dc6c05321a0b64d67b41"},     {129, "dd5e74ac6b45f54ebc30b63382b09a3b"},
    {130, "6cd2e56a10f1e7073ec5f135d0a7d28f"},     {159, "e34482de7831e5f6aea9455053a8845b"},
    {160, "4e95c1cd6dc7bb85c67fcd13c31b09f4"},     {161, "90805aa22c17b7a036ade0cea58f8377"},
    {191, "f8a8b7d9aad39ee4b224afe71ffd14d8"},     {192, "10c987dc285c756b050f429c4f52b688"},
    {223, "1634d1625a498f461357556c8fbf7594"},     {224, "21787738bcf2a96cb0e6e8978fa2bfb4"},
    {239, "9843ab31a06be0dffe21374628fcc539"},     {240, "65b5be86da5540e7c92b68e16f83bbb6"},
    {241, "1da1cb61bcb8a2a102e8cd95421c6d02"},     {242, "162384cb44d1d806ddcb33c494051832"},
    {255, "65652759c081c563074191baf9c49567"},     {256, "96c36c85d00e5bc544f5d90dacde463a"},
    {257, "8c650dc0594ae28188fc3f7934a6c9be"},     {319, "af48b79747526e0a6c157bd52bb07eae"},
    {320, "5b6936509fe4670f8a1836a6cc02f09e"},     {321, "2d931d1380ea9712f92f3e46c8a7a651"},
    {511, "e8d4474ecc01a76b455cffca2755aa1e"},     {512, "5884ea91ad7102d75c021aac13954143"},
    {513, "b2c5a3216bea49d24ee4eacf61b5e833"},     {1023, "4325711b0ed4d742d3d91d80ac495685"},
    {1024, "d0ac1f7b93bf57b9e5d78bafa45b2aa5"},    {1025, "2882ebca04ec915ce95c42288f28186e"},
    {1087, "4139a4f49a2c6118fd3c95bb928139ce"},    {1088, "295519bc52981c5c1a848d807034c403"},
    {1089, "bd054149e0f6660ea51e35ec282cb1d8"},    {1090, "594a616ac266e016e8827407fbb5df14"},
    {1151, "09242bb3085265c0c7f7deebfabeb73f"},    {1152, "b7f8edd60c49b08a52d48e7e28283221"},
    {1153, "477d2cea70ecec5fba7fa2077e541f01"},    {2047, "6c555bf670e067a3c95eaacd676cd049"},
    {2048, "a5141efedfefc1af25339063db861586"},    {2049, "39a54bc93f74921b6c9600c0e506e2ae"},
    {2111, "b07c154d17562e6f90f6a7eeff1e7afd"},    {2112, "9d38cbacd4a3f73eb37859f27fb06852"},
    {2113, "c626311d0426f44040355df39ff45a86"},    {4096, "e12cd72144990fe57135ffa504f1bc71"},
    {65536, "f5e7bc5d3d8675bfaaae63800707a868"},   {65537, "0924e7a3a30e818770331d53d92bbc56"},
    {1000003, "ff7880a76b3ad0273bd135bb217f309d"},
};
constexpr const char* kOfEveryDigestBelow5000 = "26b9bf37e3eca4ded8fe3502693e61f1";
constexpr const char* kOf65537Times65536 = "391e2797dd28f3c1a4a2029417fc3074";

TEST(Digest, IsTheOneOfXxHashAtEveryBorder) {
  const Bytes text = counted(1'000'003);
  for (const auto& [bytes, hex] : kOfTheFirstBytes) {
    const auto first = std::span(text).first(bytes);
    EXPECT_EQ(to_hex(digest(first)), hex) << bytes;
    for (const DigestFold& fold : digest_folds())
      EXPECT_EQ(to_hex(digest_with(fold, first)), hex) << fold.name << ", " << bytes;
  }
}

TEST(Digest, IsTheOneOfXxHashAtEveryLengthUpTo5000) {
  const Bytes text = counted(5000);
  for (const DigestFold& fold : digest_folds()) {
    std::string every;
    for (size_t bytes = 0; bytes < 5000; ++bytes)
      every += to_hex(digest_with(fold, std::span(text).first(bytes)));
    EXPECT_EQ(to_hex(digest(to_bytes(every))), kOfEveryDigestBelow5000) << fold.name;
  }
}

TEST(Digest, IsTheOneOfXxHashBeyond4GiB) {
  const Bytes piece = counted(65536);
  Digester digester;
  for (int i = 0; i < 65537; ++i) digester.update(piece);
  EXPECT_EQ(to_hex(digester.finish()), kOf65537Times65536);
}

TEST(Digest, HexDigitsStartWithTheHighestAndKeepLeadingZeros) {
  EXPECT_EQ(to_hex({0x0123456789abcdef, 0x00000000fedcba98}), "00000000fedcba980123456789abcdef");
  EXPECT_EQ(to_hex({}), std::string(32, '0'));
}

TEST(Digest, EqualityTakesBothHalves) {
  const Digest one{1, 2};
  EXPECT_EQ(one, (Digest{1, 2}));
  EXPECT_NE(one, (Digest{1, 3}));
  EXPECT_NE(one, (Digest{3, 2}));
}

TEST(Digest, AllImplementationsAgreeAtEveryMisalignment) {
  Random random(1);
  const Bytes text = random_bytes(random, 10'100);
  for (const DigestFold& fold : digest_folds())
    for (size_t offset = 0; offset < 64; ++offset)
      for (const size_t bytes : {241u, 1024u, 1025u, 1089u, 2112u, 2113u, 3137u, 10'000u}) {
        const auto part = std::span(text).subspan(offset, bytes);
        ASSERT_EQ(digest_with(fold, part), digest_with(digest_folds().front(), part))
            << fold.name << ", " << bytes << " at " << offset;
      }
}

TEST(Digest, AllImplementationsAgreeOnWordsThatCarryAndOverflow) {
  Random random(2);
  for (const DigestFold& fold : digest_folds())
    for (const unsigned byte : {0x00u, 0x7fu, 0x80u, 0xffu}) {
      Bytes text(70'000, static_cast<std::byte>(byte));
      for (int i = 0; i < 100; ++i) flip_bit(text, below(random, 8 * text.size()));
      ASSERT_EQ(digest_with(fold, text), digest_with(digest_folds().front(), text))
          << fold.name << ", " << byte;
    }
}

TEST(Digest, EverySplitInTwoGivesTheDigestOfTheWhole) {
  for (const size_t bytes : {0u, 1u, 16u, 240u, 241u, 1024u, 1088u, 1089u, 2113u, 3300u}) {
    const Bytes text = counted(bytes);
    const Digest whole = digest(text);
    for (size_t border = 0; border <= bytes; ++border) {
      Digester digester;
      digester.update(std::span(text).first(border));
      digester.update(std::span(text).subspan(border));
      ASSERT_EQ(digester.finish(), whole) << border << " of " << bytes;
    }
  }
}

TEST(Digest, EverySplitInThreeAroundARoundGivesTheDigestOfTheWhole) {
  const Bytes text = counted(2200);
  const Digest whole = digest(text);
  for (size_t first = 1; first < 1200; first += 13)
    for (size_t second = first; second <= text.size(); second += 17) {
      Digester digester;
      digester.update(std::span(text).first(first));
      digester.update(std::span(text).subspan(first, second - first));
      digester.update(std::span(text).subspan(second));
      ASSERT_EQ(digester.finish(), whole) << first << ", " << second;
    }
}

TEST(Digest, RandomPartsGiveTheDigestOfTheWhole) {
  Random random(3);
  const Bytes text = random_bytes(random, 50'000);
  const Digest whole = digest_with(digest_folds().front(), text);
  for (int round = 0; round < 300; ++round) {
    const DigestFold& fold = digest_folds()[static_cast<size_t>(round) % digest_folds().size()];
    const uint64_t most = round < 100 ? 150 : round < 200 ? 2500 : 20'000;
    Digester digester(fold);
    for (size_t at = 0; at < text.size();) {
      const size_t part = std::min(text.size() - at, static_cast<size_t>(below(random, most)));
      digester.update(std::span(text).subspan(at, part));
      at += part;
    }
    ASSERT_EQ(digester.finish(), whole) << fold.name << ", parts below " << most;
  }
}

TEST(Digest, OfSoFarMayBeAskedAtAnyTimeAndOfACopy) {
  const Bytes text = counted(4000);
  Digester digester;
  for (size_t bytes = 0; bytes < text.size(); ++bytes) {
    ASSERT_EQ(digester.finish(), digest(std::span(text).first(bytes))) << bytes;
    Digester copy = digester;
    copy.update(to_bytes("another way"));
    digester.update(std::span(text).subspan(bytes, 1));
  }
}

TEST(Digest, EverySingleBitFlipChangesIt) {
  Random random(4);
  for (const DigestFold& fold : digest_folds())
    for (const size_t bytes :
         {1u, 3u, 4u, 8u, 9u, 16u, 17u, 128u, 129u, 240u, 241u, 1024u, 2113u}) {
      Bytes text = random_bytes(random, bytes);
      const Digest before = digest_with(fold, text);
      for (size_t bit = 0; bit < 8 * bytes; ++bit) {
        flip_bit(text, bit);
        const Digest after = digest_with(fold, text);
        ASSERT_NE(after.low, before.low) << fold.name << ", bit " << bit << " of " << bytes;
        ASSERT_NE(after.high, before.high) << fold.name << ", bit " << bit << " of " << bytes;
        flip_bit(text, bit);
      }
    }
}

// Much of a young state is zeros: how many there are and where a one stands has to tell.
TEST(Digest, TellsLengthsPlacesAndOrdersOfEqualWordsApart) {
  std::set<std::string> seen;
  for (size_t bytes = 0; bytes < 3000; ++bytes)
    EXPECT_TRUE(seen.insert(to_hex(digest(Bytes(bytes)))).second) << bytes << " zeros";
  Bytes text(5000);
  for (size_t at = 0; at < text.size(); ++at) {
    text[at] = std::byte{1};
    EXPECT_TRUE(seen.insert(to_hex(digest(text))).second) << "a one at " << at;
    text[at] = std::byte{0};
  }
}

}  // namespace
}  // namespace pccheck::test
