// One checkpoint's life: staging -> persisting -> committed | failed. The ticket a save returns.
//
// The caller hands layers over, seals, waits; the stager takes layers in layout order; the writers
// report blocks; the committer publishes. All of them meet here, under one mutex. The first error
// latches: from then on nothing is written, every layer counts as staged (there is nothing left to
// protect) and the checkpoint ends as failed once no I/O of it is under way.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cpp/book.h"
#include "cpp/copier.h"
#include "cpp/file.h"
#include "cpp/format.h"
#include "cpp/layout.h"

namespace pccheck {

using Clock = std::chrono::steady_clock;

// One tensor's bytes, contiguous, in the copier's memory; valid until its layer has been staged.
struct Source {
  const std::byte* data;
  uint64_t bytes;
};

// The tripwire over a layer's tensors: tells whether one of them was changed between hand-over and
// the opening of the gate. Called on any thread, and under the checkpoint's lock.
class SourceWatch {
 public:
  virtual ~SourceWatch() = default;
  // What was changed, for a person to read; empty if nothing was.
  virtual std::string changed() const = 0;
};

struct HandOver {
  std::vector<Source> sources;         // in the order of the layer's tensors
  std::unique_ptr<ReadyMark> ready;    // may be null
  const SourceWatch* watch = nullptr;  // may be null; valid until the gate has opened or the end
};

// The payload of a checkpoint as the committer sees it: written and synced.
struct PersistedFile {
  const Layout* layout;
  const PayloadFile* plan;
  File* file;  // null for one that is closed already
  std::vector<uint32_t> block_sums;
  std::optional<Digest> digest = std::nullopt;  // where it is known
};

// Where a checkpoint goes: a directory of a run, or one file. Called by the writers (open), the
// stager (link) and the committer (the others); one call at a time.
class Target {
 public:
  virtual ~Target() = default;
  // A file of the checkpoint, of its full size, ready to be written.
  virtual std::unique_ptr<File> open(const PayloadFile& plan) = 0;
  // Instead of opening a file to be written: makes it the very file that the committed checkpoint
  // `from` has under that name, which is of the same size and this digest. Returns the checksums of
  // its blocks; nothing where that cannot be.
  virtual std::optional<std::vector<uint32_t>> link(const Layout& /*layout*/,
                                                    const PayloadFile& /*plan*/,
                                                    const std::string& /*from*/,
                                                    const Digest& /*digest*/) {
    return std::nullopt;
  }
  // Whether publish() still writes to the files. Otherwise each is closed once it is durable: there
  // may be more of them than a process may have open.
  virtual bool publishes_open_files() const { return false; }
  // The manifest's file, of its full size, ready to be written; null where it has none of its own.
  virtual std::unique_ptr<File> open_manifest(size_t bytes) = 0;
  // With all files durable: makes the checkpoint complete, then visible. Returns only when both are
  // certain.
  virtual void publish(const Identity& identity, std::vector<PersistedFile>& files,
                       std::span<const std::byte> manifest) = 0;
  // After a failure, once no I/O is under way: leaves nothing behind.
  virtual void discard() = 0;
  // After publish() and the acknowledgement: retires what this checkpoint replaces.
  virtual void retire() = 0;
};

// A publication whose result cannot be known (a sync failed after the name appeared): nothing may
// be written to this place any more.
class OutcomeUnknown : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Checkpoint : public std::enable_shared_from_this<Checkpoint> {
 public:
  enum class State { in_flight, committed, failed };

  // Called, without locks held, after a change that gives a worker something to do.
  struct Bells {
    std::function<void()> stager;     // something was handed over, or will never be
    std::function<void()> committer;  // ready to be published or discarded, or ended
  };

