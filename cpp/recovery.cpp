#include "cpp/recovery.h"

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "cpp/crc32c.h"
#include "cpp/run_directory.h"
#include "cpp/staging_pool.h"

namespace pccheck {
namespace {

// One block and the requests (or parts of them) that lie in it.
struct BlockTask {
  const VerifiedFile* file;
  uint64_t index;
  struct Part {
    uint64_t in_block;
    std::byte* to;
    size_t bytes;
  };
  std::vector<Part> parts;
};

std::vector<BlockTask> tasks_of(std::span<const VerifiedFile> files,
                                std::vector<ReadRequest>& requests) {
  std::ranges::sort(requests, [](const ReadRequest& a, const ReadRequest& b) {
    return a.file != b.file ? a.file < b.file : a.offset < b.offset;
  });
  std::vector<BlockTask> tasks;
  for (const ReadRequest& request : requests) {
    if (request.into.empty()) continue;
    if (request.file >= files.size()) throw CorruptCheckpoint("no such file in the checkpoint");
    const VerifiedFile& file = files[request.file];
    if (request.offset < file.grid_begin || request.offset > file.size_bytes ||
        request.into.size() > file.size_bytes - request.offset)
      throw CorruptCheckpoint("a tensor lies outside " + file.path);
    for (size_t done = 0; done < request.into.size();) {
      const uint64_t at = request.offset + done - file.grid_begin;
      const uint64_t index = at / file.block_bytes;
      const uint64_t in_block = at % file.block_bytes;
      const size_t part = static_cast<size_t>(
          std::min<uint64_t>(request.into.size() - done, file.block_bytes - in_block));
      if (tasks.empty() || tasks.back().file != &file || tasks.back().index != index)
        tasks.push_back({&file, index, {}});
      tasks.back().parts.push_back({in_block, request.into.data() + done, part});
      done += part;
    }
  }
  return tasks;
}

uint64_t offset_of(const BlockTask& task) {
  return task.file->grid_begin + task.index * task.file->block_bytes;
}

size_t size_of(const BlockTask& task) {
  return static_cast<size_t>(
      std::min<uint64_t>(task.file->block_bytes, task.file->size_bytes - offset_of(task)));
}

void verify_and_scatter(const BlockTask& task, std::span<const std::byte> block) {
  const VerifiedFile& file = *task.file;
  if (crc32c(0, block) != file.block_sums[task.index]) {
    const uint64_t offset = offset_of(task);
    throw CorruptCheckpoint("block " + std::to_string(task.index) + " of " + file.path +
                            " (bytes " + std::to_string(offset) + " to " +
                            std::to_string(offset + block.size()) +
                            ") does not match its checksum");
  }
  for (const BlockTask::Part& part : task.parts)
    std::memcpy(part.to, block.data() + part.in_block, part.bytes);
}

// Readers fill buffers, checkers empty them: a device that ends several reads at once is given the
// next ones before any of these is summed.
class BlockReading {
 public:
  BlockReading(const std::vector<BlockTask>& tasks, unsigned threads) : tasks_(tasks) {
    for (const BlockTask& task : tasks)
      buffer_bytes_ = std::max<size_t>(buffer_bytes_, task.file->block_bytes);
    readers_ = std::clamp<size_t>(threads, 1, tasks.size());
    const size_t buffers = std::min(tasks.size(), readers_ + kCheckers + kBuffersBetween);
    memory_ = allocate_host_slots(buffers * buffer_bytes_);
    for (size_t i = buffers; i-- > 0;) free_.push_back(i);
  }

  // Returns when all tasks are done; throws the first error.
  void run() {
    {
      std::vector<std::jthread> threads;
      try {
        for (size_t i = 0; i < readers_; ++i)
          threads.emplace_back([this] { work(&BlockReading::read_one); });
        for (size_t i = 1; i < kCheckers; ++i)
          threads.emplace_back([this] { work(&BlockReading::check_one); });
      } catch (...) {  // no more threads to be had: those there are must not wait for the others
        fail(std::current_exception());
      }
      work(&BlockReading::check_one);
    }
    if (error_) std::rethrow_exception(error_);
  }

 private:
  static constexpr size_t kCheckers = 2;
  static constexpr size_t kBuffersBetween = 2;

  struct Filled {
    const BlockTask* task;
    size_t buffer;
  };

  // Calls `one` until it returns false; the first error ends all.
  void work(bool (BlockReading::*one)()) {
    try {
      while ((this->*one)()) {
      }
    } catch (...) {
      fail(std::current_exception());
    }
  }

  void fail(std::exception_ptr error) {
    {
      const std::lock_guard lock(mutex_);
      if (!error_) error_ = std::move(error);
    }
    changed_.notify_all();
  }

