// The disk's own speed: nothing but block-sized direct transfers from (or to) memory that is
// already there, a few threads, and one fdatasync.
//
//   disk_loop overwrite|fresh|read BLOCK_BYTES THREADS PATH:BYTES...
//
// prints {"ns": 71234567, "direct": true}. The clock starts when every thread is ready and ends
// when the data are durable; opening, memory and thread starts are not counted. "fresh" counts
// fallocating the files. "overwrite" first writes a file that has another size, uncounted. Of each
// file, what is left over after the last 4096 bytes is left out.
// Exits 1 with one line on stderr when a call fails. It stands alone, so that it measures the disk
// and none of the engine's code.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <latch>
#include <string>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "disk_loop: %s: %s\n", what.c_str(), std::strerror(errno));
  std::_Exit(1);
}

// Some file systems refuse O_DIRECT: then the transfers are buffered, and the output says so.
int open_file(const std::string& path, int flags, bool& direct) {
  int fd = ::open(path.c_str(), flags | O_DIRECT | O_CLOEXEC, 0644);
  direct = fd >= 0;
  if (fd < 0 && errno == EINVAL) fd = ::open(path.c_str(), flags | O_CLOEXEC, 0644);
  if (fd < 0) fail("open " + path);
  return fd;
}

// Huge pages where the system grants them, as the engine's slots have. Filled with noise: a device
// that compresses must not be measured on zeros.
std::byte* allocate(size_t bytes) {
  void* memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail("mmap");
  ::madvise(memory, bytes, MADV_HUGEPAGE);
  uint64_t state = 0x9e3779b97f4a7c15;
  auto* words = static_cast<uint64_t*>(memory);
  for (size_t i = 0; i < bytes / sizeof *words; ++i) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    words[i] = state;
  }
  return static_cast<std::byte*>(memory);
}

// What deleting costs must not meet the next measurement.
void remove_durably(const std::string& path) {
  if (::unlink(path.c_str()) != 0) {
    if (errno == ENOENT) return;
    fail("unlink " + path);
  }
  const std::string folder = path.substr(0, path.rfind('/') + 1);
  const int fd = ::open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0 || ::fsync(fd) != 0 || ::close(fd) != 0) fail("fsync of the folder of " + path);
}

struct OpenFile {
  std::string path;
  size_t bytes;
  int fd = -1;
};

struct Part {
  const OpenFile* file;
  size_t at, bytes;
};

struct Options {
  std::string mode;
  size_t block_bytes;
  unsigned threads;

  bool reads() const { return mode == "read"; }
};

std::vector<Part> parts_of(const std::vector<OpenFile>& files, size_t block_bytes) {
  std::vector<Part> parts;
  for (const OpenFile& file : files)
    for (size_t at = 0; at < file.bytes; at += block_bytes)
      parts.push_back({&file, at, std::min(block_bytes, file.bytes - at)});
  return parts;
}

void transfer_part(const Part& part, bool reads, std::byte* block) {
  const int fd = part.file->fd;
  for (size_t done = 0; done < part.bytes;) {
    const auto at = static_cast<off_t>(part.at + done);
    const ssize_t moved = reads ? ::pread(fd, block + done, part.bytes - done, at)
                                : ::pwrite(fd, block + done, part.bytes - done, at);
    if (moved < 0 && errno == EINTR) continue;
    if (moved <= 0) fail((reads ? "pread " : "pwrite ") + part.file->path);
    done += static_cast<size_t>(moved);
  }
}

// Returns when the threads have ended; `on_start` runs when all of them are ready. `memory` holds a
// block for each thread.
template <typename OnStart>
void transfer(const std::vector<Part>& parts, const Options& options, std::byte* memory,
              OnStart on_start) {
  std::atomic<size_t> next{0};
  std::latch ready(options.threads), go(1);
  std::vector<std::jthread> threads;
  for (unsigned i = 0; i < options.threads; ++i) {
    threads.emplace_back([&, i] {
      ready.count_down();
      go.wait();
      for (size_t n; (n = next.fetch_add(1, std::memory_order_relaxed)) < parts.size();)
        transfer_part(parts[n], options.reads(), memory + i * options.block_bytes);
    });
  }
  ready.wait();
  on_start();
  go.count_down();
}

