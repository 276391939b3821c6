// A checkpoint that is one safetensors file with its checksums in its own header, as
// torch.ops.pccheck.save_chunks writes and load_chunks reads it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cpp/checkpoint.h"
#include "cpp/recovery.h"
#include "cpp/safetensors.h"

namespace pccheck {

// Written under a temporary name beside `path`, published by a rename that replaces what was there,
// as a whole.
std::unique_ptr<Target> make_file_target(const std::string& path);
std::unique_ptr<Target> make_file_target(std::unique_ptr<Directory> directory,
                                         const std::string& name);

class SealedFile {
 public:
  // Reads and checks the header. Throws CorruptCheckpoint, std::system_error.
  explicit SealedFile(const std::string& path);

  const safetensors::Header& header() const { return header_; }
  // Offsets as in header(). Throws CorruptCheckpoint.
  void read(std::vector<ReadRequest> requests, unsigned threads) const;

 private:
  const std::string path_;
  std::unique_ptr<File> file_;
  uint64_t size_bytes_;
  safetensors::Header header_;
  safetensors::Checksums sums_;
};

}  // namespace pccheck
