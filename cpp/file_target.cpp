#include "cpp/file_target.h"

#include <array>
#include <atomic>
#include <filesystem>
#include <stdexcept>

#include "cpp/run_directory.h"

namespace pccheck {
namespace {

std::string parent_of(const std::string& path) {
  const std::string parent = std::filesystem::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

std::string name_of(const std::string& path) {
  const std::string name = std::filesystem::path(path).filename().string();
  if (name.empty()) throw std::invalid_argument("'" + path + "' does not end in a file's name");
  return name;
}

class FileTarget final : public Target {
 public:
  FileTarget(std::unique_ptr<Directory> directory, std::string name, std::string temporary)
      : directory_(std::move(directory)),
        name_(std::move(name)),
        temporary_(std::move(temporary)) {}

  std::unique_ptr<File> open(const PayloadFile& plan) override {
    std::unique_ptr<File> file = directory_->create_file(temporary_);
    created_ = true;
    file->allocate(plan.size_bytes);
    return file;
  }

  bool publishes_open_files() const override { return true; }  // the checksums in its header

  std::unique_ptr<File> open_manifest(size_t) override { return nullptr; }

  void publish(const Identity&, std::vector<PersistedFile>& files,
               std::span<const std::byte>) override {
    PersistedFile& only = files.at(0);
    std::string header = only.plan->header;
    safetensors::put_checksums(header, only.block_sums);
    only.file->pwrite(std::as_bytes(std::span(header)), 0);
    only.file->sync_data();
    directory_->replace(temporary_, name_);
    created_ = false;
    try {
      directory_->sync();
    } catch (const std::exception& error) {
      throw OutcomeUnknown(
          directory_->path() + "/" + name_ +
          " is visible, but whether it would survive a power loss is unknown: " + error.what());
    }
  }

  void discard() override {
    if (created_) directory_->remove_file(temporary_);
  }

  void retire() override {}

 private:
  const std::unique_ptr<Directory> directory_;
  const std::string name_;
  const std::string temporary_;
  bool created_ = false;
};

}  // namespace

std::unique_ptr<Target> make_file_target(const std::string& path) {
  const std::string name = name_of(path);
  return make_file_target(open_posix_directory(parent_of(path), false), name);
}

std::unique_ptr<Target> make_file_target(std::unique_ptr<Directory> directory,
                                         const std::string& name) {
  // Saves to one path, of this process and of others, do not meet under one temporary name.
  // Relaxed: only uniqueness counts.
  static std::atomic<uint64_t> saves = 0;
  std::string temporary;
  do {
    temporary =
        name + "." + std::to_string(saves.fetch_add(1, std::memory_order_relaxed)) + kPartialSuffix;
    // One that nobody has open was left by a process that was killed.
    if (directory->exists(temporary) && directory->reuse_file(temporary))
      directory->remove_file(temporary);
  } while (directory->exists(temporary));
  return std::make_unique<FileTarget>(std::move(directory), name, std::move(temporary));
}

SealedFile::SealedFile(const std::string& path)
    : path_(path),
      file_(open_posix_directory(parent_of(path), false)->open_file(name_of(path))),
      size_bytes_(file_->size_bytes()) {
  try {
    if (size_bytes_ < 8) throw safetensors::Malformed("it is shorter than 8 bytes");
    std::array<std::byte, 8> prefix;
    file_->pread(prefix, 0);
    std::vector<std::byte> bytes(safetensors::header_bytes(prefix, size_bytes_));
    file_->pread(bytes, 0);
    header_ = safetensors::parse_header(bytes, size_bytes_);
    sums_ = safetensors::read_checksums(bytes, header_, size_bytes_);
  } catch (const safetensors::Malformed& error) {
    throw CorruptCheckpoint(path + ": " + error.what());
  }
}

void SealedFile::read(std::vector<ReadRequest> requests, unsigned threads) const {
  const VerifiedFile file{file_.get(),       path_,           header_.data_begin, size_bytes_,
                          sums_.block_bytes, sums_.block_sums};
  read_verified({&file, 1}, std::move(requests), threads);
}

}  // namespace pccheck
