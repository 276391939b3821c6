// What incremental saves rest on: layouts with files of layers, the seal's digests, hard links on a
// real file system, more files than descriptors, and verifying what a reader has not read.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "cpp/engine.h"
#include "cpp/host_copier.h"
#include "cpp/little_endian.h"
#include "cpp/recovery.h"
#include "tests/cpp/layer_files.h"

namespace pccheck::test {
namespace {

using enum Checkpoint::State;
using Names = std::vector<std::string>;

// -- layouts --------------------------------------------------------------------------------------

std::string refused(const std::vector<FileSpec>& files, LayoutOptions options) {
  try {
    Layout::make(files, options);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

LayoutOptions of_layers(uint32_t layer_count) {
  return {.block_bytes = kBlockBytes, .layer_count = layer_count, .files_of_layers = true};
}

TEST(FilesOfLayers, EachFilesHeaderComesWithItsOwnLayer) {
  const auto layout = Layout::make(layer_files({10, 20, 30}), of_layers(3));
  EXPECT_EQ(layout->layers()[0].files, (std::vector<uint32_t>{0, 1, 5}));  // and the index
  EXPECT_EQ(layout->layers()[1].files, (std::vector<uint32_t>{2}));
  EXPECT_EQ(layout->layers()[2].files, (std::vector<uint32_t>{3, 4}));
  EXPECT_TRUE(layout->files_of_layers());
  const auto plain =
      Layout::make(simple_files({10, 20}), {.block_bytes = kBlockBytes, .layer_count = 2});
  EXPECT_EQ(plain->layers()[0].files, (std::vector<uint32_t>{0}));
  EXPECT_TRUE(plain->layers()[1].files.empty());
  EXPECT_FALSE(plain->files_of_layers());
}

TEST(FilesOfLayers, NeedOneOpenBlockHoweverManyTheyAre) {
  EXPECT_EQ(
      Layout::make(layer_files(std::vector<uint64_t>(100, 50)), of_layers(100))->open_blocks(), 1u);
  EXPECT_EQ(Layout::make({{kIndexName, {}, {}, "{}"}}, of_layers(1))->open_blocks(), 0u);
}

TEST(FilesOfLayers, AFileOfTwoLayersIsRefusedByName) {
  const std::string why = refused(simple_files({10, 20}), of_layers(2));
  EXPECT_NE(why.find("model.safetensors"), std::string::npos) << why;
  EXPECT_NE(why.find("layers 0 and 1"), std::string::npos) << why;
}

TEST(FilesOfLayers, ChunksAreRefused) {
  LayoutOptions options = of_layers(1);
  options.chunk_count = 2;
  EXPECT_NE(refused(simple_files({10}), options), "");
}

TEST(FilesOfLayers, ATextIsTheWholeFileWordForWord) {
  const std::string text = std::string(3 * kBlockBytes, 'x') + "end";
  const State state{
      Layout::make({{kIndexName, {}, {}, text}}, {.block_bytes = kBlockBytes, .layer_count = 1}),
      {{}}};
  HostCopier copier;
  RunOnDisk disk;
  HandRun hands{2, kBlockBytes, copier, 1};
  expect_saved(disk, save(hands, disk, 1, state), state);
  EXPECT_EQ(to_text(disk.contents(RunOnDisk::path(1) + "/" + kIndexName)), text);
}

TEST(FilesOfLayers, ATextWithTensorsOrMetadataIsRefused) {
  EXPECT_NE(refused({{"a", {}, {{"t", "F32", {1}, 0}}, "text"}}, of_layers(1)), "");
  EXPECT_NE(refused({{"a", {{"k", "v"}}, {}, "text"}}, of_layers(1)), "");
  EXPECT_NE(refused({{"a", {}, {}, "text"}},
                    {.block_bytes = kBlockBytes, .layer_count = 1, .checksums_in_header = true}),
            "");
}

// -- the seal -------------------------------------------------------------------------------------

constexpr size_t kFirstDigestAt = 72 + 2 + 7 + 8 + 4;

Checksums with_digests() {
  Checksums sums{};
  sums.identity = identity_of(7);
  sums.block_bytes = kBlockBytes;
  sums.manifest_bytes = 9;
  sums.files = {{"a.index", 3, {0x01020304}, Digest{0x1122334455667788, 0x99aabbccddeeff00}},
                {"b.index", kBlockBytes + 1, {1, 2}, std::nullopt},
                {"c.index", 0, {}, Digest{~uint64_t{0}, 1}}};
  return sums;
}

Bytes resealed(Bytes bytes) {
  const uint32_t crc = crc32c(0, std::span(bytes).first(bytes.size() - 4));
  for (size_t i = 0; i < 4; ++i)
    bytes[bytes.size() - 4 + i] = static_cast<std::byte>(crc >> (8 * i));
  return bytes;
}

std::string refusal(const Bytes& bytes) {
  try {
    decode_checksums(bytes);
  } catch (const CorruptCheckpoint& error) {
    return error.what();
  }
  return "";
}

TEST(SealWithDigests, WhatIsEncodedIsDecoded) {
  const Checksums in = with_digests();
  const Checksums out = decode_checksums(encode(in));
  ASSERT_EQ(out.files.size(), in.files.size());
  for (size_t i = 0; i < in.files.size(); ++i) {
    EXPECT_EQ(out.files[i].name, in.files[i].name);
    EXPECT_EQ(out.files[i].blocks, in.files[i].blocks);
    EXPECT_EQ(out.files[i].digest, in.files[i].digest);
  }
}

TEST(SealWithDigests, DigestsStandWhereTheSpecificationHasThem) {
  const Bytes bytes = encode(with_digests());
  const std::span<const std::byte> all(bytes);
  EXPECT_EQ(get_uint(all.subspan(8, 4)), 2u) << "the version";
  EXPECT_EQ(get_uint(all.subspan(kFirstDigestAt - 4, 4)), 0x01020304u);
  EXPECT_EQ(bytes[kFirstDigestAt], std::byte{16});
  std::string hex;
  for (const std::byte byte : all.subspan(kFirstDigestAt + 1, 16)) {
    constexpr std::string_view digits = "0123456789abcdef";
    hex += digits[std::to_integer<size_t>(byte) / 16];
    hex += digits[std::to_integer<size_t>(byte) % 16];
  }
  EXPECT_EQ(hex, to_hex(*with_digests().files[0].digest)) << "as xxhsum prints it";
}

TEST(SealWithDigests, WithoutASingleOneItIsTheFirstVersion) {
  Checksums sums = with_digests();
  for (FileSums& file : sums.files) file.digest.reset();
  EXPECT_EQ(encode(sums)[8], std::byte{1});
}

TEST(SealWithDigests, EverySingleBitFlipAndTruncationIsRefused) {
  Bytes bytes = encode(with_digests());
  for (size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
    flip_bit(bytes, bit);
    ASSERT_NE(refusal(bytes), "") << "bit " << bit;
    flip_bit(bytes, bit);
  }
  for (size_t size = 4; size < bytes.size(); ++size)
    ASSERT_NE(refusal(resealed({bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(size)})), "")
        << size << " bytes, sealed";
  EXPECT_EQ(refusal(bytes), "");
}

TEST(SealWithDigests, ADigestOfAnotherLengthIsRefused) {
  for (const int length : {1, 8, 15, 17, 32, 255}) {
    Bytes bytes = encode(with_digests());
    bytes[kFirstDigestAt] = static_cast<std::byte>(length);
    EXPECT_NE(refusal(resealed(bytes)).find("digest of " + std::to_string(length)),
              std::string::npos);
  }
}

TEST(SealWithDigests, BytesOfOneVersionUnderTheNumberOfTheOtherAreRefused) {
  for (const int version : {1, 2}) {
    Checksums sums = with_digests();
    if (version == 2)
      for (FileSums& file : sums.files) file.digest.reset();
    Bytes bytes = encode(sums);
    bytes[8] = static_cast<std::byte>(version);
    EXPECT_NE(refusal(resealed(bytes)), "") << version;
  }
}

// -- hard links on a real file system -------------------------------------------------------------

class Links : public testing::Test {
 protected:
  Links() {
    ::mkdir((temp / "from").c_str(), 0700);
    ::mkdir((temp / "to").c_str(), 0700);
    from = open_posix_directory(temp / "from", false);
    to = open_posix_directory(temp / "to", false);
    write_file(temp / "from/file", to_bytes("content"));
  }

  TempDir temp;
  std::unique_ptr<Directory> from, to;
};

TEST_F(Links, AreMadeOnceAndThenAreThere) {
  EXPECT_EQ(to->link_file("file", *from, 7), Link::made);
  EXPECT_EQ(inode_of(temp / "to/file"), inode_of(temp / "from/file"));
  EXPECT_EQ(to->link_file("file", *from, 7), Link::was_there);
}

TEST_F(Links, AnotherFileOfThatNameMakesWay) {
  write_file(temp / "to/file", to_bytes("another"));
  std::filesystem::create_hard_link(temp / "to/file", temp / "kept");
  EXPECT_EQ(to->link_file("file", *from, 7), Link::made);
  EXPECT_EQ(read_file(temp / "kept"), to_bytes("another"));
  std::filesystem::remove(temp / "to/file");
  std::filesystem::create_symlink(temp / "kept", temp / "to/file");
  EXPECT_EQ(to->link_file("file", *from, 7), Link::made);
  EXPECT_EQ(read_file(temp / "kept"), to_bytes("another"));
  EXPECT_FALSE(std::filesystem::is_symlink(temp / "to/file"));
}

TEST_F(Links, OnlyToRegularFilesOfTheSizeWanted) {
  EXPECT_EQ(to->link_file("none", *from, 0), Link::impossible);
  EXPECT_EQ(to->link_file("file", *from, 6), Link::impossible);
  std::filesystem::create_symlink(temp / "from/file", temp / "from/link");
  EXPECT_EQ(to->link_file("link", *from, 7), Link::impossible);
  ::mkfifo((temp / "from/fifo").c_str(), 0600);
  EXPECT_EQ(to->link_file("fifo", *from, 0), Link::impossible);
  ::mkdir((temp / "from/directory").c_str(), 0700);
  EXPECT_EQ(to->link_file("directory", *from, 4096), Link::impossible);
  EXPECT_EQ(names_in(temp / "to"), Names{});
  EXPECT_THROW(to->link_file("../from/file", *from, 7), std::invalid_argument);
}

TEST_F(Links, AcrossFileSystemsAreImpossible) {
  std::string elsewhere = "/dev/shm/pccheck-links-XXXXXX";
  ASSERT_NE(::mkdtemp(elsewhere.data()), nullptr);
  struct stat one{}, other{};
  ASSERT_EQ(::stat(elsewhere.c_str(), &one), 0);
  ASSERT_EQ(::stat(temp.path().c_str(), &other), 0);
  const auto there = open_posix_directory(elsewhere, false);
  EXPECT_EQ(there->link_file("file", *from, 7),
            one.st_dev == other.st_dev ? Link::made : Link::impossible);
  std::filesystem::remove_all(elsewhere);
}

TEST_F(Links, AFailureSaysBothPaths) {
  std::filesystem::remove_all(temp / "to");  // still open, but nothing can come into it
  try {
    to->link_file("file", *from, 7);
    // ENOENT is also what a file that has just gone fails with.
  } catch (const std::system_error& error) {
    EXPECT_NE(std::string(error.what()).find(temp / "from/file"), std::string::npos);
  }
  EXPECT_EQ(read_file(temp / "from/file"), to_bytes("content"));
}

// -- on a real disk -------------------------------------------------------------------------------

class IncrementalOnDisk : public testing::Test {
 protected:
  void save_step(uint64_t step, const State& state) {
    const Ticket ticket = save(hands, run, step, state);
    ASSERT_EQ(ticket->state(), committed) << text_of(ticket->error());
    for (size_t f = 0; f < state.layout->files().size(); ++f)
      ASSERT_EQ(read_file(file(step, state.layout->files()[f].name)), state.file(f));
    CheckpointReader(run.temp.path(), name_of_step(step)).verify(2);
  }

  std::string file(uint64_t step, const std::string& name) const {
    return run.path(step) + "/" + name;
  }

  RealRun run{{.keep_last = 2, .max_spares = 1}};
  HostCopier copier;
  HandRun hands{4, kBlockBytes, copier, 1};
};

TEST_F(IncrementalOnDisk, FilesAreSharedAndNeverChangeWhileCheckpointsComeAndGo) {
  State state = layer_state({6000, 3000, 50});
  save_step(1, state);
  const ino_t frozen = inode_of(file(1, model_file(1)));
  for (uint64_t step = 2; step <= 9; ++step) {
    state = changed(state, 0, step);
    if (step == 6) state = changed(state, 1, step);
    save_step(step, state);
    EXPECT_EQ(inode_of(file(step, model_file(1))) == frozen, step < 6) << step;
  }
  EXPECT_EQ(run.directories(),
            (Names{name_of_step(7) + ".partial", name_of_step(8), name_of_step(9)}));
  run.run->remove_spares();
  CheckpointReader(run.temp.path(), name_of_step(8)).verify(1);
  CheckpointReader(run.temp.path(), name_of_step(9)).verify(1);
}

TEST_F(IncrementalOnDisk, AReaderOfARetiredCheckpointsFileKeepsItsBytes) {
  State state = layer_state({6000, 3000, 50});
  save_step(1, state);
  const Bytes first = state.file(0);
  std::filesystem::create_hard_link(file(1, model_file(0)), run.temp / "copy");
  for (uint64_t step = 2; step <= 6; ++step) {
    state = changed(state, 0, step);
    save_step(step, state);
    EXPECT_EQ(read_file(run.temp / "copy"), first);
  }
}

TEST_F(IncrementalOnDisk, DirectoriesLeftByACrashAreReclaimedWithTheirIndex) {
  save_step(1, layer_state({10}));
  std::filesystem::copy(run.path(1), run.path(2) + ".partial");
  run.run.reset();
  run.reopen();
  run.run->remove_spares();
  EXPECT_EQ(run.directories(), Names{name_of_step(1)});
}

struct FewDescriptors {
  explicit FewDescriptors(rlim_t most) {
    ::getrlimit(RLIMIT_NOFILE, &before);
    const rlimit few{most, before.rlim_max};
    ::setrlimit(RLIMIT_NOFILE, &few);
  }
  ~FewDescriptors() { ::setrlimit(RLIMIT_NOFILE, &before); }
  rlimit before{};
};

TEST(ManyFiles, AreWrittenAndReadWithFewerDescriptorsThanFiles) {
  const State state = layer_state(std::vector<uint64_t>(300, 40));
  RealRun run;
  {
    const FewDescriptors few(300);
    Engine engine({kBlockBytes, 2}, std::make_unique<HostCopier>(),
                  allocate_host_slots(64 * kBlockBytes), std::make_unique<LocalPersister>(4));
    for (uint64_t step = 1; step <= 3; ++step) {
      ASSERT_TRUE(engine.wait_room(in_a_minute()));
      const State now = step == 2 ? layer_state(std::vector<uint64_t>(300, 40), 5) : state;
      const Ticket ticket =
          engine.begin(identity_of(step), name_of_step(step), now.layout, run.target(step));
      hand_over_all(*ticket, now);
      ticket->seal(kManifest, std::nullopt);
      ASSERT_TRUE(ticket->wait_finished(in_a_minute()));
      ASSERT_EQ(ticket->state(), committed) << text_of(ticket->error());
    }
    CheckpointReader reader(run.temp.path(), name_of_step(3));
    reader.verify(4);
    Bytes last(state.tensors[299][0].size());
    for (uint32_t f = 0; f < reader.checksums().files.size(); ++f)
      if (reader.checksums().files[f].name == model_file(299))
        reader.read({{f, state.layout->tensor(state.layout->layers()[299].tensors[0]).begin, last}},
                    2);
    EXPECT_EQ(last, state.tensors[299][0]);
  }
  for (size_t f = 0; f < state.layout->files().size(); ++f)
    ASSERT_EQ(read_file(run.path(3) + "/" + state.layout->files()[f].name), state.file(f));
}

TEST(IncrementalEngine, ManyCheckpointsInFlightWithRetiringAllReachTheDiskWhole) {
  RunOnDisk disk({.keep_last = 1, .max_spares = 2});
  State state = layer_state({5000, 2000, 40, 900});
  uint64_t linked = 0;
  {
    Engine engine({kBlockBytes, 3}, std::make_unique<HostCopier>(),
                  allocate_host_slots(6 * kBlockBytes), std::make_unique<LocalPersister>(3));
    std::vector<Ticket> tickets;
    for (uint64_t step = 1; step <= 60; ++step) {
      state = changed(std::move(state), step % 3, step);
      ASSERT_TRUE(engine.wait_room(in_a_minute()));
      tickets.push_back(
          engine.begin(identity_of(step), name_of_step(step), state.layout, disk.target(step)));
      hand_over_all(*tickets.back(), state);
      tickets.back()->seal(kManifest, std::nullopt);
      ASSERT_TRUE(tickets.back()->wait_all_staged(in_a_minute()));  // the tensors change now
    }
    ASSERT_TRUE(engine.wait_idle(in_a_minute()));
    for (const Ticket& ticket : tickets)
      ASSERT_EQ(ticket->state(), committed) << text_of(ticket->error());
    linked = engine.counts().bytes_linked;
    EXPECT_EQ(engine.links_refused(), 0u);
  }
  EXPECT_GT(linked, 0u);
  expect_checkpoint(disk, RunOnDisk::path(60), identity_of(60), state, kManifest);
}

// -- verifying the rest ---------------------------------------------------------------------------

TEST(VerifyingTheRest, FindsWhatWasNotReadAndReadsNothingTwice) {
  const State state = layer_state({6000, 3000});
  RealRun run;
  HostCopier copier;
  HandRun hands{4, kBlockBytes, copier, 1};
  ASSERT_EQ(save(hands, run, 1, state)->state(), committed);
  const TensorExtent& weight = state.layout->tensor(state.layout->layers()[0].tensors[0]);
  const std::string damaged = run.path(1) + "/" + model_file(0);
  Bytes into(weight.bytes);

  CheckpointReader reader(run.temp.path(), name_of_step(1));
  reader.read({{0, weight.begin, into}}, 2);
  EXPECT_EQ(into, state.tensors[0][0]);
  // What was verified is not looked at again...
  const size_t within = 8 * (weight.begin + weight.bytes / 2);
  flip_bit_of_file(damaged, within);
  EXPECT_NO_THROW(reader.verify_rest(2));
  EXPECT_THROW(reader.verify(2), CorruptCheckpoint);
  flip_bit_of_file(damaged, within);
  // ... but all else is: a header, another tensor, another file.
  const std::string other = run.path(1) + "/" + model_file(1);
  for (const auto& [file, bit] : std::vector<std::pair<std::string, size_t>>{
           {damaged, 8 * std::filesystem::file_size(damaged) - 1},  // another tensor
           {other, 100},                                            // a header
           {other, 8 * std::filesystem::file_size(other) - 1}}) {
    CheckpointReader again(run.temp.path(), name_of_step(1));
    again.read({{0, weight.begin, into}}, 2);
    flip_bit_of_file(file, bit);
    EXPECT_THROW(again.verify_rest(2), CorruptCheckpoint) << file << " bit " << bit;
    flip_bit_of_file(file, bit);
    EXPECT_NO_THROW(again.verify_rest(2));
  }
}

}  // namespace
}  // namespace pccheck::test
