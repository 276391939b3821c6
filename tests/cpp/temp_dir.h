// Real directories and files for tests, gone when the test is.
#pragma once

#include <sys/stat.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/cpp/bytes.h"

namespace pccheck::test {

// Under $TMPDIR, or else where the test was started: a build folder takes direct I/O more often
// than /tmp does.
class TempDir {
 public:
  TempDir() {
    const char* const parent = std::getenv("TMPDIR");
    std::string name = std::string(parent != nullptr ? parent : ".") + "/pccheck-test-XXXXXX";
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp " + name);
    path_ = std::filesystem::absolute(name).lexically_normal().string();
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

inline Bytes read_file(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw std::runtime_error("cannot read " + path);
  return to_bytes(std::string(std::istreambuf_iterator<char>(stream), {}));
}

// In place where the file exists: links and inode stay.
inline void write_file(const std::string& path, const Bytes& bytes) {
  std::ofstream stream(path, std::ios::binary);
  stream << to_text(bytes);
  if (!stream.flush()) throw std::runtime_error("cannot write " + path);
}

inline void flip_bit_of_file(const std::string& path, size_t bit) {
  std::fstream stream(path, std::ios::binary | std::ios::in | std::ios::out);
  stream.seekg(static_cast<std::streamoff>(bit / 8));
  const int byte = stream.get();
  stream.seekp(static_cast<std::streamoff>(bit / 8));
  stream.put(static_cast<char>(byte ^ (1 << (bit % 8))));
  if (!stream.flush()) throw std::runtime_error("cannot change " + path);
}

inline std::vector<std::string> names_in(const std::string& path) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(path))
    names.push_back(entry.path().filename().string());
  std::ranges::sort(names);
  return names;
}

inline ino_t inode_of(const std::string& path) {
  struct stat status{};
  if (::lstat(path.c_str(), &status) != 0) throw std::runtime_error("cannot stat " + path);
  return status.st_ino;
}

}  // namespace pccheck::test
