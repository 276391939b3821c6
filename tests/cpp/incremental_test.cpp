// Incremental saves by hand-run workers: which files are written, which are shared, and that what
// is shared never changes and never goes with another checkpoint.
#include <gtest/gtest.h>

#include <cerrno>
#include <map>
#include <set>

#include "cpp/host_copier.h"
#include "tests/cpp/layer_files.h"

namespace pccheck::test {
namespace {

using enum Checkpoint::State;
using Names = std::vector<std::string>;

std::string path_of(uint64_t step, const std::string& file) {
  return RunOnDisk::path(step) + "/" + file;
}

class Incremental : public testing::Test {
 protected:
  Ticket save_step(uint64_t step, const State& state) {
    const Ticket ticket = save(hands, disk, step, state);
    expect_saved(disk, ticket, state);
    return ticket;
  }

  bool is_shared(const std::string& file, uint64_t one, uint64_t other) const {
    return disk.identity(path_of(one, file)) == disk.identity(path_of(other, file));
  }

  // The files of a checkpoint's own directory that were written to since operation `since`.
  Names written(uint64_t step, size_t since) const {
    std::set<std::string> found;
    const std::vector<Operation> log = disk.log();
    const std::string directory = RunOnDisk::path(step) + ".partial/";
    for (size_t i = since; i < log.size(); ++i)
      if ((log[i].call == "pwrite" || log[i].call == "allocate") &&
          log[i].path.starts_with(directory) && log[i].path.find("s.bin") == std::string::npos &&
          !log[i].path.ends_with(kManifestName))
        found.insert(log[i].path.substr(directory.size()));
    return {found.begin(), found.end()};
  }

  Names written_by(uint64_t step, const State& state) {
    const size_t since = disk.operations();
    save_step(step, state);
    return written(step, since);
  }

