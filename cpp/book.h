// What the newest committed checkpoint's payload files hold, by digest: the book that says of a
// file to be saved whether it need not be written again.
//
// A digest is of a whole file, header included: `xxhsum -H2 <file>` prints it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>

#include "cpp/digest.h"
#include "cpp/layout.h"

namespace pccheck {

struct FileDigest {
  Digest whole;
  // Of the file as far as the first block with data in it reaches, where there is more and this was
  // seen: most changes show here.
  std::optional<Digest> beginning = std::nullopt;
};

// A committed checkpoint that files may be taken from.
struct Base {
  struct KnownFile {
    uint64_t size_bytes;
    FileDigest digest;
  };

  std::string checkpoint;
  std::map<std::string, KnownFile> files;
};

// Any thread.
class Book {
 public:
  // Null as long as nothing was committed.
  std::shared_ptr<const Base> newest() const {
    const std::lock_guard lock(mutex_);
    return newest_;
  }

  void enter(std::shared_ptr<const Base> base) noexcept {
    const std::lock_guard lock(mutex_);
    newest_.swap(base);
  }

 private:
  mutable std::mutex mutex_;  // guards newest_
  std::shared_ptr<const Base> newest_;
};

// Digests a payload file that is taken front to back, in parts that do not reach over the end of a
// block.
class FileDigester {
 public:
  FileDigester(const PayloadFile& file, size_t block_bytes);  // takes the header

  void update(std::span<const std::byte> data);

  uint64_t bytes() const { return bytes_; }  // taken so far, the header included
  uint64_t beginning_bytes() const { return beginning_bytes_; }
  FileDigest finish() const { return {digester_.finish(), beginning_}; }

 private:
  const uint64_t beginning_bytes_;
  Digester digester_;
  uint64_t bytes_;
  std::optional<Digest> beginning_;
};

}  // namespace pccheck