  bool read_one() {
    size_t buffer, task;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return error_ || next_ == tasks_.size() || !free_.empty(); });
      if (error_ || next_ == tasks_.size()) return false;
      buffer = free_.back();
      free_.pop_back();
      task = next_++;
    }
    tasks_[task].file->file->pread(contents(buffer, tasks_[task]), offset_of(tasks_[task]));
    {
      const std::lock_guard lock(mutex_);
      filled_.push_back({&tasks_[task], buffer});
    }
    changed_.notify_all();
    return true;
  }

  bool check_one() {
    Filled filled;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return error_ || done_ == tasks_.size() || !filled_.empty(); });
      if (error_ || filled_.empty()) return false;
      filled = filled_.front();
      filled_.pop_front();
      ++done_;
    }
    verify_and_scatter(*filled.task, contents(filled.buffer, *filled.task));
    {
      const std::lock_guard lock(mutex_);
      free_.push_back(filled.buffer);
    }
    changed_.notify_all();
    return true;
  }

  std::span<std::byte> contents(size_t buffer, const BlockTask& task) const {
    return memory_->bytes().subspan(buffer * buffer_bytes_, size_of(task));
  }

  const std::vector<BlockTask>& tasks_;
  size_t buffer_bytes_ = 0;
  size_t readers_ = 0;
  std::unique_ptr<SlotMemory> memory_;

  std::mutex mutex_;  // guards everything below
  std::condition_variable changed_;
  std::vector<size_t> free_;  // a stack: the buffer used last is the likeliest to be cached
  std::deque<Filled> filled_;
  size_t next_ = 0;  // task to be read
  size_t done_ = 0;  // tasks taken by a checker
  std::exception_ptr error_;
};

void run_tasks(const std::vector<BlockTask>& tasks, unsigned threads) {
  if (!tasks.empty()) BlockReading(tasks, threads).run();
}

std::vector<std::byte> read_small(Directory& directory, const char* name,
                                  uint64_t limit_bytes) try {
  return read_whole(directory, name, limit_bytes);
} catch (const std::length_error& error) {
  throw CorruptCheckpoint(error.what());
}

}  // namespace

void read_verified(std::span<const VerifiedFile> files, std::vector<ReadRequest> requests,
                   unsigned threads) {
  run_tasks(tasks_of(files, requests), threads);
}

CheckpointReader::CheckpointReader(const std::string& run_path, const std::string& name) {
  const std::unique_ptr<Directory> run = open_posix_directory(run_path, false);
  directory_ = run->open_directory(name);
  // Only its writer locks a directory exclusively, to recycle it: then it is gone for us.
  if (!directory_->try_lock(LockMode::shared) || !run->leads_to(name, *directory_))
    throw std::system_error(ENOENT, std::generic_category(),
                            "checkpoint " + directory_->path() + " has just been retired");
  checksums_ = decode_checksums(read_small(*directory_, kChecksumsName, kMaxChecksumsBytes));
  if (const auto step = step_of_name(name); step && *step != checksums_.identity.step)
    throw CorruptCheckpoint(path() + " holds a checkpoint of step " +
                            std::to_string(checksums_.identity.step));
  manifest_ = read_small(*directory_, kManifestName, checksums_.manifest_bytes);
  if (manifest_.size() != checksums_.manifest_bytes ||
      crc32c(0, manifest_) != checksums_.manifest_crc)
    throw CorruptCheckpoint(path() + "/" + kManifestName + " does not match its checksum");
  for (const FileSums& sums : checksums_.files) {
    files_.push_back(directory_->open_file(sums.name));
    if (const uint64_t size = files_.back()->size_bytes(); size != sums.size_bytes)
      throw CorruptCheckpoint(path() + "/" + sums.name + " has " + std::to_string(size) +
                              " bytes, not " + std::to_string(sums.size_bytes));
  }
}

std::vector<VerifiedFile> CheckpointReader::verified_files() const {
  std::vector<VerifiedFile> files;
  for (size_t i = 0; i < files_.size(); ++i) {
    const FileSums& sums = checksums_.files[i];
    files.push_back({files_[i].get(), path() + "/" + sums.name, 0, sums.size_bytes,
                     checksums_.block_bytes, sums.blocks});
  }
  return files;
}

void CheckpointReader::read(std::vector<ReadRequest> requests, unsigned threads) const {
  read_verified(verified_files(), std::move(requests), threads);
}

void CheckpointReader::verify(unsigned threads) const {
  const std::vector<VerifiedFile> files = verified_files();
  std::vector<BlockTask> tasks;
  for (const VerifiedFile& file : files)
    for (uint64_t index = 0; index < file.block_sums.size(); ++index)
      tasks.push_back({&file, index, {}});
  run_tasks(tasks, threads);
}

}  // namespace pccheck
