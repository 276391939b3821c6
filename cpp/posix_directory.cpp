// Directory over one descriptor: every name is resolved against it, so that a directory renamed or
// replaced under way cannot lead the engine elsewhere.
#include <dirent.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <stdexcept>
#include <system_error>

#include "cpp/descriptor.h"
#include "cpp/file.h"
#include "cpp/posix_file.h"

namespace pccheck {
namespace {

void require_single_component(const std::string& name) {
  if (name.empty() || name == "." || name == ".." || name.find('/') != std::string::npos ||
      name.find('\0') != std::string::npos)
    throw std::invalid_argument("not a name inside a directory: '" + name + "'");
}

class PosixDirectory final : public Directory {
 public:
  PosixDirectory(std::string path, Descriptor fd) : path_(std::move(path)), fd_(std::move(fd)) {}

  const std::string& path() const override { return path_; }

  std::vector<Entry> list() override {
    // A descriptor of its own: readdir moves the position of the description it reads from.
    const int fd = ::openat(fd_.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) throw_errno("open " + path_);
    const std::unique_ptr<DIR, int (*)(DIR*)> stream(::fdopendir(fd), ::closedir);
    if (!stream) {
      ::close(fd);
      throw_errno("fdopendir " + path_);
    }
    std::vector<Entry> entries;
    for (;;) {
      errno = 0;
      const dirent* entry = ::readdir(stream.get());
      if (entry == nullptr) {
        if (errno != 0) throw_errno("readdir " + path_);
        return entries;
      }
      const std::string name = entry->d_name;
      if (name != "." && name != "..") entries.push_back({name, kind_of(name)});
    }
  }

  std::unique_ptr<File> open_file(const std::string& name) override {
    require_single_component(name);
    return open_posix_file(fd_.get(), path_, name, PosixOpen::read);
  }

  std::unique_ptr<File> create_file(const std::string& name) override {
    require_single_component(name);
    return open_posix_file(fd_.get(), path_, name, PosixOpen::create);
  }

  std::unique_ptr<File> reuse_file(const std::string& name) override {
    require_single_component(name);
    return open_posix_file(fd_.get(), path_, name, PosixOpen::reuse);
  }

  Link link_file(const std::string& name, Directory& from, uint64_t size_bytes) override {
    require_single_component(name);
    auto& other = dynamic_cast<PosixDirectory&>(from);
    const std::optional<struct stat> wanted = other.look_at(name);
    if (!wanted || !S_ISREG(wanted->st_mode) ||
        static_cast<uint64_t>(wanted->st_size) != size_bytes)
      return Link::impossible;
    if (const std::optional<struct stat> there = look_at(name)) {
      if (is_same(*there, *wanted)) return Link::was_there;
      remove_file(name);
    }
    // Without AT_SYMLINK_FOLLOW: a symbolic link that was put in the file's place after the look at
    // it is linked itself, which shows below.
    if (::linkat(other.fd_.get(), name.c_str(), fd_.get(), name.c_str(), 0) != 0) {
      for (const int code : {EMLINK, EPERM, EXDEV, EOPNOTSUPP, ENOENT})
        if (errno == code) return Link::impossible;
      throw_errno("link " + other.path_ + "/" + name + " -> " + path_ + "/" + name);
    }
    const std::optional<struct stat> made = look_at(name);
    if (made && is_same(*made, *wanted)) return Link::made;
    remove_file(name);
    return Link::impossible;
  }

