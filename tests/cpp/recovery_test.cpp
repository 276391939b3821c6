// Reading back what the engine wrote to a real disk, whole and damaged.
#include "cpp/recovery.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <list>
#include <set>
#include <sstream>
#include <system_error>
#include <thread>

#include "cpp/crc32c.h"
#include "cpp/engine.h"
#include "cpp/host_copier.h"
#include "tests/cpp/run_on_disk.h"

namespace pccheck::test {
namespace {

// Requests for every tensor of a state, in random order and pieces, and where they go.
struct ReadBack {
  ReadBack(const State& state, Random& random) {
    for (size_t layer = 0; layer < state.tensors.size(); ++layer)
      for (size_t t = 0; t < state.tensors[layer].size(); ++t) {
        const TensorRef ref = state.layout->layers()[layer].tensors[t];
        const TensorExtent& extent = state.layout->tensor(ref);
        Bytes& into = targets.emplace_back(extent.bytes);
        expected.push_back(state.tensors[layer][t]);
        for (size_t at = 0; at < into.size();) {
          const size_t part = std::min<size_t>(into.size() - at, 1 + below(random, 9000));
          requests.push_back({ref.file, extent.begin + at, std::span(into).subspan(at, part)});
          at += part;
        }
      }
    std::ranges::shuffle(requests, random);
  }
  std::list<Bytes> targets;
  std::list<Bytes> expected;
  std::vector<ReadRequest> requests;
};

class Recovery : public testing::Test {
 protected:
  Ticket write(uint64_t step, const State& written) {
    Engine engine(
        {written.layout->block_bytes(), 1}, std::make_unique<HostCopier>(),
        allocate_host_slots((written.layout->open_blocks() + 2) * written.layout->block_bytes()),
        std::make_unique<LocalPersister>(2));
    Ticket ticket =
        engine.begin(identity_of(step), name_of_step(step), written.layout, run.target(step));
    hand_over_all(*ticket, written);
    ticket->seal(kManifest, std::nullopt);
    EXPECT_TRUE(ticket->wait_finished(in_a_minute()));
    EXPECT_EQ(ticket->state(), Checkpoint::State::committed) << text_of(ticket->error());
    return ticket;
  }

  CheckpointReader open(uint64_t step = 1) { return {run.temp.path(), name_of_step(step)}; }

  template <typename Call>
  static std::string corruption(Call call) {
    try {
      call();
    } catch (const CorruptCheckpoint& error) {
      return error.what();
    }
    return "";
  }