  // `target` is null where another process persists: then neither the writers' nor the committer's
  // part is called here. Where another process stages, the layout has no layers. What is known of
  // the files of layers is entered in the book when the checkpoint is committed.
  Checkpoint(Identity identity, std::string name, std::shared_ptr<const Layout> layout,
             std::unique_ptr<Target> target, Bells bells, std::shared_ptr<Book> book = nullptr);

  const Identity& identity() const { return identity_; }
  const std::string& name() const { return name_; }

  // -- the caller --------------------------------------------------------------------------------

  // Layers may come in any order. Throws std::invalid_argument when the sources do not fit the
  // plan; does nothing on a failed checkpoint. Never waits.
  void hand_over(size_t layer, HandOver hand_over);

  // What was not known at the beginning: files of their own, as one layer more.
  struct Addition {
    std::shared_ptr<const Layout> layout;  // of one layer
    HandOver hand_over;
  };

  // Throws std::invalid_argument when the addition does not fit its plan or this checkpoint, or
  // comes after the seal; does nothing on a failed checkpoint. Never waits. Returns the layer's
  // number.
  size_t add(Addition addition);

  // Nothing more will come. Throws std::logic_error when a layer was never handed over,
  // std::invalid_argument when the addition does not fit its plan or this checkpoint.
  void seal(std::vector<std::byte> manifest, std::optional<Addition> addition);

  // While the optimizer's update runs, which needs the processor and its memory, a stager that
  // needs them too makes little use of them: see Stager. The update ends with the seal at the
  // latest.
  void update_began();
  void update_ended();

  bool awaits_seal() const;  // neither sealed nor failed

  // Any thread. The first error counts; a checkpoint that has ended stays as it is, and so does one
  // that is being published: only the publication itself can fail it then.
  void fail(std::exception_ptr error);

  // The gate: `layer` is staged, or the checkpoint failed. False when the time has passed first.
  // Whoever has to wait makes the checkpoint one to be staged in a hurry; the engine must not end
  // meanwhile.
  bool wait_staged(size_t layer, Clock::time_point until);
  bool wait_all_staged(Clock::time_point until);
  // Opens the gate behind a staged layer: the tripwire is read, then taken down. Throws nothing; a
  // change found fails the checkpoint.
  void open_gate(size_t layer);

  bool wait_finished(Clock::time_point until) const;
  State state() const;
  std::exception_ptr error() const;
  double durable_seconds() const;  // begin to commit, once published
  const std::shared_ptr<const Layout>& layout() const { return layout_; }
  uint64_t payload_bytes() const;
  uint64_t written_bytes() const;  // of the payload, so far
  uint64_t linked_bytes() const;   // of the payload: not written, but another checkpoint's too

  // -- the stager --------------------------------------------------------------------------------

  struct Work {
    const LayerPlan* plan;
    const Layout* layout;
    uint32_t first_file;  // of `layout`, among the checkpoint's files
    HandOver* hand_over;
  };
  // The next layer in layout order, if it was handed over.
  std::optional<Work> next_layer();
  bool in_a_hurry() const;
  void block_full();  // the first one, at least
  // While an update runs and a block of the checkpoint is full.
  bool leaves_time_to_update() const;
  void layer_staged();
  bool staging_ended() const;  // sealed and everything staged
  void stop_staging();         // after a failure: nothing of it is being copied any more

  // Instead of staging a file: makes it what the committed checkpoint `from` has, see Target::link.
  // False where that cannot be, or the checkpoint has failed. Throws what is to fail it.
  bool link(uint32_t file, const std::string& from, const FileDigest& digest);
  bool may_link(uint32_t file) const;  // nothing of it has been staged
  // What a file holds that has been staged.
  void digested(uint32_t file, const FileDigest& digest);

  // -- the writers -------------------------------------------------------------------------------

  void block_opened();  // counts I/O that may still come
  void block_gone();
  // Whoever writes a file's last block syncs it too, while other files are still being written.
  void write_block(uint32_t file, uint64_t block, std::span<const std::byte> bytes, uint32_t crc);

