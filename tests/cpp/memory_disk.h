// A small file system in memory behind the File and Directory seam: it keeps what is written, tells
// what was never synced, and lets a test look at, delay or fail any operation. It does not simulate
// crashes.
//
// Safe on any thread, like the seam itself.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cpp/file.h"
#include "tests/cpp/bytes.h"

namespace pccheck::test {

struct Operation {
  std::string call;  // as the seam calls it: "pwrite", "sync_data", "rename" ...
  std::string path;
  std::string to = {};  // rename, replace, link_file: the new path
  uint64_t offset = 0;
  size_t bytes = 0;
};

class MemoryDisk {
 public:
  static constexpr const char* kRoot = "/disk";

  MemoryDisk();
  ~MemoryDisk();

  std::unique_ptr<Directory> root();

  // Called before every operation, on its thread, with nothing locked: may look around, wait, or
  // throw what the operation is to fail with. Set it while nothing else is running.
  std::function<void(const Operation&)> before;

  std::vector<Operation> log() const;  // every operation, failed ones included
  size_t operations() const;
  size_t open_handles() const;

  // The rest looks at the disk from outside; paths are absolute, nothing is logged or fails.
  bool exists(const std::string& path) const;
  Bytes contents(const std::string& path) const;
  std::vector<std::string> names(const std::string& path) const;  // sorted
  // The entries as of the directory's last sync.
  std::vector<std::string> durable_names(const std::string& path) const;
  // At and below `path`: files written and directories changed since their last sync.
  std::vector<std::string> unsynced(const std::string& path) const;
  // Tells whether two paths, or a path now and earlier, lead to the same file.
  const void* identity(const std::string& path) const;
  void put(const std::string& path, const Bytes& bytes);  // makes the directories on the way
  // From now on somebody else has the file open: it cannot be overwritten in place.
  void hold_open(const std::string& path);
  size_t links(const std::string& path) const;
  // How many links a file may have: as on disks whose limit is reached.
  size_t most_links = 1000;

 private:
  friend class MemoryFile;
  friend class MemoryDirectory;

  struct Node {
    bool is_directory = false;
    Bytes bytes = {};
    bool is_unsynced = false;
    bool held_open = false;
    size_t links = 1;
    std::map<std::string, std::shared_ptr<Node>> entries = {};
    std::map<std::string, std::shared_ptr<Node>> durable = {};
    size_t shared_locks = 0;
    bool locked = false;
  };

  void begin(Operation operation);
  std::shared_ptr<Node> find(const std::string& path) const;  // with mutex_ held; throws ENOENT
  static void collect_unsynced(const Node& node, const std::string& path,
                               std::vector<std::string>& found);

  mutable std::mutex mutex_;  // guards everything below and all nodes
  std::shared_ptr<Node> root_;
  std::vector<Operation> log_;
  size_t handles_ = 0;
};

// Throws std::system_error, worded as the seam's implementations do.
[[noreturn]] void fail_operation(const Operation& operation, int error);

}  // namespace pccheck::test