  std::unique_ptr<Directory> open_directory(const std::string& name) override {
    require_single_component(name);
    const std::string child = path_ + "/" + name;
    Descriptor fd(
        ::openat(fd_.get(), name.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
    if (!fd) throw_errno("open " + child);
    return std::make_unique<PosixDirectory>(child, std::move(fd));
  }

  std::unique_ptr<Directory> create_directory(const std::string& name) override {
    require_single_component(name);
    if (::mkdirat(fd_.get(), name.c_str(), 0777) != 0) throw_errno("mkdir " + path_ + "/" + name);
    return open_directory(name);
  }

  bool exists(const std::string& name) override {
    require_single_component(name);
    return look_at(name).has_value();
  }

  void rename(const std::string& from, const std::string& to) override {
    require_single_component(from);
    require_single_component(to);
    const std::string what = "rename " + path_ + "/" + from + " -> " + to;
    if (::syscall(SYS_renameat2, fd_.get(), from.c_str(), fd_.get(), to.c_str(),
                  RENAME_NOREPLACE) == 0)
      return;
    if (errno != EINVAL && errno != ENOSYS) throw_errno(what);
    // Some network file systems have no RENAME_NOREPLACE. The run's lock keeps other writers out,
    // so looking first is as good.
    if (exists(to)) {
      errno = EEXIST;
      throw_errno(what);
    }
    if (::renameat(fd_.get(), from.c_str(), fd_.get(), to.c_str()) != 0) throw_errno(what);
  }

  void replace(const std::string& from, const std::string& to) override {
    require_single_component(from);
    require_single_component(to);
    if (::renameat(fd_.get(), from.c_str(), fd_.get(), to.c_str()) != 0)
      throw_errno("rename " + path_ + "/" + from + " -> " + to);
  }

  void remove_file(const std::string& name) override {
    require_single_component(name);
    if (::unlinkat(fd_.get(), name.c_str(), 0) != 0) throw_errno("unlink " + path_ + "/" + name);
  }

  void remove_directory(const std::string& name) override {
    require_single_component(name);
    if (::unlinkat(fd_.get(), name.c_str(), AT_REMOVEDIR) != 0)
      throw_errno("rmdir " + path_ + "/" + name);
  }

  void sync() override {
    if (::fsync(fd_.get()) != 0) throw_errno("fsync " + path_);
  }

  bool try_lock(LockMode mode) override {
    const int operation = mode == LockMode::shared ? LOCK_SH : LOCK_EX;
    if (::flock(fd_.get(), operation | LOCK_NB) == 0) return true;
    if (errno != EWOULDBLOCK && errno != EINTR) throw_errno("flock " + path_);
    return false;
  }

  void unlock() override {
    if (::flock(fd_.get(), LOCK_UN) != 0) throw_errno("flock " + path_);
  }

  bool leads_to(const std::string& name, Directory& child) override {
    require_single_component(name);
    auto& opened = dynamic_cast<PosixDirectory&>(child);
    struct stat by_name{}, by_descriptor{};
    if (::fstat(opened.fd_.get(), &by_descriptor) != 0) throw_errno("fstat " + opened.path_);
    if (::fstatat(fd_.get(), name.c_str(), &by_name, AT_SYMLINK_NOFOLLOW) != 0) return false;
    return is_same(by_name, by_descriptor);
  }

  std::unique_ptr<File> try_lock_file(const std::string& name) override {
    require_single_component(name);
    // Creating and locking are two calls; the file is never removed, so nothing can come between.
    const Descriptor made(::openat(fd_.get(), name.c_str(),
                                   O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK, 0666));
    if (!made) throw_errno("open " + path_ + "/" + name);
    try {
      return open_posix_file(fd_.get(), path_, name, PosixOpen::lock);
    } catch (const std::system_error& error) {
      if (error.code() == std::errc::operation_would_block) return nullptr;
      throw;
    }
  }

 private:
  std::optional<struct stat> look_at(const std::string& name) const {
    struct stat status{};
    if (::fstatat(fd_.get(), name.c_str(), &status, AT_SYMLINK_NOFOLLOW) == 0) return status;
    if (errno != ENOENT) throw_errno("stat " + path_ + "/" + name);
    return std::nullopt;
  }

  static bool is_same(const struct stat& one, const struct stat& other) {
    return one.st_ino == other.st_ino && one.st_dev == other.st_dev;
  }

  EntryKind kind_of(const std::string& name) const {
    struct stat status{};
    if (::fstatat(fd_.get(), name.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0)
      return EntryKind::other;  // gone since it was listed
    if (S_ISREG(status.st_mode)) return EntryKind::file;
    return S_ISDIR(status.st_mode) ? EntryKind::directory : EntryKind::other;
  }

  const std::string path_;
  const Descriptor fd_;
};

// As `mkdir -p`, and what was made survives a power loss. What is there already is its maker's to
// sync: its parent may not even be ours to open.
void make_directories(const std::string& path) {
  std::filesystem::path made;
  for (const std::filesystem::path& name : std::filesystem::path(path)) {
    const std::filesystem::path parent = made.empty() ? "." : made;
    made /= name;
    if (::mkdir(made.c_str(), 0777) == 0) {
      const Descriptor entries(::open(parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
      if (!entries) throw_errno("open " + parent.string());
      if (::fsync(entries.get()) != 0) throw_errno("fsync " + parent.string());
    } else if (errno != EEXIST) {
      const int code = errno;
      if (std::error_code ignored; !std::filesystem::is_directory(made, ignored))
        throw std::system_error(code, std::generic_category(), "mkdir " + made.string());
    }
  }
}

}  // namespace

std::unique_ptr<Directory> open_posix_directory(const std::string& path, bool create) {
  if (create) make_directories(path);
  Descriptor fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd) throw_errno("open " + path);
  return std::make_unique<PosixDirectory>(path, std::move(fd));
}

std::vector<std::byte> read_whole(Directory& directory, const std::string& name,
                                  uint64_t limit_bytes) {
  const std::unique_ptr<File> file = directory.open_file(name);
  const uint64_t size = file->size_bytes();
  if (size > limit_bytes)
    throw std::length_error(directory.path() + "/" + name + " has " + std::to_string(size) +
                            " bytes, more than the " + std::to_string(limit_bytes) +
                            " it may have");
  std::vector<std::byte> bytes(size);
  file->pread(bytes, 0);
  return bytes;
}

void remove_tree(Directory& parent, const std::string& name) {
  {
    const std::unique_ptr<Directory> child = parent.open_directory(name);
    for (const Entry& entry : child->list())
      if (entry.kind != EntryKind::directory) child->remove_file(entry.name);
  }
  parent.remove_directory(name);
}

}  // namespace pccheck
