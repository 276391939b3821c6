// Owns one file descriptor. Live descriptors are known to a registry, and a forked child closes
// them before it runs anything else: a lock would otherwise be held for as long as some data
// loader's worker lives.
#pragma once

#include <utility>

namespace pccheck {

class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int fd);  // takes ownership; fd < 0 is "none"
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept;
  ~Descriptor() { reset(); }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  void reset() noexcept;

 private:
  int fd_ = -1;
};

}  // namespace pccheck
