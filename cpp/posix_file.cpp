// File over two descriptors of the same inode: one with O_DIRECT for aligned transfers, where the
// file system has it, and a buffered one for everything else.
#include "cpp/posix_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdint>
#include <system_error>

namespace pccheck {
namespace {

bool is_aligned(const void* address, size_t bytes, uint64_t offset) {
  return ((reinterpret_cast<uintptr_t>(address) | bytes | offset) % kDirectAlignment) == 0;
}

class PosixFile final : public File {
 public:
  PosixFile(std::string path, Descriptor buffered, Descriptor direct)
      : path_(std::move(path)), buffered_(std::move(buffered)), direct_(std::move(direct)) {}

  void pread(std::span<std::byte> into, uint64_t offset) override {
    transfer("pread", into.data(), into.size(), offset, ::pread);
  }

  void pwrite(std::span<const std::byte> from, uint64_t offset) override {
    transfer("pwrite", from.data(), from.size(), offset, ::pwrite);
  }

  void allocate(uint64_t size_bytes) override {
    if (::ftruncate(buffered_.get(), static_cast<off_t>(size_bytes)) != 0) fail("ftruncate");
    if (size_bytes == 0) return;
    int result;
    do {
      result = ::fallocate(buffered_.get(), 0, 0, static_cast<off_t>(size_bytes));
    } while (result != 0 && errno == EINTR);
    // Where blocks cannot be reserved, a full disk shows at the write instead.
    if (result != 0 && errno != EOPNOTSUPP) fail("fallocate");
  }

  void sync_data() override {
    if (::fdatasync(buffered_.get()) != 0) fail("fdatasync");
  }

  uint64_t size_bytes() override {
    struct stat status{};
    if (::fstat(buffered_.get(), &status) != 0) fail("fstat");
    return static_cast<uint64_t>(status.st_size);
  }

  bool is_direct() const override { return static_cast<bool>(direct_); }

 private:
  [[noreturn]] void fail(const std::string& call) const { throw_errno(call + " " + path_); }

  template <typename Byte, typename Call>
  void transfer(const char* name, Byte* at, size_t bytes, uint64_t offset, Call call) {
    while (bytes > 0) {
      // The aligned head goes past the page cache; what is left over, at most once, does not.
      size_t part = bytes;
      int fd = buffered_.get();
      if (direct_ && bytes >= kDirectAlignment && is_aligned(at, 0, offset)) {
        part = bytes - bytes % kDirectAlignment;
        fd = direct_.get();
      }
      const ssize_t done = call(fd, at, part, static_cast<off_t>(offset));
      if (done < 0) {
        if (errno == EINTR) continue;
        fail_at(name, offset);
      }
      if (done == 0) {  // the file ended early, or a device took nothing: never loop on it
        errno = EIO;
        fail_at(name, offset);
      }
      at += done;
      bytes -= static_cast<size_t>(done);
      offset += static_cast<uint64_t>(done);
    }
  }

  [[noreturn]] void fail_at(const char* name, uint64_t offset) const {
    fail_with(name, offset, errno);
  }

  [[noreturn]] void fail_with(const char* name, uint64_t offset, int error) const {
    throw std::system_error(error, std::generic_category(),
                            std::string(name) + " " + path_ + " @" + std::to_string(offset));
  }

  const std::string path_;
  const Descriptor buffered_;
  const Descriptor direct_;
};

// A write lease is granted only while this is the file's one open description, mappings included.
// SIGURG, which is ignored by default, replaces the SIGIO that would end the process if somebody
// opened the file while the lease is held.
bool nobody_else_has_it_open(int fd) {
  if (::fcntl(fd, F_SETSIG, SIGURG) != 0) return false;
  if (::fcntl(fd, F_SETLEASE, F_WRLCK) != 0) return false;
  return ::fcntl(fd, F_SETLEASE, F_UNLCK) == 0;
}

// Some file systems (tmpfs, many network ones) refuse O_DIRECT: then there is only the buffered
// one.
Descriptor open_direct(int directory, const std::string& name, int flags) {
  return Descriptor(::openat(directory, name.c_str(), flags | O_DIRECT | O_NOFOLLOW | O_CLOEXEC));
}

}  // namespace

void throw_errno(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

std::unique_ptr<File> open_posix_file(int directory, const std::string& directory_path,
                                      const std::string& name, PosixOpen mode) {
  const std::string path = directory_path + "/" + name;
  const bool writes = mode != PosixOpen::read;
  // O_NONBLOCK: a FIFO put in a file's place must not hang the reader.
  const int flags = (writes ? O_RDWR : O_RDONLY) | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK |
                    (mode == PosixOpen::create ? O_CREAT | O_EXCL : 0);
  Descriptor buffered(::openat(directory, name.c_str(), flags, 0666));
  if (!buffered) {
    if (mode == PosixOpen::reuse &&
        (errno == ENOENT || errno == ELOOP || errno == ENXIO || errno == EISDIR))
      return nullptr;
    throw_errno("open " + path);
  }
  struct stat status{};
  if (::fstat(buffered.get(), &status) != 0) throw_errno("fstat " + path);
  if (!S_ISREG(status.st_mode)) {
    if (mode == PosixOpen::reuse) return nullptr;
    errno = EINVAL;
    throw_errno("open " + path + " (not a regular file)");
  }
  if (mode == PosixOpen::reuse &&
      (status.st_nlink != 1 || !nobody_else_has_it_open(buffered.get())))
    return nullptr;
  // A process that was killed keeps this lock until its last write has really ended.
  if (writes && ::flock(buffered.get(), LOCK_EX | LOCK_NB) != 0) {
    if (mode == PosixOpen::reuse) return nullptr;
    throw_errno("flock " + path);
  }
  Descriptor direct = open_direct(directory, name, writes ? O_RDWR : O_RDONLY);
  struct stat same{};
  if (direct && (::fstat(direct.get(), &same) != 0 || same.st_ino != status.st_ino))
    direct.reset();  // the name was replaced between the two opens
  return std::make_unique<PosixFile>(path, std::move(buffered), std::move(direct));
}

}  // namespace pccheck
