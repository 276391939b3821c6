#include "cpp/recovery.h"

#include <algorithm>
#include <atomic>
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

// How many blocks reading with so many threads has in memory: one more than are read at a time.
size_t buffers_for(unsigned threads) { return std::max<size_t>(threads, 1) + 1; }

// How many files of a checkpoint are kept open, each with two descriptors. Of those who have less
// than 1024 in all, the checkpoints of others are not to take them all.
constexpr size_t kFilesKeptOpen = 100;

// A file that is opened for each reading: where there are many, they are small.
class OpenedOnDemand final : public File {
 public:
  OpenedOnDemand(Directory& directory, std::string name)
      : directory_(directory), name_(std::move(name)), size_bytes_(open()->size_bytes()) {}

  void pread(std::span<std::byte> into, uint64_t offset) override { open()->pread(into, offset); }
  uint64_t size_bytes() override { return size_bytes_; }
  bool is_direct() const override { return false; }

  void pwrite(std::span<const std::byte>, uint64_t) override { refuse(); }
  void allocate(uint64_t) override { refuse(); }
  void sync_data() override { refuse(); }

 private:
  std::unique_ptr<File> open() const { return directory_.open_file(name_); }

  [[noreturn]] void refuse() const { throw std::logic_error(name_ + " is open to be read"); }

  Directory& directory_;
  const std::string name_;
  const uint64_t size_bytes_;
};

}  // namespace

// The first blocks of a file, each in a buffer of its own, one after the other.
class ReadAhead {
 public:
  ReadAhead(VerifiedFile file, unsigned threads);

  // Waits for the threads.
  void finish() { threads_.clear(); }

  const File* file() const { return file_.file; }
  size_t buffers() const { return buffers_; }
  size_t buffer_bytes() const { return static_cast<size_t>(file_.block_bytes); }

  // After finish(): block `index` is in buffer `index`.
  bool has(uint64_t index) const { return index < has_.size() && has_[index]; }

  std::unique_ptr<SlotMemory> take_memory() { return std::move(memory_); }

 private:
  void read(size_t index);

  const VerifiedFile file_;
  const size_t buffers_;
  std::unique_ptr<SlotMemory> memory_;
  std::vector<char> has_;  // one for each buffer, written by the thread that reads it
  std::atomic<size_t> next_{0};
  std::vector<std::jthread> threads_;  // last: they use the others
};

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

uint64_t offset_of(const VerifiedFile& file, uint64_t index) {
  return file.grid_begin + index * file.block_bytes;
}

size_t size_of(const VerifiedFile& file, uint64_t index) {
  return static_cast<size_t>(
      std::min<uint64_t>(file.block_bytes, file.size_bytes - offset_of(file, index)));
}

// Copies the parts to where they go, and returns the checksum of the block they were copied from.
uint32_t scatter_with_crc32c(const BlockTask& task, std::span<const std::byte> block) {
  uint32_t crc = 0;
  size_t summed = 0;
  for (const BlockTask::Part& part : task.parts) {  // in order of their beginnings
    if (part.in_block > summed) {
      crc = crc32c(crc, block.subspan(summed, part.in_block - summed));
      summed = part.in_block;
    }
    // Parts may overlap: what another one has copied already is summed.
    const size_t again = std::min<size_t>(summed - part.in_block, part.bytes);
    std::memcpy(part.to, block.data() + part.in_block, again);
    crc = copy_with_crc32c(crc, part.to + again, block.data() + summed, part.bytes - again,
                           Stores::streamed);
    summed += part.bytes - again;
  }
  return crc32c(crc, block.subspan(summed));
}

void verify_and_scatter(const BlockTask& task, std::span<const std::byte> block) {
  const VerifiedFile& file = *task.file;
  if (scatter_with_crc32c(task, block) != file.block_sums[task.index]) {
    const uint64_t offset = offset_of(file, task.index);
    throw CorruptCheckpoint("block " + std::to_string(task.index) + " of " + file.path +
                            " (bytes " + std::to_string(offset) + " to " +
                            std::to_string(offset + block.size()) +
                            ") does not match its checksum");
  }
}