  const State first = layer_state({5000, 2000, 40});
  HostCopier copier;
  RunOnDisk disk;
  HandRun hands{4, kBlockBytes, copier, 1};
};

TEST_F(Incremental, TheFirstCheckpointWritesEverythingAndTheSecondOnlyWhatHasChanged) {
  EXPECT_EQ(written_by(1, first), (Names{model_file(0), model_file(1), model_file(2), kIndexName,
                                         optimizer_file(0), optimizer_file(2)}));
  EXPECT_EQ(written_by(2, first), Names{});
  const State second = changed(first, 1);
  EXPECT_EQ(written_by(3, second), Names{model_file(1)});
  EXPECT_EQ(written_by(4, second), Names{});
  for (const std::string& file : {model_file(0), model_file(2), optimizer_file(2)})
    EXPECT_TRUE(is_shared(file, 1, 4)) << file;
  EXPECT_TRUE(is_shared(model_file(1), 3, 4));
  EXPECT_FALSE(is_shared(model_file(1), 2, 3));
  EXPECT_EQ(disk.links(path_of(1, model_file(0))), 4u);
  EXPECT_EQ(hands.stager.links_refused(), 0u);
}

TEST_F(Incremental, OneChangedBitAnywhereIsWritten) {
  save_step(1, first);
  const size_t bits = 8 * first.tensors[0][0].size();
  uint64_t step = 1;
  for (const size_t bit : {size_t{0}, 8 * kBlockBytes, bits / 2, bits - 1}) {
    ++step;
    EXPECT_EQ(written_by(step, changed(first, 0, bit)), Names{model_file(0)}) << "bit " << bit;
    ++step;
    EXPECT_EQ(written_by(step, first), Names{model_file(0)}) << "and back";
  }
}

TEST_F(Incremental, AHeaderOrAnIndexThatDiffersIsWrittenThoughTheTensorsAreTheSame) {
  save_step(1, first);
  std::vector<FileSpec> files = layer_files({5000, 2000, 40}, "[]");
  files[0].metadata = {{"format", "np"}};
  const State second{layer_layout(files, 3), first.tensors};
  ASSERT_EQ(second.layout->files()[0].size_bytes, first.layout->files()[0].size_bytes);
  EXPECT_EQ(written_by(2, second), (Names{model_file(0), kIndexName}));
}

TEST_F(Incremental, FilesOfAnotherSizeOrNameAreWritten) {
  save_step(1, first);
  EXPECT_EQ(written_by(2, layer_state({5000, 2001, 40})),
            (Names{model_file(1), model_file(2), optimizer_file(2)}));
  Random random(1);
  std::vector<FileSpec> files = layer_files({5000, 2001, 40});
  for (FileSpec& file : files)
    if (file.name != kIndexName) file.name = "x" + file.name;
  EXPECT_EQ(written_by(3, fill(layer_layout(files, 3), random)).size(), 5u);
}

TEST_F(Incremental, NothingOfAnUnchangedLayerIsStagedOrOpened) {
  save_step(1, first);
  const size_t since = disk.operations();
  const Ticket ticket = begin_whole(hands, disk, 2, first);
  while (hands.stager.run_one()) EXPECT_EQ(hands.pool.free_slots(), hands.pool.slot_count());
  EXPECT_TRUE(ticket->wait_all_staged(at_once()));
  EXPECT_EQ(hands.full.waiting(), 0u);
  hands.run();
  expect_saved(disk, ticket, first);
  const std::vector<Operation> log = disk.log();
  for (size_t i = since; i < log.size(); ++i)
    if (log[i].path.ends_with(".safetensors") || log[i].path.ends_with(kIndexName)) {
      EXPECT_EQ(log[i].call, "link_file") << log[i].path;
    }
}

TEST_F(Incremental, WhatIsCountedTellsWrittenFromLinked) {
  save_step(1, first);
  save_step(2, changed(first, 1));
  const CommitCounts counts = hands.committer.counts();
  const uint64_t all = first.layout->total_bytes();
  uint64_t of_changed = 0;
  for (const PayloadFile& file : first.layout->files())
    if (file.name == model_file(1)) of_changed = file.size_bytes;
  EXPECT_EQ(counts.bytes, all + of_changed);
  EXPECT_EQ(counts.bytes_linked, all - of_changed);
}

TEST_F(Incremental, TheSealTellsEveryFilesDigestWhetherItWasWrittenOrLinked) {
  save_step(1, first);
  const State second = changed(first, 2);
  save_step(2, second);
  const Checksums sums = decode_checksums(disk.contents(path_of(2, kChecksumsName)));
  ASSERT_EQ(sums.files.size(), second.layout->files().size());
  for (size_t f = 0; f < sums.files.size(); ++f)
    EXPECT_EQ(sums.files[f].digest, digest(second.file(f))) << sums.files[f].name;
}

TEST_F(Incremental, LayersInOneFileHaveNoDigestsAndAreWrittenWhole) {
  const State plain = simple_state({2000, 100});
  for (uint64_t step = 1; step <= 2; ++step) {
    EXPECT_EQ(written_by(step, plain), Names{"model.safetensors"});
    const Bytes seal = disk.contents(path_of(step, kChecksumsName));
    EXPECT_FALSE(decode_checksums(seal).files[0].digest);
    EXPECT_EQ(seal[8], std::byte{1}) << "the format's first version";
  }
  EXPECT_EQ(hands.book->newest(), nullptr);
}

TEST_F(Incremental, AFailedCheckpointIsNoBase) {
  save_step(1, first);
  const State second = changed(first, 0);
  const Ticket lost = begin_whole(hands, disk, 2, second);
  while (hands.stager.run_one()) hands.writers.run_one();
  lost->fail(error_saying("no"));
  hands.run();
  ASSERT_EQ(lost->state(), failed);
  ASSERT_FALSE(disk.exists(RunOnDisk::path(2)));
  EXPECT_EQ(written_by(3, second), Names{model_file(0)});
  EXPECT_EQ(disk.links(path_of(1, model_file(1))), 2u) << "of the failed one's nothing is left";
  expect_checkpoint(disk, RunOnDisk::path(1), identity_of(1), first, kManifest);
}

TEST_F(Incremental, ACheckpointWhosePublicationFailedIsNoBaseEither) {
  save_step(1, first);
  disk.before = [](const Operation& operation) {
    if (operation.call == "rename") fail_operation(operation, EIO);
  };
  const Ticket lost = save(hands, disk, 2, changed(first, 0));
  disk.before = {};
  ASSERT_EQ(lost->state(), failed);
  EXPECT_EQ(written_by(3, first), Names{}) << "all of it is in step 1";
  EXPECT_EQ(hands.stager.links_refused(), 0u);
}

TEST_F(Incremental, ACheckpointInFlightIsNoBaseYet) {
  save_step(1, first);
  const State second = changed(first, 0);
  const Ticket older = begin_whole(hands, disk, 2, second);
  const Ticket newer = begin_whole(hands, disk, 3, second);
  size_t since = disk.operations();
  while (hands.stager.run_one()) hands.writers.run_one();
  ASSERT_TRUE(newer->wait_all_staged(at_once()));
  EXPECT_EQ(written(3, since), Names{model_file(0)}) << "what step 2 has is not committed";
  hands.run();
  expect_saved(disk, older, second);
  expect_saved(disk, newer, second);
  EXPECT_TRUE(is_shared(model_file(1), 1, 3));
  EXPECT_FALSE(is_shared(model_file(0), 2, 3));
  since = disk.operations();
  save_step(4, second);
  EXPECT_TRUE(is_shared(model_file(0), 3, 4)) << "the newest that has it";
}

TEST_F(Incremental, WhoHasHeardOfTheCommitFindsItInTheBook) {
  for (uint64_t step = 1; step <= 3; ++step) {
    begin_whole(hands, disk, step, first, [&](Checkpoint::State) {
      ASSERT_TRUE(hands.book->newest());
      EXPECT_EQ(hands.book->newest()->checkpoint, name_of_step(step));
    });
    hands.run();
  }
}

TEST_F(Incremental, LinksAreDurableBeforeTheCheckpointIsVisible) {
  save_step(1, first);
  int published = 0;
  disk.before = [&](const Operation& operation) {
    if (operation.call != "rename" || operation.to != RunOnDisk::path(2)) return;
    ++published;
    EXPECT_EQ(disk.unsynced(operation.path), Names{});
  };
  save_step(2, first);
  EXPECT_EQ(published, 1);
}

TEST_F(Incremental, AChangeBetweenHandOverAndGateFailsACheckpointOfLinksToo) {
  struct Fixed final : SourceWatch {
    std::string changed() const override { return "tensor 'w' was changed"; }
  };
  save_step(1, first);
  const Fixed watch;
  const Ticket ticket = hands.begin(2, first.layout, disk.target(2));
  for (size_t layer = 0; layer < 3; ++layer) {
    HandOver hand_over = first.hand_over(layer);
    if (layer == 1) hand_over.watch = &watch;
    ticket->hand_over(layer, std::move(hand_over));
  }
  hands.run();
  ASSERT_TRUE(ticket->wait_staged(1, at_once()));
  ticket->open_gate(1);
  EXPECT_EQ(text_of(ticket->error()), "tensor 'w' was changed");
  ticket->seal(kManifest, std::nullopt);
  hands.run();
  EXPECT_EQ(ticket->state(), failed);
  expect_checkpoint(disk, RunOnDisk::path(1), identity_of(1), first, kManifest);
}

TEST_F(Incremental, WhatIsAddedAtTheSealIsWrittenEachTime) {
  const State addition = simple_state({500});
  for (uint64_t step = 1; step <= 2; ++step) {
    const size_t since = disk.operations();
    const Ticket ticket = hands.begin(step, first.layout, disk.target(step));
    hand_over_all(*ticket, first);
    ticket->seal(kManifest, Checkpoint::Addition{addition.layout, addition.hand_over(0)});
    hands.run();
    ASSERT_EQ(ticket->state(), committed) << text_of(ticket->error());
    EXPECT_EQ(written(step, since).size(), step == 1 ? 7u : 1u);
    EXPECT_EQ(disk.contents(path_of(step, "model.safetensors")), addition.file(0));
  }
}

TEST_F(Incremental, WhileAnUpdateRunsTheRestIsNotEvenComparedOnceABlockIsFull) {
  save_step(1, first);
  const State second = changed(first, 0);
  const Ticket ticket = hands.begin(2, second.layout, disk.target(2));
  ticket->update_began();
  ticket->hand_over(0, second.hand_over(0));
  ticket->hand_over(1, second.hand_over(1));
  hands.run();
  EXPECT_TRUE(ticket->leaves_time_to_update());
  EXPECT_FALSE(ticket->wait_staged(1, at_once()));
  ticket->hand_over(2, second.hand_over(2));
  ticket->seal(kManifest, std::nullopt);
  hands.run();
  expect_saved(disk, ticket, second);
}

TEST_F(Incremental, OneSlotMoreThanABlockIsEnough) {
  EXPECT_EQ(first.layout->open_blocks(), 1u);
  HandRun narrow{2, kBlockBytes, copier, 1};
  expect_saved(disk, save(narrow, disk, 1, first), first);
  const State second = changed(first, 1);
  expect_saved(disk, save(narrow, disk, 2, second), second);
}

// -- bases that go, and links that cannot be ------------------------------------------------------

TEST_F(Incremental, ABaseThatWasSetAsideIsNotLinkedTo) {
  save_step(1, first);
  disk.run->set_aside_after(0);
  EXPECT_EQ(written_by(2, first).size(), 6u);
  EXPECT_EQ(hands.stager.links_refused(), 6u);
  expect_checkpoint(disk, RunOnDisk::path(1) + ".stale", identity_of(1), first, kManifest);
}

TEST_F(Incremental, ABaseThatWasRemovedOrReplacedIsNotLinkedTo) {
  save_step(1, first);
  {
    const auto root = disk.root();
    root->rename(name_of_step(1), "elsewhere");
  }
  EXPECT_EQ(written_by(2, first).size(), 6u);
  // Another checkpoint under the name that the book has: its own seal tells what it holds.
  save_step(3, changed(first, 0));
  {
    const auto root = disk.root();
    root->rename(name_of_step(3), "third");
    root->rename(name_of_step(2), name_of_step(3));
  }
  EXPECT_EQ(written_by(4, changed(first, 0)).size(), 6u) << "it seals another step";
}

TEST_F(Incremental, ADamagedSealOfTheBaseCostsTheLinksAndNothingElse) {
  save_step(1, first);
  Bytes seal = disk.contents(path_of(1, kChecksumsName));
  flip_bit(seal, 1000);
  disk.put(path_of(1, kChecksumsName), seal);
  EXPECT_EQ(written_by(2, first).size(), 6u);
  EXPECT_EQ(written_by(3, first), Names{});
}

TEST_F(Incremental, AFileOfTheBaseThatIsGoneOrCutShortIsNotLinkedTo) {
  save_step(1, first);
  disk.put(path_of(1, model_file(0)), Bytes(10));
  disk.root()->open_directory(name_of_step(1))->remove_file(model_file(1));
  EXPECT_EQ(written_by(2, first), (Names{model_file(0), model_file(1)}));
  EXPECT_EQ(hands.stager.links_refused(), 2u);
}

TEST_F(Incremental, ABaseInBlocksOfAnotherSizeIsNotLinkedTo) {
  save_step(1, first);
  HandRun wider{4, 2 * kBlockBytes, copier, 1};
  auto base = std::make_shared<Base>(*hands.book->newest());
  for (auto& [name, file] : base->files) file.digest.beginning.reset();  // as its seal tells it
  wider.book->enter(base);
  const State same{
      Layout::make(layer_files({5000, 2000, 40}),
                   {.block_bytes = 2 * kBlockBytes, .layer_count = 3, .files_of_layers = true}),
      first.tensors};
  expect_saved(disk, save(wider, disk, 2, same), same);
  EXPECT_EQ(wider.stager.links_refused(), 6u);
}

TEST_F(Incremental, WhereNoMoreLinksCanBeMadeTheFileIsWrittenAndCounted) {
  disk.most_links = 3;
  for (uint64_t step = 1; step <= 9; ++step) save_step(step, first);
  EXPECT_EQ(hands.stager.links_refused(), 2 * 6u) << "in steps 4 and 7";
  EXPECT_TRUE(is_shared(model_file(0), 1, 3));
  EXPECT_FALSE(is_shared(model_file(0), 3, 4));
  EXPECT_TRUE(is_shared(model_file(0), 4, 6));
}

TEST_F(Incremental, ALinkThatFailsFailsTheCheckpointWithItsReason) {
  save_step(1, first);
  disk.before = [](const Operation& operation) {
    if (operation.call == "link_file") fail_operation(operation, EIO);
  };
  const Ticket ticket = save(hands, disk, 2, first);
  disk.before = {};
  EXPECT_EQ(ticket->state(), failed);
  EXPECT_NE(text_of(ticket->error()).find("link_file"), std::string::npos);
  EXPECT_EQ(disk.directories(), Names{name_of_step(1)});
  EXPECT_EQ(written_by(3, first), Names{});
}

// -- retirement and recycling ---------------------------------------------------------------------

TEST(IncrementalRecycling, AnOldLinkToTheVeryFileIsKeptAndTheDirectoryNeedsNoSync) {
  State state = layer_state({5000, 2000, 40});
  HostCopier copier;
  RunOnDisk disk({.keep_last = 1, .max_spares = 1});
  HandRun hands{4, kBlockBytes, copier, 1};
  for (uint64_t step = 1; step <= 4; ++step) {
    state = changed(state, 0, step);
    expect_saved(disk, save(hands, disk, step, state), state);
  }
  size_t since = disk.operations();
  state = changed(state, 0, 5);
  expect_saved(disk, save(hands, disk, 5, state), state);
  std::map<std::string, size_t> calls;
  const std::vector<Operation> log = disk.log();
  for (size_t i = since; i < log.size(); ++i)
    if (log[i].path.find(name_of_step(5) + ".partial") != std::string::npos) ++calls[log[i].call];
  EXPECT_EQ(calls["create_file"], 0u);
  EXPECT_EQ(calls["remove_file"], 0u);
  EXPECT_EQ(calls["sync"], 0u);
  EXPECT_EQ(calls["reuse_file"], 3u) << "the changed one, the manifest and the seal";
  EXPECT_EQ(disk.links(path_of(5, model_file(1))), 2u) << "this one's and the spare's";
}

TEST(IncrementalRecycling, AFileThatIsSharedIsNeverOverwrittenInPlace) {
  const State state = layer_state({5000, 2000, 40});
  HostCopier copier;
  RunOnDisk disk({.keep_last = 1, .max_spares = 1});
  HandRun hands{4, kBlockBytes, copier, 1};
  disk.run->keep({1});
  expect_saved(disk, save(hands, disk, 1, state), state);
  State now = state;
  for (uint64_t step = 2; step <= 8; ++step) {
    if (step >= 5) now = changed(now, step % 3, step);
    expect_saved(disk, save(hands, disk, step, now), now);
    expect_checkpoint(disk, RunOnDisk::path(1), identity_of(1), state, kManifest);
  }
  disk.run->remove_spares();
  expect_checkpoint(disk, RunOnDisk::path(1), identity_of(1), state, kManifest);
}

TEST(IncrementalRecycling, AnotherFileUnderTheNameOfALinkMakesWayForIt) {
  // Layer 0 changes at every step, then stays: the spare has an older version of its own.
  State state = layer_state({3000, 100});
  HostCopier copier;
  RunOnDisk disk({.keep_last = 1, .max_spares = 1});
  HandRun hands{4, kBlockBytes, copier, 1};
  for (uint64_t step = 1; step <= 4; ++step) {
    state = changed(state, 0, step);
    expect_saved(disk, save(hands, disk, step, state), state);
  }
  disk.before = [&](const Operation& operation) {
    if (operation.call == "rename" && !operation.to.ends_with(".partial")) {
      EXPECT_EQ(disk.unsynced(operation.path), Names{}) << operation.to;
    }
  };
  for (uint64_t step = 5; step <= 7; ++step) {
    const void* const before = disk.identity(path_of(step - 1, model_file(0)));
    expect_saved(disk, save(hands, disk, step, state), state);
    EXPECT_EQ(disk.identity(path_of(step, model_file(0))), before);
  }
}

TEST(IncrementalRecycling, ABaseRetiredWhileOthersAreInFlightTakesNothingAlong) {
  const State state = layer_state({3000, 100, 700});
  HostCopier copier;
  RunOnDisk disk({.keep_last = 1, .max_spares = 2});
  HandRun hands{4, kBlockBytes, copier, 1};
  expect_saved(disk, save(hands, disk, 1, state), state);
  const Ticket second = begin_whole(hands, disk, 2, state);
  const Ticket third = hands.begin(3, state.layout, disk.target(3));
  third->hand_over(0, state.hand_over(0));
  while (hands.stager.run_one()) {
  }
  ASSERT_TRUE(third->wait_staged(0, at_once()));  // linked to step 1, which goes now
  hands.run();
  ASSERT_EQ(second->state(), committed);
  ASSERT_FALSE(disk.exists(RunOnDisk::path(1)));
  third->hand_over(1, state.hand_over(1));
  third->hand_over(2, state.hand_over(2));
  third->seal(kManifest, std::nullopt);
  hands.run();
  expect_saved(disk, third, state);
  EXPECT_EQ(hands.stager.links_refused(), 0u);
  EXPECT_EQ(disk.identity(path_of(3, model_file(2))),
            disk.identity(RunOnDisk::path(2) + ".partial/" + model_file(2)));
}

TEST(IncrementalRecycling, ABaseRetiredBetweenLookAndLinkIsReplacedByTheNewerOne) {
  const State state = layer_state({3000, 100});
  struct Gated final : Copier {
    bool sums_while_copying() const override { return false; }
    uint64_t submit(std::span<const Piece> pieces, ReadyMark*) override {
      for (const Piece& piece : pieces) std::copy_n(piece.from, piece.bytes, piece.to);
      return ++submissions;
    }
    bool done(uint64_t) override { return open; }
    uint64_t submissions = 0;
    bool open = true;
  } copier;
  RunOnDisk disk({.keep_last = 1, .max_spares = 0});
  HandRun hands{20, kBlockBytes, copier, 1};
  expect_saved(disk, save(hands, disk, 1, state), state);
  const Ticket second = begin_whole(hands, disk, 2, state);
  while (!second->wait_all_staged(at_once())) hands.stager.run_one();
  copier.open = false;
  const Ticket third = begin_whole(hands, disk, 3, state);
  while (hands.stager.run_one()) {
  }
  ASSERT_TRUE(hands.stager.awaits_outside()) << "compared with step 1";
  while (hands.writers.run_one() || hands.committer.run_one()) {
  }
  ASSERT_EQ(disk.directories(), (Names{name_of_step(2), name_of_step(3) + ".partial"}));
  copier.open = true;
  hands.run();
  expect_saved(disk, third, state);
  EXPECT_EQ(hands.stager.links_refused(), 0u);
  EXPECT_EQ(hands.committer.counts().bytes, state.layout->total_bytes()) << "written once";
}

TEST(IncrementalRecycling, ARetiredBaseAndAnotherThatBearsItsNameAreNotTakenForIt) {
  const State state = layer_state({3000, 100});
  HostCopier copier;
  RunOnDisk disk({.keep_last = 1, .max_spares = 1});
  HandRun hands{4, kBlockBytes, copier, 1};
  const auto into = disk.run->prepare("other").directory;
  const auto links_to_first = [&](const State& holding) {
    return disk.run
        ->link(name_of_step(1), state.layout->files()[0], kBlockBytes, digest(holding.file(0)),
               *into)
        .has_value();
  };
  expect_saved(disk, save(hands, disk, 1, state), state);
  expect_saved(disk, save(hands, disk, 2, state), state);  // by links to step 1, now a spare
  EXPECT_FALSE(links_to_first(state));
  // Its directory comes under its name again, with other bytes in files that have the same names.
  disk.run->set_aside_after(0);
  const void* const directory = disk.identity(RunOnDisk::path(1) + ".partial");
  const State again = layer_state({3000, 100}, 2);
  expect_saved(disk, save(hands, disk, 1, again), again);
  ASSERT_EQ(disk.identity(RunOnDisk::path(1)), directory);
  EXPECT_FALSE(links_to_first(state));
  EXPECT_TRUE(links_to_first(again));
}

TEST(IncrementalRecycling, ASealIsReadAnewWhenItsNameIsGivenAgain) {
  // As above, and nobody has asked for another checkpoint's meanwhile.
  const State state = layer_state({3000, 100});
  HostCopier copier;
  RunOnDisk disk({.keep_last = 1, .max_spares = 1});
  HandRun hands{4, kBlockBytes, copier, 1};
  const auto into = disk.run->prepare("other").directory;
  const PayloadFile& file = state.layout->files()[0];
  expect_saved(disk, save(hands, disk, 1, state), state);
  ASSERT_TRUE(disk.run->link(name_of_step(1), file, kBlockBytes, digest(state.file(0)), *into));
  expect_saved(disk, save(hands, disk, 2, simple_state({10})), simple_state({10}));
  disk.run->set_aside_after(0);
  hands.book->enter(nullptr);
  const void* const directory = disk.identity(RunOnDisk::path(1) + ".partial");
  const State again = layer_state({3000, 100}, 2);
  expect_saved(disk, save(hands, disk, 1, again), again);
  ASSERT_EQ(disk.identity(RunOnDisk::path(1)), directory) << "the very directory, recycled";
  EXPECT_FALSE(disk.run->link(name_of_step(1), file, kBlockBytes, digest(state.file(0)), *into));
  EXPECT_TRUE(disk.run->link(name_of_step(1), file, kBlockBytes, digest(again.file(0)), *into));
}

TEST(IncrementalRecycling, WhatACrashLeftOfAHalfMadeCheckpointIsTakenOver) {
  const State state = layer_state({3000, 100});
  HostCopier copier;
  RunOnDisk disk({.keep_last = 0, .max_spares = 1});
  {
    HandRun hands{4, kBlockBytes, copier, 1};
    expect_saved(disk, save(hands, disk, 1, state), state);
    const State next = changed(state, 1);
    const Ticket half = hands.begin(2, next.layout, disk.target(2));
    hand_over_all(*half, next);
    hands.run();  // not sealed: as a process that dies leaves it
  }
  disk.reopen();
  ASSERT_EQ(disk.links(RunOnDisk::path(2) + ".partial/" + model_file(0)), 2u);
  HandRun hands{4, kBlockBytes, copier, 1};
  const State other = changed(state, 0);
  expect_saved(disk, save(hands, disk, 2, other), other);
  expect_saved(disk, save(hands, disk, 3, other), other);
  expect_checkpoint(disk, RunOnDisk::path(1), identity_of(1), state, kManifest);
  EXPECT_EQ(disk.directories(), (Names{name_of_step(1), name_of_step(2), name_of_step(3)}));
}

}  // namespace
}  // namespace pccheck::test
