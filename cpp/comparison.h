// Finds out which payload files of a layer are, byte for byte, what a committed checkpoint has: by
// their size and their digest. Of a file that has changed mostly no more is read than its
// beginning.
//
// Asks for the sources' bytes piece by piece, and is given them where the processor can read them:
// at their place, or in a slot that a device has copied them to. The stager's thread.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "cpp/book.h"
#include "cpp/checkpoint.h"

namespace pccheck {

class Comparison {
 public:
  struct Equal {
    uint32_t file;  // its number in the layout
    FileDigest digest;
  };

  // `work` must live as long; its layout must be one whose files are of layers. Without a base
  // nothing is equal.
  Comparison(const Checkpoint::Work& work, std::shared_ptr<const Base> base);

  // Whether everything is decided.
  bool over() const { return !digester_; }
  // Whether there is a next piece: if not, what was asked for last has to be taken first.
  bool has_next() const;

  // Where the next piece is in the copier's memory. Only while has_next().
  std::span<const std::byte> next(size_t at_most);
  // The pieces' contents, in order; those of several at once, or of one.
  void take(std::span<const std::byte> contents) noexcept;

  // Once over: those that are equal, and to whose they are.
  const std::vector<Equal>& equal() const { return equal_; }
  const std::shared_ptr<const Base>& base() const { return base_; }

 private:
  void begin_file();  // the next one that has to be read, if any
  void end_file();
  void decide();

  const Checkpoint::Work& work_;
  const std::shared_ptr<const Base> base_;
  std::vector<Equal> equal_;

  // The file being read: none when all is decided.
  size_t at_ = 0;  // in the layer's files
  std::optional<FileDigester> digester_;
  const Base::KnownFile* known_ = nullptr;
  uint64_t asked_ = 0;  // bytes of it, the header included
  size_t run_ = 0;
  uint64_t run_done_ = 0;
};

}  // namespace pccheck