// Readers fill buffers, a checker empties them: a device that ends several reads at once is given
// the next ones before any of these is summed. A second checker helps where the first is what all
// readers wait for.
class BlockReading {
 public:
  // `ahead`, if any, may have begun with the first of the tasks.
  BlockReading(const std::vector<BlockTask>& tasks, unsigned threads, ReadAhead* ahead,
               std::atomic<uint64_t>* bytes_done)
      : tasks_(tasks),
        bytes_done_(bytes_done),
        readers_(std::clamp<size_t>(threads, 1, tasks.size())),
        buffers_(buffers_for(threads)) {
    for (const BlockTask& task : tasks)
      buffer_bytes_ = std::max<size_t>(buffer_bytes_, task.file->block_bytes);
    if (ahead != nullptr && ahead->buffers() == buffers_ && ahead->buffer_bytes() == buffer_bytes_)
      take_over(*ahead);
    else
      memory_ = allocate_host_slots(buffers_ * buffer_bytes_);
    for (size_t i = buffers_; i-- > next_;) free_.push_back(i);
  }

  // Returns when all tasks are done; throws the first error.
  void run() {
    {
      std::vector<std::jthread> threads;
      try {
        for (size_t i = 0; i < readers_; ++i)
          threads.emplace_back([this] { work(&BlockReading::read_one); });
        threads.emplace_back([this] { work(&BlockReading::help_to_check_one); });
      } catch (...) {  // no more threads to be had: those there are must not wait for the others
        fail(std::current_exception());
      }
      work(&BlockReading::check_one);
    }
    if (error_) std::rethrow_exception(error_);
  }

 private:
  struct Filled {
    const BlockTask* task;
    size_t buffer;
  };

  void take_over(ReadAhead& ahead) {
    ahead.finish();
    memory_ = ahead.take_memory();
    for (; next_ < tasks_.size() && tasks_[next_].file->file == ahead.file() &&
           tasks_[next_].index == next_ && ahead.has(next_);
         ++next_)
      filled_.push_back({&tasks_[next_], next_});
  }

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
    wake_all();
  }

  void wake_all() {
    freed_.notify_all();
    filled_one_.notify_all();
    filled_all_.notify_all();
  }

  bool read_one() {
    Filled filled;
    {
      std::unique_lock lock(mutex_);
      freed_.wait(lock, [&] { return error_ || next_ == tasks_.size() || !free_.empty(); });
      if (error_ || next_ == tasks_.size()) return false;
      filled = {&tasks_[next_++], free_.back()};
      free_.pop_back();
    }
    const BlockTask& task = *filled.task;
    task.file->file->pread(contents(filled), offset_of(*task.file, task.index));
    bool all;
    {
      const std::lock_guard lock(mutex_);
      filled_.push_back(filled);
      all = all_filled();
    }
    filled_one_.notify_one();
    if (all) filled_all_.notify_one();
    return true;
  }

  // But for the one that is being checked.
  bool all_filled() const { return filled_.size() + 1 >= buffers_; }

  bool check_one() {
    std::unique_lock lock(mutex_);
    filled_one_.wait(lock, [&] { return ended() || !filled_.empty(); });
    return check_first(std::move(lock));
  }

  bool help_to_check_one() {
    std::unique_lock lock(mutex_);
    filled_all_.wait(lock, [&] { return ended() || all_filled(); });
    return check_first(std::move(lock));
  }

  bool ended() const { return error_ || taken_ == tasks_.size(); }

  bool check_first(std::unique_lock<std::mutex> lock) {
    if (ended()) return false;
    const Filled filled = filled_.front();
    filled_.pop_front();
    const bool last = ++taken_ == tasks_.size();
    lock.unlock();
    if (last) wake_all();
    verify_and_scatter(*filled.task, contents(filled));
    if (bytes_done_ != nullptr)  // relaxed: somebody looks at how far it is, nothing hangs on it
      bytes_done_->fetch_add(contents(filled).size(), std::memory_order_relaxed);
    lock.lock();
    free_.push_back(filled.buffer);
    lock.unlock();
    freed_.notify_one();
    return true;
  }

  std::span<std::byte> contents(const Filled& filled) const {
    return memory_->bytes().subspan(filled.buffer * buffer_bytes_,
                                    size_of(*filled.task->file, filled.task->index));
  }

  const std::vector<BlockTask>& tasks_;
  std::atomic<uint64_t>* const bytes_done_;  // may be null
  const size_t readers_;
  const size_t buffers_;
  size_t buffer_bytes_ = 0;
  std::unique_ptr<SlotMemory> memory_;

  std::mutex mutex_;  // guards everything below
  std::condition_variable freed_, filled_one_, filled_all_;
  std::vector<size_t> free_;  // a stack: the buffer used last is the likeliest to be cached
  std::deque<Filled> filled_;
  size_t next_ = 0;   // task to be read
  size_t taken_ = 0;  // tasks that a checker has taken
  std::exception_ptr error_;
};

