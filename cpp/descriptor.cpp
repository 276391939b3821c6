#include "cpp/descriptor.h"

#include <pthread.h>
#include <unistd.h>

#include <cerrno>
#include <memory>
#include <mutex>
#include <set>

namespace pccheck {
namespace {

// The one global of this room. It is never destroyed: threads may outlive static destruction.
struct Registry {
  std::mutex mutex;  // guards `open`; held across fork() so that a child sees it whole
  std::set<int> open;

  Registry() {
    ::pthread_atfork([] { instance().mutex.lock(); }, [] { instance().mutex.unlock(); },
                     [] {
                       for (int fd : instance().open) ::close(fd);
                       instance().open.clear();
                       instance().mutex.unlock();
                     });
  }

  static Registry& instance() {
    static Registry& registry = *std::make_unique<Registry>().release();
    return registry;
  }
};

}  // namespace

Descriptor::Descriptor(int fd) : fd_(fd) {
  if (fd < 0) return;
  Registry& registry = Registry::instance();
  const std::lock_guard lock(registry.mutex);
  registry.open.insert(fd);
}

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
  if (this != &other) {
    reset();
    fd_ = std::exchange(other.fd_, -1);
  }
  return *this;
}

void Descriptor::reset() noexcept {
  if (fd_ < 0) return;
  {
    Registry& registry = Registry::instance();
    const std::lock_guard lock(registry.mutex);
    // In a forked child the number was closed already and may belong to somebody else by now.
    // Closed under the lock: a fork in between would carry the descriptor into the child.
    if (registry.open.erase(fd_) > 0) ::close(fd_);
  }
  fd_ = -1;
}

}  // namespace pccheck
