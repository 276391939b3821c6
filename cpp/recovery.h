// Reading a committed checkpoint back: every block that is touched is verified, as its bytes are
// copied to where they go: memory is read once. Reads go past the page cache where the file system
// allows it, several at a time, each through a buffer of its own.
//
// Nothing in the files is believed: names are single components, sizes and counts are checked
// against the files before anything is allocated, all offsets against the sizes.
#pragma once

#include <atomic>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cpp/file.h"
#include "cpp/format.h"

namespace pccheck {

// A range of a payload file and where it is to go.
struct ReadRequest {
  uint32_t file;  // index into CheckpointReader::checksums().files
  uint64_t offset;
  std::span<std::byte> into;
};

// What block reading needs to know of one file.
struct VerifiedFile {
  File* file;
  std::string path;  // for messages
  uint64_t grid_begin;
  uint64_t size_bytes;
  uint64_t block_bytes;
  std::span<const uint32_t> block_sums;
};

// Reads the requests with `threads` threads. Throws CorruptCheckpoint naming file and block when a
// checksum does not match, or the file when a request lies outside it. After an error the
// destinations' contents are undefined.
void read_verified(std::span<const VerifiedFile> files, std::vector<ReadRequest> requests,
                   unsigned threads);

class ReadAhead;

// Used by one thread at a time.
class CheckpointReader {
 public:
  // Opens `<run>/<name>`, locks it shared for as long as this object lives (so that the writer will
  // not recycle it), reads and checks checksums.bin and the manifest, and the files' presence and
  // sizes. Throws CorruptCheckpoint, or std::system_error where something cannot be opened.
  CheckpointReader(const std::string& run_path, const std::string& name);
  ~CheckpointReader();

  const Checksums& checksums() const { return checksums_; }
  std::span<const std::byte> manifest() const { return manifest_; }
  const std::string& path() const { return directory_->path(); }

  // Begins to read the first blocks of a file that will be read from its beginning, by as many
  // threads, before it is known where its bytes go: the device need not wait for that.
  void read_ahead(uint32_t file, unsigned threads);

  void read(std::vector<ReadRequest> requests, unsigned threads);

  // Reads everything.
  void verify(unsigned threads) const;

  // Reads what read() has not: then everything is verified. Throws CorruptCheckpoint.
  void verify_rest(unsigned threads);

  // How much has been read and checked so far. Any thread.
  uint64_t bytes_read() const { return bytes_read_.load(std::memory_order_relaxed); }

 private:
  std::vector<VerifiedFile> verified_files() const;

  std::unique_ptr<Directory> directory_;
  Checksums checksums_;
  std::vector<std::byte> manifest_;
  std::vector<std::unique_ptr<File>> files_;
  std::vector<std::vector<bool>> verified_;       // blocks, by file
  std::unique_ptr<ReadAhead> ahead_;              // reads from one of the files
  mutable std::atomic<uint64_t> bytes_read_ = 0;  // relaxed: only looked at
};

}  // namespace pccheck
