// The seam below which bytes reach storage. Everything the engine, the commit protocol and recovery
// do to a disk goes through these two classes, so that tests can put a simulated disk behind them.
//
// Every operation either does all it says or throws std::system_error naming the system call, the
// path and the offset; interrupted and short transfers are handled inside. Names are single path
// components, resolved against the directory's own descriptor, and symbolic links are never
// followed. Objects may be used from several threads at once unless a comment says otherwise.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace pccheck {

// Transfers whose address, length and offset are multiples of this may bypass the page cache.
inline constexpr size_t kDirectAlignment = 4096;

class File {
 public:
  virtual ~File() = default;

  virtual void pread(std::span<std::byte> into, uint64_t offset) = 0;
  virtual void pwrite(std::span<const std::byte> from, uint64_t offset) = 0;

  // Gives the file exactly this size with its blocks reserved, so that a full disk shows here.
  virtual void allocate(uint64_t size_bytes) = 0;

  // fdatasync. After an error the file's contents are unknown: never call it again, discard the
  // file.
  virtual void sync_data() = 0;

  virtual uint64_t size_bytes() = 0;

  // Whether aligned transfers really bypass the page cache (some file systems refuse).
  virtual bool is_direct() const = 0;
};

enum class EntryKind { file, directory, other };

struct Entry {
  std::string name;
  EntryKind kind;
};

enum class LockMode { shared, exclusive };

// What became of a wish for a hard link.
enum class Link { impossible, made, was_there };

class Directory {
 public:
  virtual ~Directory() = default;

  virtual const std::string& path() const = 0;
  virtual std::vector<Entry> list() = 0;  // without "." and ".."

  virtual std::unique_ptr<File> open_file(const std::string& name) = 0;    // to read
  virtual std::unique_ptr<File> create_file(const std::string& name) = 0;  // must not exist

  // Opens an existing file to be overwritten in place, or returns null where that could reach
  // somebody else: not a regular file, more than one link, locked, or open or mapped anywhere.
  virtual std::unique_ptr<File> reuse_file(const std::string& name) = 0;

  // Makes `name` lead to the very file that `from` has under that name; another file of that name
  // here is removed. Impossible, no error: `from` has no regular file of this size there, or the
  // file system makes no link to it (its links are used up, or it is on another file system, or
  // somebody else's).
  virtual Link link_file(const std::string& name, Directory& from, uint64_t size_bytes) = 0;

  virtual std::unique_ptr<Directory> open_directory(const std::string& name) = 0;
  virtual std::unique_ptr<Directory> create_directory(const std::string& name) = 0;

  virtual bool exists(const std::string& name) = 0;
  virtual void rename(const std::string& from, const std::string& to) = 0;   // never replaces
  virtual void replace(const std::string& from, const std::string& to) = 0;  // files only
  virtual void remove_file(const std::string& name) = 0;
  virtual void remove_directory(const std::string& name) = 0;  // must be empty
  virtual void sync() = 0;                                     // entries made durable

  // flock on the directory itself; false when somebody else holds a conflicting lock.
  virtual bool try_lock(LockMode mode) = 0;
  virtual void unlock() = 0;

  // Whether `name` still leads to this very directory `child`, opened earlier.
  virtual bool leads_to(const std::string& name, Directory& child) = 0;

  // An exclusive lock file, created if need be; null while somebody else holds it. The lock lasts
  // as long as the returned object.
  virtual std::unique_ptr<File> try_lock_file(const std::string& name) = 0;
};

// The real file system. `create` makes the directory, and its parents, if need be.
std::unique_ptr<Directory> open_posix_directory(const std::string& path, bool create);

// Reads a whole file; throws std::length_error naming it when it is larger than `limit_bytes`.
std::vector<std::byte> read_whole(Directory& directory, const std::string& name,
                                  uint64_t limit_bytes);

// Removes a directory and the files in it. What is not a file or a link is left, with the
// directory, and reported by the std::system_error of the removal that failed.
void remove_tree(Directory& parent, const std::string& name);

}  // namespace pccheck
