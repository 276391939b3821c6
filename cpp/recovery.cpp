#include "cpp/recovery.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
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

void run_task(const BlockTask& task, std::span<std::byte> buffer) {
  const VerifiedFile& file = *task.file;
  const uint64_t offset = file.grid_begin + task.index * file.block_bytes;
  const auto block = buffer.first(
      static_cast<size_t>(std::min<uint64_t>(file.block_bytes, file.size_bytes - offset)));
  file.file->pread(block, offset);
  if (crc32c(0, block) != file.block_sums[task.index])
    throw CorruptCheckpoint("block " + std::to_string(task.index) + " of " + file.path +
                            " (bytes " + std::to_string(offset) + " to " +
                            std::to_string(offset + block.size()) +
                            ") does not match its checksum");
  for (const BlockTask::Part& part : task.parts)
    std::memcpy(part.to, block.data() + part.in_block, part.bytes);
}

void run_tasks(const std::vector<BlockTask>& tasks, unsigned threads) {
  if (tasks.empty()) return;
  uint64_t block_bytes = 0;
  for (const BlockTask& task : tasks) block_bytes = std::max(block_bytes, task.file->block_bytes);
  const size_t workers = std::clamp<size_t>(threads, 1, tasks.size());
  const std::unique_ptr<SlotMemory> memory = allocate_host_slots(workers * block_bytes);

  // Relaxed: the counter only deals out indices, the joins order everything else.
  std::atomic<size_t> next = 0;
  std::mutex mutex;  // guards error
  std::exception_ptr error;
  const auto work = [&](size_t worker) {
    const auto buffer = memory->bytes().subspan(worker * block_bytes, block_bytes);
    try {
      for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks.size();)
        run_task(tasks[i], buffer);
    } catch (...) {
      next.store(tasks.size(), std::memory_order_relaxed);  // the others stop soon
      const std::lock_guard lock(mutex);
      if (!error) error = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> others;
    for (size_t worker = 1; worker < workers; ++worker) others.emplace_back(work, worker);
    work(0);
  }
  if (error) std::rethrow_exception(error);
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
