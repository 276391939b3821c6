// The directory of one training run, held by its one writer: which checkpoints are in it, which
// have been retired, what a crash left behind.
//
//   .lock                    flock'ed for as long as this object lives
//   step-00000100/           committed
//   step-00000110.partial/   in flight, left by a crash, or retired and waiting to be recycled
//   step-00000120.stale/     committed once, then left aside when training went on from before it
//
// Safe on any thread.
#pragma once

#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "cpp/checkpoint.h"
#include "cpp/file.h"

namespace pccheck {

inline constexpr const char* kLockName = ".lock";
inline constexpr const char* kPartialSuffix = ".partial";
inline constexpr const char* kStaleSuffix = ".stale";

// "step-00000100" -> 100; nothing for other names.
std::optional<uint64_t> step_of_name(const std::string& name);
std::string name_of_step(uint64_t step);

class RunDirectory {
 public:
  struct Options {
    size_t keep_last;         // committed steps kept; 0 keeps all
    size_t max_spares;        // retired directories kept for recycling
    uint64_t keep_every = 0;  // steps that are multiples of this are never retired; 0: none
  };

  // Takes over a locked directory: makes its entries durable (a rename seen after a crash may not
  // be) and reclaims what a crash left behind.
  RunDirectory(std::unique_ptr<Directory> directory, std::unique_ptr<File> lock, Options options);

  const std::string& path() const { return directory_->path(); }

  // A directory `<name>.partial`, exclusively locked: a recycled one if there is one. Throws
  // std::system_error(EEXIST) when a checkpoint of that name exists or is under way.
  struct Partial {
    std::unique_ptr<Directory> directory;
    bool recycled;
  };
  Partial prepare(const std::string& name);

  // The partial directory is complete and durable: gives it its name, and makes that durable.
  // Throws OutcomeUnknown when the last step failed.
  void publish(const std::string& name, Directory& partial);

  // Makes `plan`'s file, in a directory that prepare() gave, the very file that the committed
  // checkpoint `from` has. Nothing where that cannot be: `from` is none, or none any more, or has
  // no file of this name, size and digest, in blocks of this size, by its own seal; or where there
  // is no linking to it.
  struct Linked {
    std::vector<uint32_t> block_sums;
    bool made;  // false: the file was that one already
  };
  std::optional<Linked> link(const std::string& from, const PayloadFile& plan, size_t block_bytes,
                             const Digest& digest, Directory& into);

  // Removes what prepare() made; does nothing once it is published.
  void discard(const std::string& name);

  // These steps are not retired, whatever their age, until the next call names others. Never waits
  // for the disk.
  void keep(std::set<uint64_t> steps);

  // Retires steps beyond keep_last, oldest first; those a reader has locked wait for the next call.
  // Throws, when it is done with the others, what kept it from retiring one.
  void retire();

  // Training goes on from `step`: checkpoints of later steps are left aside as `.stale`. Returns
  // their names.
  std::vector<std::string> set_aside_after(uint64_t step);

  // Removes what waits to be recycled; nothing is left but checkpoints. Throws, at the end, what
  // kept it from removing one.
  void remove_spares();

 private:
  struct Spare {
    std::string name;
    std::unique_ptr<Directory> directory;  // exclusively locked
  };

  // A committed checkpoint that is linked to, and what its seal says.
  struct Sealed {
    std::string name;
    std::unique_ptr<Directory> directory;
    uint64_t block_bytes;
    std::map<std::string, FileSums> files;
  };

  const Sealed* find_sealed(const std::string& name);
  void reclaim(const std::string& name);
  bool is_kept(uint64_t step) const;
  std::unique_ptr<Directory> retire_one(const std::string& name);
  void set_aside(const std::string& name);
  std::optional<uint64_t> sealed_step(const std::string& name);

  const std::unique_ptr<Directory> directory_;
  const std::unique_ptr<File> lock_;
  const Options options_;

  // Guards what follows and the directory's entries: renames happen under it, since the writers
  // prepare while the committer retires.
  std::mutex mutex_;
  std::set<uint64_t> committed_;
  std::set<std::string> under_way_;  // prepared, neither published nor discarded yet
  std::vector<Spare> spares_;
  std::optional<Sealed> linked_to_;  // the one last asked for

  mutable std::mutex kept_mutex_;  // guards kept_ alone, so that keep() waits for no I/O
  std::set<uint64_t> kept_;        // by keep()
};

// Opens and locks a run's directory, making it if need be. While another process holds it, waits up
// to `timeout`, calling `interrupted` (which may throw) now and then; then throws
// std::runtime_error.
std::unique_ptr<RunDirectory> open_run_directory(const std::string& path,
                                                 RunDirectory::Options options,
                                                 std::chrono::duration<double> timeout,
                                                 const std::function<void()>& interrupted);

// A checkpoint that becomes `<run>/<name>/`.
std::unique_ptr<Target> make_directory_target(std::shared_ptr<RunDirectory> run, std::string name);

}  // namespace pccheck
