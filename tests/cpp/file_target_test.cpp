// A checkpoint that is one file: saved, replaced as a whole, read back, damaged.
#include "cpp/file_target.h"

#include <gtest/gtest.h>
#include <cerrno>
#include <optional>
#include <system_error>

#include "cpp/host_copier.h"
#include "cpp/manual_copier.h"
#include "tests/cpp/run_on_disk.h"

namespace pccheck::test {
namespace {

using enum Checkpoint::State;

class FileTarget : public testing::Test {
 protected:
  static State make_state(uint64_t seed, uint64_t elements = 5000, uint32_t chunks = 1) {
    Random random(seed);
    return fill(
        Layout::make(
            {{"any",
              {{"format", "pt"}},
              {{"w", "F32", {elements}, 0}, {"none", "F32", {0}, 0}, {"b", "U8", {77}, 0}}}},
            {.block_bytes = kBlockBytes,
             .layer_count = 1,
             .chunk_count = chunks,
             .checksums_in_header = true}),
        random);
  }

  Ticket begin(const State& state, const std::string& path) {
    Ticket ticket = hands.begin(1, state.layout, make_file_target(path));
    hand_over_all(*ticket, state);
    ticket->seal({}, std::nullopt);
    return ticket;
  }

  Ticket begin(State&&, const std::string&) = delete;  // it must live until it is staged

  void save(const State& state, const std::string& path) {
    const Ticket ticket = begin(state, path);
    hands.run();
    ASSERT_EQ(ticket->state(), committed) << text_of(ticket->error());
  }

  static void expect_reads_as(const std::string& path, const State& state) {
    const SealedFile file(path);
    const std::vector<TensorRef>& refs = state.layout->layers()[0].tensors;
    ASSERT_EQ(file.header().tensors.size(), refs.size());
    for (size_t t = 0; t < refs.size(); ++t) {
      const TensorExtent& extent = state.layout->tensor(refs[t]);
      const safetensors::Entry& entry = file.header().tensors.at(extent.spec.name);
      Bytes into(entry.bytes);
      file.read({{0, entry.begin, into}}, 2);
      ASSERT_EQ(into, state.tensors[0][t]) << extent.spec.name;
    }
  }

  static bool is_refused(const std::string& path) {
    try {
      const SealedFile file(path);
      std::vector<Bytes> targets;
      std::vector<ReadRequest> requests;
      for (const auto& [name, entry] : file.header().tensors)
        requests.push_back({0, entry.begin, targets.emplace_back(entry.bytes)});
      file.read(requests, 1);
    } catch (const safetensors::Malformed&) {
      return true;
    } catch (const CorruptCheckpoint&) {
      return true;
    }
    return false;
  }