void run_tasks(const std::vector<BlockTask>& tasks, unsigned threads, ReadAhead* ahead = nullptr,
               std::atomic<uint64_t>* bytes_done = nullptr) {
  if (!tasks.empty()) BlockReading(tasks, threads, ahead, bytes_done).run();
}

std::vector<std::byte> read_small(Directory& directory, const char* name,
                                  uint64_t limit_bytes) try {
  return read_whole(directory, name, limit_bytes);
} catch (const std::length_error& error) {
  throw CorruptCheckpoint(error.what());
}

}  // namespace

ReadAhead::ReadAhead(VerifiedFile file, unsigned threads)
    : file_(std::move(file)),
      buffers_(buffers_for(threads)),
      memory_(allocate_host_slots(buffers_ * buffer_bytes())),
      has_(std::min(buffers_, file_.block_sums.size())) {
  for (unsigned i = 0; i < threads; ++i)
    threads_.emplace_back([this] {
      for (size_t index; (index = next_++) < has_.size();) read(index);
    });
}

// What cannot be read is left for whoever needs it, to be told then.
void ReadAhead::read(size_t index) try {
  file_.file->pread(memory_->bytes().subspan(index * buffer_bytes(), size_of(file_, index)),
                    offset_of(file_, index));
  has_[index] = true;
} catch (const std::exception&) {
}

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
    if (files_.size() < kFilesKeptOpen)
      files_.push_back(directory_->open_file(sums.name));
    else
      files_.push_back(std::make_unique<OpenedOnDemand>(*directory_, sums.name));
    verified_.emplace_back(sums.blocks.size());
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

CheckpointReader::~CheckpointReader() = default;

void CheckpointReader::read_ahead(uint32_t file, unsigned threads) {
  ahead_ = std::make_unique<ReadAhead>(verified_files().at(file), threads);
}

void CheckpointReader::read(std::vector<ReadRequest> requests, unsigned threads) {
  const std::vector<VerifiedFile> files = verified_files();
  const std::vector<BlockTask> tasks = tasks_of(files, requests);
  std::unique_ptr<ReadAhead> ahead;
  if (ahead_ && !tasks.empty() && tasks.front().file->file == ahead_->file())
    ahead = std::move(ahead_);
  run_tasks(tasks, threads, ahead.get(), &bytes_read_);
  for (const BlockTask& task : tasks)
    verified_[static_cast<size_t>(task.file - files.data())][task.index] = true;
}

void CheckpointReader::verify(unsigned threads) const {
  const std::vector<VerifiedFile> files = verified_files();
  std::vector<BlockTask> tasks;
  for (const VerifiedFile& file : files)
    for (uint64_t index = 0; index < file.block_sums.size(); ++index)
      tasks.push_back({&file, index, {}});
  run_tasks(tasks, threads, nullptr, &bytes_read_);
}

void CheckpointReader::verify_rest(unsigned threads) {
  const std::vector<VerifiedFile> files = verified_files();
  std::vector<BlockTask> tasks;
  for (size_t f = 0; f < files.size(); ++f)
    for (uint64_t index = 0; index < verified_[f].size(); ++index)
      if (!verified_[f][index]) tasks.push_back({&files[f], index, {}});
  run_tasks(tasks, threads, nullptr, &bytes_read_);
  for (std::vector<bool>& blocks : verified_) blocks.assign(blocks.size(), true);
}

}  // namespace pccheck