  // -- the committer -----------------------------------------------------------------------------

  bool manifest_is_due() const;  // sealed, and not written yet
  void persist_manifest();       // while the last of the payload is being written
  bool ready_to_publish() const;
  bool ready_to_discard() const;
  // Reads every tripwire for the last time; from here on fail() changes nothing. Throws what has
  // failed the checkpoint.
  void begin_publishing();
  void publish();  // everything but the acknowledgement
  void discard();
  void end(State state);  // the acknowledgement; takes only this object's lock
  void announce_end();    // whoever waits goes on
  void retire();

  // -- across processes --------------------------------------------------------------------------

  // Where another process stages: more files, whose blocks are about to come.
  void extend(std::shared_ptr<const Layout> layout);
  bool has_file(uint32_t file) const;
  bool has_block(uint32_t file, uint64_t block, uint64_t bytes) const;

  // Where another process persists: a file that it has linked, ...
  void linked_elsewhere(uint32_t file, const FileDigest& digest);
  // ... what it needs of a sealed checkpoint...
  std::vector<std::shared_ptr<const Layout>> additions() const;
  std::span<const std::byte> manifest() const;
  std::vector<std::pair<uint32_t, Digest>> digests() const;  // of files that were staged
  // ... and what came of it. A publication that was begun may fail by this alone.
  void block_written_elsewhere(uint64_t bytes);
  void published_elsewhere();
  void failed_elsewhere(std::exception_ptr error);

 private:
  struct FileState {
    const Layout* layout;
    uint32_t index_in_layout;
    uint64_t blocks_left;
    bool synced = false;
    std::vector<uint32_t> block_sums;
    bool linked = false;
    std::optional<FileDigest> digest = std::nullopt;
    bool closed = false;  // guarded by open_mutex_, like what follows
    std::unique_ptr<File> file = nullptr;
  };

  struct Added {
    std::shared_ptr<const Layout> layout;
    uint32_t first_file;
  };

  void add_files(const Layout& layout);
  void add_layout(std::shared_ptr<const Layout> layout);
  void require_fit(const Addition& addition) const;
  size_t layer_count() const;
  FileState& state_of(uint32_t file) const;
  File& file(uint32_t index);
  void mark_linked(FileState& file, const FileDigest& digest);
  std::shared_ptr<const Base> as_base() const;
  void require_fit(const std::string& what, const LayerPlan& plan, const HandOver& hand_over) const;
  template <typename Condition>
  bool wait_at_gate(Clock::time_point until, Condition staged);

  const Identity identity_;
  const std::string name_;
  const std::shared_ptr<const Layout> layout_;
  std::unique_ptr<Target> target_;  // null after retire() or discard()
  const Bells bells_;
  const std::shared_ptr<Book> book_;  // may be null
  const Clock::time_point begun_ = Clock::now();

  // Guards opening, closing and linking: I/O under it, so that only the first writer opens.
  std::mutex open_mutex_;

  mutable std::mutex mutex_;  // guards everything below
  mutable std::condition_variable progress_;
  std::vector<std::unique_ptr<FileState>> files_;
  std::deque<std::optional<HandOver>> handed_over_;  // add() adds; the others stay in place
  std::vector<Added> added_;
  std::vector<std::byte> manifest_;
  size_t layers_taken_ = 0;
  size_t layers_staged_ = 0;
  size_t blocks_alive_ = 0;
  uint64_t written_bytes_ = 0;
  uint64_t linked_bytes_ = 0;
  bool updating_ = false;
  bool has_full_block_ = false;
  bool hurry_ = false;
  bool sealed_ = false;
  bool manifest_is_durable_ = false;
  bool staging_stopped_ = false;
  bool publishing_ = false;  // and nothing was changed or had failed when that began
  std::exception_ptr error_;
  State state_ = State::in_flight;
  Clock::time_point published_{};
};

}  // namespace pccheck