  RealRun run;
};

TEST_F(Recovery, WhateverWasSavedIsReadBack) {
  Random random(1);
  for (uint64_t step = 1; step <= 25; ++step) {
    const State state = random_state(random);
    write(step, state);
    CheckpointReader reader = open(step);
    EXPECT_EQ(reader.path(), run.path(step));
    EXPECT_EQ(reader.checksums().identity.step, step);
    EXPECT_EQ(to_text(reader.manifest()), to_text(kManifest));
    ReadBack back(state, random);
    reader.read(back.requests, static_cast<unsigned>(below(random, 5)));
    ASSERT_EQ(back.targets, back.expected) << "step " << step;
    reader.verify(2);
  }
}

TEST_F(Recovery, ADamagedBlockIsFoundByWhoeverTouchesItAndNamed) {
  const State state = simple_state({3000, 5000, 2000});
  write(1, state);
  const std::string file = run.path(1) + "/model.safetensors";
  Random random(2);
  for (uint64_t block = 0; block < state.layout->block_count(0); ++block) {
    const uint64_t begin = state.layout->block_offset(0, block);
    const uint64_t end = begin + state.layout->block_size(0, block);
    const size_t bit = 8 * begin + below(random, 8 * (end - begin));
    flip_bit_of_file(file, bit);
    CheckpointReader reader = open();
    const std::string named = "block " + std::to_string(block) + " of " + file;
    EXPECT_NE(corruption([&] { reader.verify(3); }).find(named), std::string::npos);
    for (size_t layer = 0; layer < 3; ++layer) {
      const TensorExtent& extent = state.layout->files()[0].tensors[layer];
      Bytes into(extent.bytes);
      const std::string said = corruption([&] { reader.read({{0, extent.begin, into}}, 2); });
      const bool touched = extent.begin < end && extent.begin + extent.bytes > begin;
      EXPECT_EQ(said.find(named) != std::string::npos, touched) << named << ", layer " << layer;
      if (!touched) {
        EXPECT_EQ(into, state.tensors[layer][0]);
      }
    }
    flip_bit_of_file(file, bit);
  }
  open().verify(2);
}

TEST_F(Recovery, RequestsMayOverlap) {
  const State state = simple_state({9000});
  write(1, state);
  CheckpointReader reader = open();
  const uint64_t begin = state.layout->files()[0].tensors[0].begin;
  const std::span<const std::byte> bytes = state.tensors[0][0];
  struct {
    size_t at, size;
  } const ranges[] = {{0, 9000}, {0, 9000}, {100, 50}, {120, 8000}, {5000, 4000}, {100, 50}};
  std::list<Bytes> targets;
  std::vector<ReadRequest> requests;
  for (const auto& [at, size] : ranges)
    requests.push_back({0, begin + at, targets.emplace_back(size)});
  reader.read(requests, 2);
  auto target = targets.begin();
  for (const auto& [at, size] : ranges)
    EXPECT_TRUE(std::ranges::equal(*target++, bytes.subspan(at, size))) << at << ", " << size;
}

// What this process has been given by read calls so far, but for those made here.
uint64_t bytes_read() {
  static uint64_t here = 0;
  std::stringstream io;
  io << std::ifstream("/proc/self/io").rdbuf();
  std::string name;
  uint64_t bytes = 0;
  io >> name >> bytes;
  EXPECT_EQ(name, "rchar:");
  const uint64_t others = bytes - here;
  here += io.str().size();
  return others;
}

class ReadingAhead : public Recovery {
 protected:
  ReadingAhead() { write(1, state); }

