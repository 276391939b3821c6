// The disk's own speed: nothing but block-sized direct transfers from (or to) memory that is
// already there, a few threads, and one fdatasync.
//
//   disk_loop overwrite|fresh|read PATH BYTES BLOCK_BYTES THREADS
//
// prints {"ns": 71234567, "direct": true}. The clock starts when every thread is ready and ends
// when the data are durable; opening, memory and thread starts are not counted. "fresh" counts
// fallocating the file. "overwrite" first writes a file that has another size, uncounted.
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

struct Transfer {
  bool reads;
  size_t total_bytes, block_bytes;
  unsigned threads;
  std::byte* memory;  // a block for each thread
};

// Returns when the threads have ended; `on_start` runs when all of them are ready.
template <typename OnStart>
void transfer(int fd, const Transfer& what, OnStart on_start) {
  std::atomic<size_t> next{0};
  std::latch ready(what.threads), go(1);
  std::vector<std::jthread> threads;
  for (unsigned i = 0; i < what.threads; ++i) {
    threads.emplace_back([&, i] {
      std::byte* const block = what.memory + i * what.block_bytes;
      ready.count_down();
      go.wait();
      for (;;) {
        const size_t at = next.fetch_add(1, std::memory_order_relaxed) * what.block_bytes;
        if (at >= what.total_bytes) return;
        const size_t bytes = std::min(what.block_bytes, what.total_bytes - at);
        for (size_t done = 0; done < bytes;) {
          const ssize_t part =
              what.reads ? ::pread(fd, block + done, bytes - done, static_cast<off_t>(at + done))
                         : ::pwrite(fd, block + done, bytes - done, static_cast<off_t>(at + done));
          if (part < 0 && errno == EINTR) continue;
          if (part <= 0) fail(what.reads ? "pread" : "pwrite");
          done += static_cast<size_t>(part);
        }
      }
    });
  }
  ready.wait();
  on_start();
  go.count_down();
}

// A file of the right size, with every block written once: an extent that was only allocated is
// converted at its first write, which costs what a fresh file costs.
void prepare(int fd, const std::string& path, const Transfer& what) {
  struct stat status{};
  if (::fstat(fd, &status) != 0) fail("fstat " + path);
  if (static_cast<size_t>(status.st_size) == what.total_bytes) return;
  if (what.reads) {
    errno = EINVAL;
    fail("read " + path + ", which has another size");
  }
  if (::ftruncate(fd, 0) != 0) fail("ftruncate " + path);
  transfer(fd, what, [] {});
  if (::fsync(fd) != 0) fail("fsync " + path);
}

void measure(const std::string& mode, const std::string& path, Transfer what) {
  what.memory = allocate(what.block_bytes * what.threads);
  const bool fresh = mode == "fresh";
  bool direct = false;
  if (fresh && ::unlink(path.c_str()) != 0 && errno != ENOENT) fail("unlink " + path);
  const int flags = what.reads ? O_RDONLY : O_RDWR | O_CREAT;
  const int fd = open_file(path, flags, direct);
  if (!fresh) prepare(fd, path, what);
  if (what.reads) ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);

  Clock::time_point start;
  transfer(fd, what, [&] {
    start = Clock::now();
    if (fresh && ::fallocate(fd, 0, 0, static_cast<off_t>(what.total_bytes)) != 0 &&
        errno != EOPNOTSUPP)
      fail("fallocate " + path);
  });
  if (!what.reads && ::fdatasync(fd) != 0) fail("fdatasync " + path);
  const auto took = std::chrono::nanoseconds(Clock::now() - start).count();

  if (::close(fd) != 0) fail("close " + path);
  std::printf("{\"ns\": %lld, \"direct\": %s}\n", static_cast<long long>(took),
              direct ? "true" : "false");
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (argc != 6 || (mode != "overwrite" && mode != "fresh" && mode != "read")) {
    std::fputs("usage: disk_loop overwrite|fresh|read PATH BYTES BLOCK_BYTES THREADS\n", stderr);
    return 2;
  }
  Transfer what{.reads = mode == "read",
                .total_bytes = std::strtoull(argv[3], nullptr, 10),
                .block_bytes = std::strtoull(argv[4], nullptr, 10),
                .threads = static_cast<unsigned>(std::strtoul(argv[5], nullptr, 10)),
                .memory = nullptr};
  if (what.total_bytes % 4096 || what.block_bytes % 4096 || !what.block_bytes || !what.threads) {
    std::fputs("disk_loop: BYTES and BLOCK_BYTES are multiples of 4096, THREADS at least 1\n",
               stderr);
    return 2;
  }
  measure(mode, argv[2], what);
  return 0;
}
