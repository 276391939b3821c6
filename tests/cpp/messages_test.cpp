// What goes over the channel: everything arrives as it was said, and nothing else is understood.
#include "cpp/messages.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <cstring>
#include <system_error>
#include <tuple>

#include "tests/cpp/bytes.h"
#include "tests/cpp/hand_run.h"

namespace pccheck::messages {

// Part by part and not by their bytes: a part that is not written at all would not be missed there.
static auto parts(const FilePlan& m) { return std::tuple(m.name, m.size_bytes, m.grid_begin); }
static auto parts(const Failure& m) { return std::tuple(m.code, m.text); }
static auto parts(const std::vector<FilePlan>& plans) {
  std::vector<std::tuple<std::string, uint64_t, uint64_t>> all;
  for (const FilePlan& plan : plans) all.push_back(parts(plan));
  return all;
}
static auto parts(const Hello& m) {
  return std::tuple(m.version, m.path, m.block_bytes, m.writer_threads, m.keep_last, m.max_spares,
                    m.keep_every, m.lock_timeout_s, m.drain_timeout_s);
}
static auto parts(const Begin& m) {
  return std::tuple(m.ticket, m.identity.step, m.identity.run, m.identity.save, m.name,
                    parts(m.files));
}
static auto parts(const Addition& m) { return std::tuple(m.ticket, parts(m.files)); }
static auto parts(const Staged& m) {
  return std::tuple(m.ticket, m.file, m.block, m.bytes, m.slot, m.crc, m.summed);
}
static auto parts(const Seal& m) {
  std::vector<std::tuple<uint32_t, Digest>> digests;
  for (const auto& [file, digest] : m.digests) digests.emplace_back(file, digest);
  return std::tuple(m.ticket, m.manifest, digests);
}
static auto parts(const Link& m) { return std::tuple(m.ticket, m.file, m.from, m.digest); }
static auto parts(const Abandon& m) { return std::tuple(m.ticket, m.reason); }
static auto parts(const SetAside& m) { return std::tuple(m.step); }
static auto parts(const Keep& m) { return std::tuple(m.steps); }
static auto parts(const Close&) { return std::tuple(); }
static auto parts(const Ready&) { return std::tuple(); }
static auto parts(const Refused& m) { return parts(m.failure); }
static auto parts(const Freed& m) { return std::tuple(m.slot); }
static auto parts(const Failing& m) { return std::tuple(m.ticket, parts(m.failure)); }
static auto parts(const Ended& m) {
  return std::tuple(m.ticket, m.committed, m.outcome_unknown, parts(m.failure));
}
static auto parts(const Names& m) { return std::tuple(m.names, parts(m.failure)); }
static auto parts(const Complaint& m) { return std::tuple(m.text); }
static auto parts(const Closed& m) { return std::tuple(m.complaint); }
static auto parts(const Linked& m) { return std::tuple(m.linked); }

}  // namespace pccheck::messages

namespace pccheck::test {
namespace {

using namespace messages;

class Drawn {
 public:
  explicit Drawn(uint64_t seed) : random_(seed) {}

  uint64_t number() { return random_(); }
  uint32_t small() { return static_cast<uint32_t>(random_()); }
  bool truth() { return below(random_, 2) == 0; }
  double seconds() { return static_cast<double>(below(random_, 1000)) / 8 + 0.5; }
  // Of any bytes, and any length from none on.
  std::string text() { return to_text(random_bytes(random_, below(random_, 40))); }
  Id id() {
    Id id;
    std::ranges::copy(random_bytes(random_, id.size()), id.begin());
    return id;
  }
  std::vector<FilePlan> files() {
    std::vector<FilePlan> files(below(random_, 4));
    for (FilePlan& file : files) file = {text(), number(), number()};
    return files;
  }
  Failure failure() { return {static_cast<int32_t>(small()), text()}; }
  std::vector<std::string> names() {
    std::vector<std::string> names(below(random_, 5));
    for (std::string& name : names) name = text();
    return names;
  }