  const std::string model = run.path(1) + "/model.safetensors";
  const State state = simple_state({3000, 9000, 40'000});
};

TEST_F(ReadingAhead, GivesWhatReadingGives) {
  for (const unsigned threads : {1u, 2u, 4u, 20u})
    for (const unsigned ahead : {1u, 2u, 20u}) {
      Random random(threads);
      CheckpointReader reader = open();
      reader.read_ahead(0, ahead);
      ReadBack back(state, random);
      reader.read(back.requests, threads);
      EXPECT_EQ(back.targets, back.expected) << threads << " threads, ahead " << ahead;
    }
}

TEST_F(ReadingAhead, WhatWasReadIsNotReadAgain) {
  CheckpointReader reader = open();
  const uint64_t before = bytes_read();
  reader.read_ahead(0, 2);
  const Clock::time_point give_up = in_a_minute();
  while (bytes_read() < before + 3 * kBlockBytes && Clock::now() < give_up)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  std::filesystem::resize_file(model, 0);
  std::filesystem::resize_file(model, state.layout->files()[0].size_bytes);  // all zeros now
  const TensorExtent& first = state.layout->files()[0].tensors[0];
  ASSERT_LT(first.begin, 3 * kBlockBytes);
  Bytes into(std::min<size_t>(first.bytes, 3 * kBlockBytes - first.begin));
  reader.read({{0, first.begin, into}}, 2);
  EXPECT_TRUE(std::ranges::equal(into, std::span(state.tensors[0][0]).first(into.size())));
  EXPECT_NE(corruption([&] { reader.read({{0, first.begin, into}}, 2); }), "");
}

TEST_F(ReadingAhead, AnErrorIsTheReadsToTell) {
  CheckpointReader reader = open();
  std::filesystem::resize_file(model, 10);
  reader.read_ahead(0, 2);
  const TensorExtent& first = state.layout->files()[0].tensors[0];
  Bytes into(first.bytes);
  EXPECT_THROW(reader.read({{0, first.begin, into}}, 2), std::system_error);
}

TEST_F(ReadingAhead, DamageIsFoundAllTheSame) {
  const TensorExtent& first = state.layout->files()[0].tensors[0];
  flip_bit_of_file(model, 8 * (first.begin + 10));
  CheckpointReader reader = open();
  reader.read_ahead(0, 2);
  Bytes into(first.bytes);
  EXPECT_NE(corruption([&] { reader.read({{0, first.begin, into}}, 2); }).find("block 0"),
            std::string::npos);
}

TEST_F(ReadingAhead, MayBeGivenUp) {
  {
    open().read_ahead(0, 3);
  }
  CheckpointReader reader = open();
  EXPECT_THROW(reader.read_ahead(7, 1), std::out_of_range);
  reader.read_ahead(0, 3);
  reader.read_ahead(0, 2);
  reader.verify(2);
}

TEST_F(Recovery, EverySingleBitFlipOfChecksumsAndManifestIsFoundOnOpening) {
  write(1, simple_state({3000}));
  for (const char* name : {kChecksumsName, kManifestName}) {
    const std::string file = run.path(1) + "/" + name;
    const size_t bits = 8 * std::filesystem::file_size(file);
    for (size_t bit = 0; bit < bits; ++bit) {
      flip_bit_of_file(file, bit);
      ASSERT_NE(corruption([&] { open(); }), "") << name << ", bit " << bit;
      flip_bit_of_file(file, bit);
    }
  }
  open().verify(1);
}

TEST_F(Recovery, FilesCutShortOrGrownAreFoundOnOpening) {
  write(1, simple_state({3000}));
  for (const char* name : {"model.safetensors", kChecksumsName, kManifestName}) {
    const std::string file = run.path(1) + "/" + name;
    const Bytes good = read_file(file);
    for (const size_t size : {size_t{0}, size_t{1}, good.size() / 2, good.size() - 1,
                              good.size() + 1, good.size() + 4096}) {
      Bytes changed = good;
      changed.resize(size);
      write_file(file, changed);
      EXPECT_NE(corruption([&] { open(); }), "") << name << " of " << size << " bytes";
    }
    write_file(file, good);
  }
  open().verify(1);
}

TEST_F(Recovery, AFileCutShortWhileItIsReadIsAnError) {
  const State state = simple_state({9000});
  write(1, state);
  CheckpointReader reader = open();
  std::filesystem::resize_file(run.path(1) + "/model.safetensors", 5000);
  EXPECT_THROW(reader.verify(2), std::system_error);
}

TEST_F(Recovery, MissingOrForeignFilesAreNamed) {
  write(1, simple_state({3000}));
  for (const char* name : {"model.safetensors", kChecksumsName, kManifestName}) {
    const std::string file = run.path(1) + "/" + name, away = run.temp / "away";
    const auto expect_named = [&](const char* what) {
      try {
        open();
        ADD_FAILURE() << what << " in place of " << name;
      } catch (const std::system_error& error) {
        EXPECT_NE(std::string(error.what()).find(file), std::string::npos) << error.what();
      }
    };
    std::filesystem::rename(file, away);
    expect_named("nothing");
    ASSERT_EQ(::mkfifo(file.c_str(), 0600), 0);
    expect_named("a FIFO");
    std::filesystem::remove(file);
    std::filesystem::create_symlink(away, file);
    expect_named("a link");
    std::filesystem::remove(file);
    std::filesystem::create_directory(file);
    expect_named("a directory");
    std::filesystem::remove(file);
    std::filesystem::rename(away, file);
  }
  EXPECT_THROW(open(2), std::system_error);
  EXPECT_THROW(CheckpointReader(run.temp / "nowhere", name_of_step(1)), std::system_error);
  EXPECT_THROW(CheckpointReader(run.temp.path(), "../" + name_of_step(1)), std::invalid_argument);
}

TEST_F(Recovery, PiecesOfOtherCheckpointsAreNotTaken) {
  const State state = simple_state({3000});
  write(1, state);
  write(2, simple_state({3000}, 2));
  const auto exchanged = [&](const char* name) {
    const std::string file = run.path(1) + "/" + name;
    const Bytes good = read_file(file);
    write_file(file, read_file(run.path(2) + "/" + name));
    const std::string said = corruption([&] { open().verify(1); });
    write_file(file, good);
    return said;
  };
  EXPECT_NE(exchanged("model.safetensors").find("block"), std::string::npos);
  EXPECT_NE(exchanged(kChecksumsName).find("step 2"), std::string::npos);
  // The manifests are equal here; another one is not taken.
  EXPECT_EQ(exchanged(kManifestName), "");
  write_file(run.path(2) + "/" + kManifestName, to_bytes(R"({"b":"manifest"})"));
  EXPECT_NE(exchanged(kManifestName).find(kManifestName), std::string::npos);
  // Nor a whole checkpoint under another step's name.
  std::filesystem::rename(run.path(1), run.path(3));
  EXPECT_NE(corruption([&] { open(3); }).find("step 1"), std::string::npos);
}

TEST_F(Recovery, AManifestLargerThanSealedIsNotEvenRead) {
  write(1, simple_state({10}));
  const std::string file = run.path(1) + "/" + kManifestName;
  std::filesystem::resize_file(file, uint64_t{1} << 40);  // sparse
  EXPECT_NE(corruption([&] { open(); }).find(file), std::string::npos);
}

TEST_F(Recovery, RequestsOutsideTheFilesAreRefused) {
  const State state = simple_state({3000});
  write(1, state);
  CheckpointReader reader = open();
  const uint64_t size = state.layout->files()[0].size_bytes;
  Bytes into(100);
  const auto refused = [&](uint32_t file, uint64_t offset) {
    return corruption([&] { reader.read({{file, offset, into}}, 1); }) != "";
  };
  EXPECT_TRUE(refused(1, 0));
  EXPECT_TRUE(refused(~uint32_t{0}, 0));
  EXPECT_TRUE(refused(0, size - 99));
  EXPECT_TRUE(refused(0, size));
  EXPECT_TRUE(refused(0, size + 1));
  EXPECT_TRUE(refused(0, ~uint64_t{0}));
  EXPECT_TRUE(refused(0, ~uint64_t{0} - 99));
  EXPECT_FALSE(refused(0, size - 100));
  reader.read({}, 1);
  reader.read({{0, size, {}}}, 1);
}

TEST_F(Recovery, OnlyTheBlocksThatAreAskedForAreReadAndEachOnce) {
  MemoryDisk disk;
  const State state = simple_state({3000, 3000});
  const Bytes bytes = state.file(0);
  disk.put("/disk/f", bytes);
  std::vector<uint32_t> sums;
  for (size_t at = 0; at < bytes.size(); at += kBlockBytes)
    sums.push_back(
        crc32c(0, std::span(bytes).subspan(at, std::min(kBlockBytes, bytes.size() - at))));
  const auto root = disk.root();
  const auto file = root->open_file("f");
  const VerifiedFile verified{file.get(), "f", 0, bytes.size(), kBlockBytes, sums};
  Bytes a(10), b(10), c(5000);
  read_verified({&verified, 1}, {{0, 4096 + 4090, c}, {0, 4100, a}, {0, 8000, b}}, 2);
  EXPECT_TRUE(std::ranges::equal(c, std::span(bytes).subspan(4096 + 4090, 5000)));
  std::set<uint64_t> offsets;
  size_t reads = 0;
  for (const Operation& operation : disk.log())
    if (operation.call == "pread") {
      ++reads;
      offsets.insert(operation.offset);
    }
  EXPECT_EQ(offsets, (std::set<uint64_t>{4096, 8192, 12'288}));
  EXPECT_EQ(reads, 3u);
}

TEST_F(Recovery, AFailingReadEndsTheOthersAndIsReported) {
  MemoryDisk disk;
  disk.put("/disk/f", Bytes(40 * kBlockBytes));
  const uint32_t sum = crc32c(0, Bytes(kBlockBytes));
  const std::vector<uint32_t> sums(40, sum);
  const auto file = disk.root()->open_file("f");
  const VerifiedFile verified{file.get(), "f", 0, 40 * kBlockBytes, kBlockBytes, sums};
  disk.before = [](const Operation& operation) {
    if (operation.call == "pread" && operation.offset == 7 * kBlockBytes)
      fail_operation(operation, EIO);
  };
  for (const unsigned threads : {1u, 4u}) {
    Bytes into(40 * kBlockBytes);
    EXPECT_THROW(read_verified({&verified, 1}, {{0, 0, into}}, threads), std::system_error);
  }
}

}  // namespace
}  // namespace pccheck::test
