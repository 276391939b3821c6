// Opening real files; used by posix_directory.cpp alone.
#pragma once

#include <memory>
#include <string>

#include "cpp/descriptor.h"
#include "cpp/file.h"

namespace pccheck {

enum class PosixOpen {
  read,
  create,  // must not exist
  reuse,   // must exist and be nobody else's: null otherwise, see Directory::reuse_file
  lock,    // must exist; EWOULDBLOCK while somebody else holds it
};

std::unique_ptr<File> open_posix_file(int directory, const std::string& directory_path,
                                      const std::string& name, PosixOpen mode);

// Throws std::system_error(errno, what).
[[noreturn]] void throw_errno(const std::string& what);

}  // namespace pccheck