  Digest digest() { return {number(), number()}; }
  std::vector<DigestOf> digests() {
    std::vector<DigestOf> digests(below(random_, 4));
    for (DigestOf& one : digests) one = {small(), digest()};
    return digests;
  }

  std::vector<FromTrainer> all_from_trainer() {
    return {Hello{small(), text(), number(), small(), number(), number(), number(), seconds(),
                  seconds()},
            Begin{number(), {number(), id(), id()}, text(), files()},
            Addition{number(), files()},
            Staged{number(), small(), number(), number(), number(), small(), truth()},
            Seal{number(), random_bytes(random_, below(random_, 90)), digests()},
            Abandon{number(), text()},
            SetAside{number()},
            Keep{{number(), number(), number()}},
            Close{},
            messages::Link{number(), small(), text(), digest()}};
  }
  std::vector<FromMonitor> all_from_monitor() {
    return {Ready{},
            Refused{failure()},
            Freed{number()},
            Failing{number(), failure()},
            Ended{number(), truth(), truth(), failure()},
            Names{names(), failure()},
            Complaint{text()},
            Closed{text()},
            Linked{truth()}};
  }

 private:
  Random random_;
};

FromTrainer decoded(const FromTrainer&, std::span<const std::byte> bytes) {
  return decode_from_trainer(bytes);
}
FromMonitor decoded(const FromMonitor&, std::span<const std::byte> bytes) {
  return decode_from_monitor(bytes);
}

template <typename Visit>
void for_all(Visit visit) {
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    Drawn drawn(seed);
    for (const FromTrainer& message : drawn.all_from_trainer()) visit(message);
    for (const FromMonitor& message : drawn.all_from_monitor()) visit(message);
  }
}

// Understood as something, or refused; never anything else.
template <typename Message>
bool is_understood(const Message& sample, std::span<const std::byte> bytes) {
  try {
    decoded(sample, bytes);
    return true;
  } catch (const std::runtime_error&) {
    return false;
  }
}

TEST(Messages, EveryKindIsTried) {
  Drawn drawn(1);
  EXPECT_EQ(drawn.all_from_trainer().size(), std::variant_size_v<FromTrainer>);
  EXPECT_EQ(drawn.all_from_monitor().size(), std::variant_size_v<FromMonitor>);
}

TEST(Messages, EveryPartOfEveryMessageArrives) {
  for_all([]<typename Message>(const Message& sent) {
    const Message arrived = decoded(sent, encode(sent));
    ASSERT_EQ(arrived.index(), sent.index());
    std::visit(
        [&]<typename Kind>(const Kind& m) {
          EXPECT_EQ(parts(std::get<Kind>(arrived)), parts(m)) << "kind " << sent.index();
        },
        sent);
  });
}

TEST(Messages, EveryPrefixIsRefused) {
  for_all([](const auto& sent) {
    const Bytes bytes = encode(sent);
    for (size_t size = 0; size < bytes.size(); ++size)
      ASSERT_FALSE(is_understood(sent, std::span(bytes).first(size)))
          << size << " bytes of " << bytes.size() << " of kind " << sent.index();
  });
}

TEST(Messages, BytesTooManyAreRefused) {
  for_all([](const auto& sent) {
    Bytes bytes = encode(sent);
    bytes.push_back(std::byte{0});
    ASSERT_FALSE(is_understood(sent, bytes)) << "kind " << sent.index();
  });
}

TEST(Messages, KindsThatThereAreNotAreRefused) {
  for_all([]<typename Message>(const Message& sent) {
    Bytes bytes = encode(sent);
    for (size_t kind = std::variant_size_v<Message>; kind < 256; ++kind) {
      bytes[0] = static_cast<std::byte>(kind);
      ASSERT_FALSE(is_understood(sent, bytes)) << kind;
    }
  });
}

TEST(Messages, AMessageTakenForAnotherKindIsThatKindOrRefused) {
  for_all([]<typename Message>(const Message& sent) {
    Bytes bytes = encode(sent);
    for (size_t kind = 0; kind < std::variant_size_v<Message>; ++kind) {
      bytes[0] = static_cast<std::byte>(kind);
      if (is_understood(sent, bytes)) {
        EXPECT_EQ(decoded(sent, bytes).index(), kind);
      }
    }
  });
}

TEST(Messages, FlippedBitsAreUnderstoodOtherwiseOrRefused) {
  Drawn drawn(7);
  const auto flip_all = [](const auto& sent) {
    Bytes bytes = encode(sent);
    for (size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
      flip_bit(bytes, bit);
      is_understood(sent, bytes);  // nothing else than a runtime_error, no memory that is not there
      flip_bit(bytes, bit);
    }
  };
  for (const FromTrainer& message : drawn.all_from_trainer()) flip_all(message);
  for (const FromMonitor& message : drawn.all_from_monitor()) flip_all(message);
}

TEST(Messages, NoiseIsUnderstoodOrRefused) {
  Random random(3);
  for (int time = 0; time < 20000; ++time) {
    Bytes bytes = random_bytes(random, below(random, 120));
    if (!bytes.empty()) bytes[0] = static_cast<std::byte>(below(random, 9));
    is_understood(FromTrainer{}, bytes);
    is_understood(FromMonitor{}, bytes);
  }
}

// A length or a count of 2^64-1, or one that adds up to a small one, allocates nothing.
TEST(Messages, CountsThatLieAreRefusedBeforeMemoryIsTakenForThem) {
  const std::vector<std::pair<FromTrainer, size_t>> from_trainer = {
      {Begin{.ticket = 1, .identity = {}, .name = "n", .files = {{"f", 1, 0}}}, 1 + 8 + 8 + 32},
      {Begin{.ticket = 1, .identity = {}, .name = "", .files = {{"f", 1, 0}}}, 1 + 8 + 8 + 32 + 8},
      {Begin{.ticket = 1, .identity = {}, .name = "", .files = {{"f", 1, 0}}}, 1 + 8 + 8 + 32 + 16},
      {Addition{1, {{"f", 1, 0}}}, 1 + 8},
      {Seal{1, to_bytes("manifest")}, 1 + 8},
      {Abandon{1, "reason"}, 1 + 8}};
  for (const uint64_t lie :
       {~uint64_t{0}, uint64_t{1} << 63, ~uint64_t{0} - 7, uint64_t{1} << 40, uint64_t{1000}})
    for (const auto& [message, at] : from_trainer) {
      Bytes bytes = encode(message);
      ASSERT_LE(at + 8, bytes.size());
      std::memcpy(bytes.data() + at, &lie, sizeof lie);
      EXPECT_THROW(decode_from_trainer(bytes), std::runtime_error)
          << lie << " at " << at << " of kind " << message.index();
    }
}

TEST(Messages, OneSideDoesNotSpeakTheOthersLanguageByChance) {
  EXPECT_THROW(decode_from_monitor(encode(FromTrainer{Hello{.path = "/runs/a"}})),
               std::runtime_error);
  EXPECT_THROW(decode_from_trainer(encode(FromMonitor{Ready{}})), std::runtime_error);
}

TEST(Failure, OfASystemCallKeepsItsErrnoAndItsWords) {
  const auto error = std::make_exception_ptr(
      std::system_error(ENOSPC, std::generic_category(), "pwrite /runs/a/x @4096"));
  const Failure failure = failure_of(error);
  EXPECT_EQ(failure.code, ENOSPC);
  EXPECT_EQ(failure.text, text_of(error));
  try {
    std::rethrow_exception(to_error(failure));
  } catch (const std::system_error& crossed) {
    EXPECT_EQ(crossed.code(), std::error_code(ENOSPC, std::generic_category()));
    EXPECT_EQ(crossed.what(), failure.text) << "said twice what the system calls it";
  }
}

TEST(Failure, OfOtherKindsKeepsItsWords) {
  const Failure failure = failure_of(error_saying("never sealed"));
  EXPECT_EQ(failure, (Failure{0, "never sealed"}));
  EXPECT_THROW(std::rethrow_exception(to_error(failure)), std::runtime_error);
  EXPECT_EQ(text_of(to_error(failure)), "never sealed");
  EXPECT_EQ(failure_of(nullptr), Failure{});
}

}  // namespace
}  // namespace pccheck::test