  TempDir temp;
  HostCopier copier;
  HandRun hands{12, kBlockBytes, copier, 1};
};

TEST_F(FileTarget, WhatIsSavedIsOneFileThatReadsBack) {
  for (const uint64_t elements : {0u, 1u, 1024u, 20'000u})
    for (const uint32_t chunks : {1u, 3u}) {
      const std::string path =
          temp / ("w" + std::to_string(elements) + "." + std::to_string(chunks));
      const State state = make_state(elements, elements, chunks);
      save(state, path);
      expect_reads_as(path, state);
      // Like any safetensors file: its data are the tensors, its header differs in the sums alone.
      const Bytes bytes = read_file(path), expected = state.file(0);
      ASSERT_EQ(bytes.size(), expected.size());
      const size_t begin = state.layout->files()[0].data_begin();
      EXPECT_TRUE(
          std::ranges::equal(std::span(bytes).subspan(begin), std::span(expected).subspan(begin)));
    }
  EXPECT_EQ(names_in(temp.path()).size(), 8u) << "something else was left behind";
}

TEST_F(FileTarget, AFileWithoutASingleTensorIsSavedToo) {
  Random random(1);
  const State state = fill(
      Layout::make({{"any", {}, {}}},
                   {.block_bytes = kBlockBytes, .layer_count = 1, .checksums_in_header = true}),
      random);
  save(state, temp / "empty");
  EXPECT_TRUE(SealedFile(temp / "empty").header().tensors.empty());
}

TEST_F(FileTarget, WhatWasThereIsReplacedAsAWhole) {
  const State before = make_state(1), after = make_state(2, 9000);
  const std::string path = temp / "model.safetensors";
  save(before, path);
  const Ticket ticket = begin(after, path);
  while (hands.stager.run_one() || hands.writers.run_one()) {
  }
  expect_reads_as(path, before);
  EXPECT_EQ(names_in(temp.path()).size(), 2u);
  hands.run();
  EXPECT_EQ(ticket->state(), committed);
  expect_reads_as(path, after);
  EXPECT_EQ(names_in(temp.path()), std::vector<std::string>{"model.safetensors"});
}

TEST_F(FileTarget, NothingIsVisibleBeforeItIsDurableNorAcknowledgedBeforeItsNameIs) {
  MemoryDisk disk;
  int replaced = 0, acknowledged = 0;
  disk.before = [&](const Operation& operation) {
    if (operation.call != "replace") return;
    ++replaced;
    EXPECT_EQ(disk.unsynced(operation.path), std::vector<std::string>{});
  };
  const State first = make_state(1), second = make_state(2);
  for (const State* state : {&first, &second}) {
    const Ticket ticket =
        hands.begin(1, state->layout, make_file_target(disk.root(), "model.safetensors"),
                    [&](Checkpoint::State ended) {
                      ++acknowledged;
                      EXPECT_EQ(ended, committed);
                      EXPECT_EQ(disk.unsynced(MemoryDisk::kRoot), std::vector<std::string>{});
                    });
    hand_over_all(*ticket, *state);
    ticket->seal({}, std::nullopt);
    hands.run();
  }
  EXPECT_EQ(replaced, 2);
  EXPECT_EQ(acknowledged, 2);
}

TEST_F(FileTarget, AFailureAtAnyOperationLeavesTheFileThatWasThereOrTheNewOneWhole) {
  const State before = make_state(1), after = make_state(2);
  for (size_t index = 0;; ++index) {
    SCOPED_TRACE("operation " + std::to_string(index));
    MemoryDisk disk;
    disk.put("/disk/model.safetensors", before.file(0));
    std::optional<Operation> hit;
    disk.before = [&](const Operation& operation) {
      if (hit || disk.operations() != index + 1) return;
      hit = operation;
      fail_operation(operation, ENOSPC);
    };
    Ticket ticket;
    try {
      ticket = hands.begin(1, after.layout, make_file_target(disk.root(), "model.safetensors"));
    } catch (const std::system_error&) {
      continue;  // nothing has begun
    }
    hand_over_all(*ticket, after);
    ticket->seal({}, std::nullopt);
    hands.run();
    if (!hit) {
      ASSERT_EQ(ticket->state(), committed) << text_of(ticket->error());
      EXPECT_GT(index, 8u);
      break;
    }
    ASSERT_EQ(ticket->state(), failed);
    EXPECT_EQ(disk.names(MemoryDisk::kRoot), std::vector<std::string>{"model.safetensors"});
    if (hit->call == "sync") {
      EXPECT_THROW(std::rethrow_exception(ticket->error()), OutcomeUnknown);
      break;  // the last operation: nothing may follow
    }
    EXPECT_EQ(disk.contents("/disk/model.safetensors"), before.file(0));
    EXPECT_EQ(hands.pool.free_slots(), hands.pool.slot_count());
  }
}

TEST_F(FileTarget, TwoSavesToOnePathDoNotMeet) {
  const State first = make_state(1), second = make_state(2);
  const std::string path = temp / "model.safetensors";
  const Ticket a = begin(first, path), b = begin(second, path);
  hands.run();
  EXPECT_EQ(a->state(), committed) << text_of(a->error());
  EXPECT_EQ(b->state(), committed) << text_of(b->error());
  expect_reads_as(path, second);
  EXPECT_EQ(names_in(temp.path()).size(), 1u);
}

TEST_F(FileTarget, AFailureLeavesWhatWasThereAndNothingElse) {
  const State before = make_state(1), after = make_state(2);
  const std::string path = temp / "model.safetensors";
  save(before, path);
  const Ticket ticket = begin(after, path);
  while (hands.stager.run_one() || hands.writers.run_one()) {
  }
  ticket->fail(error_saying("abandoned"));
  hands.run();
  EXPECT_EQ(ticket->state(), failed);
  expect_reads_as(path, before);
  EXPECT_EQ(names_in(temp.path()), std::vector<std::string>{"model.safetensors"});
  EXPECT_FALSE(hands.committer.take_complaint());
}

TEST_F(FileTarget, ADirectoryInTheWayFailsTheSaveAndIsNamed) {
  std::filesystem::create_directory(temp / "model.safetensors");
  const State state = make_state(1);
  const Ticket ticket = begin(state, temp / "model.safetensors");
  hands.run();
  EXPECT_EQ(ticket->state(), failed);
  EXPECT_NE(text_of(ticket->error()).find(temp / "model.safetensors"), std::string::npos);
  EXPECT_EQ(names_in(temp.path()), std::vector<std::string>{"model.safetensors"});
}

TEST_F(FileTarget, PathsThatCannotBeAreRefusedBeforeAnythingIsWritten) {
  EXPECT_THROW(make_file_target(temp / "missing/model.safetensors"), std::system_error);
  EXPECT_THROW(make_file_target(temp / ""), std::invalid_argument);
  EXPECT_THROW(make_file_target(""), std::invalid_argument);
  EXPECT_TRUE(names_in(temp.path()).empty());
}

TEST_F(FileTarget, ALinkIsReplacedNotFollowed) {
  write_file(temp / "outside", to_bytes("stays"));
  std::filesystem::create_symlink("outside", temp / "model.safetensors");
  const State state = make_state(1);
  save(state, temp / "model.safetensors");
  EXPECT_EQ(read_file(temp / "outside"), to_bytes("stays"));
  EXPECT_FALSE(std::filesystem::is_symlink(temp / "model.safetensors"));
  expect_reads_as(temp / "model.safetensors", state);
}

TEST_F(FileTarget, EverySingleBitFlipIsFound) {
  const std::string path = temp / "model.safetensors";
  save(make_state(1, 1500), path);
  ASSERT_FALSE(is_refused(path));
  const size_t bits = 8 * std::filesystem::file_size(path);
  for (size_t bit = 0; bit < bits; bit += bit < 8 * 600 ? 1 : 61) {
    flip_bit_of_file(path, bit);
    ASSERT_TRUE(is_refused(path)) << "bit " << bit;
    flip_bit_of_file(path, bit);
  }
  EXPECT_FALSE(is_refused(path));
}

TEST_F(FileTarget, FilesCutShortGrownOrForeignAreRefused) {
  const std::string path = temp / "model.safetensors";
  save(make_state(1), path);
  const Bytes good = read_file(path);
  for (const size_t size : {size_t{0}, size_t{7}, size_t{8}, size_t{100}, size_t{4096},
                            good.size() - 1, good.size() + 1}) {
    Bytes changed = good;
    changed.resize(size);
    write_file(path, changed);
    EXPECT_TRUE(is_refused(path)) << size;
  }
  // safetensors, but without checksums.
  write_file(path, simple_state({100}).file(0));
  EXPECT_TRUE(is_refused(path));
  EXPECT_THROW(SealedFile(temp / "missing"), std::system_error);
}

TEST_F(FileTarget, ReadsOutsideTheDataAreRefused) {
  const State state = make_state(1);
  save(state, temp / "f");
  const SealedFile file(temp / "f");
  Bytes into(10);
  EXPECT_THROW(file.read({{0, file.header().data_begin - 1, into}}, 1), CorruptCheckpoint);
  EXPECT_THROW(file.read({{0, state.layout->files()[0].size_bytes - 9, into}}, 1),
               CorruptCheckpoint);
  EXPECT_THROW(file.read({{1, file.header().data_begin, into}}, 1), CorruptCheckpoint);
}

}  // namespace
}  // namespace pccheck::test