// A file of the right size, with every block written once: an extent that was only allocated is
// converted at its first write, which costs what a fresh file costs.
void prepare(const OpenFile& file, const Options& options, std::byte* memory) {
  struct stat status{};
  if (::fstat(file.fd, &status) != 0) fail("fstat " + file.path);
  if (static_cast<size_t>(status.st_size) / 4096 * 4096 == file.bytes) return;
  if (options.reads()) {
    errno = EINVAL;
    fail("read " + file.path + ", which has another size");
  }
  if (::ftruncate(file.fd, 0) != 0) fail("ftruncate " + file.path);
  transfer(parts_of({file}, options.block_bytes), options, memory, [] {});
  if (::fsync(file.fd) != 0) fail("fsync " + file.path);
}

void allocate(const OpenFile& file) {
  if (::fallocate(file.fd, 0, 0, static_cast<off_t>(file.bytes)) != 0 && errno != EOPNOTSUPP)
    fail("fallocate " + file.path);
}

void measure(const Options& options, std::vector<OpenFile> files) {
  std::byte* const memory = allocate(options.block_bytes * options.threads);
  const bool fresh = options.mode == "fresh";
  bool all_direct = true;
  for (OpenFile& file : files) {
    bool direct = false;
    if (fresh) remove_durably(file.path);
    file.fd = open_file(file.path, options.reads() ? O_RDONLY : O_RDWR | O_CREAT, direct);
    if (!fresh) prepare(file, options, memory);
    if (options.reads()) ::posix_fadvise(file.fd, 0, 0, POSIX_FADV_DONTNEED);
    all_direct = all_direct && direct;
  }

  Clock::time_point start;
  transfer(parts_of(files, options.block_bytes), options, memory, [&] {
    start = Clock::now();
    if (fresh)
      for (const OpenFile& file : files) allocate(file);
  });
  if (!options.reads())
    for (const OpenFile& file : files)
      if (::fdatasync(file.fd) != 0) fail("fdatasync " + file.path);
  const auto took = std::chrono::nanoseconds(Clock::now() - start).count();

  for (const OpenFile& file : files)
    if (::close(file.fd) != 0) fail("close " + file.path);
  std::printf("{\"ns\": %lld, \"direct\": %s}\n", static_cast<long long>(took),
              all_direct ? "true" : "false");
}

}  // namespace

int main(int argc, char** argv) {
  const Options options{.mode = argc > 1 ? argv[1] : "",
                        .block_bytes = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0,
                        .threads = argc > 3 ? static_cast<unsigned>(std::atoi(argv[3])) : 0};
  const bool known =
      options.mode == "overwrite" || options.mode == "fresh" || options.mode == "read";
  if (argc < 5 || !known || options.block_bytes % 4096 || !options.block_bytes ||
      !options.threads) {
    std::fputs("usage: disk_loop overwrite|fresh|read BLOCK_BYTES THREADS PATH:BYTES...\n", stderr);
    return 2;
  }
  std::vector<OpenFile> files;
  for (int i = 4; i < argc; ++i) {
    const std::string word = argv[i];
    const size_t colon = word.rfind(':');
    if (colon == std::string::npos) {
      std::fprintf(stderr, "disk_loop: %s has no :BYTES\n", argv[i]);
      return 2;
    }
    files.push_back({word.substr(0, colon),
                     std::strtoull(word.c_str() + colon + 1, nullptr, 10) / 4096 * 4096});
  }
  measure(options, std::move(files));
  return 0;
}
