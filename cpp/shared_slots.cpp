#include "cpp/shared_slots.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <string>

#include "cpp/posix_file.h"

namespace pccheck {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
constexpr size_t kReservedAtOnce = size_t{1} << 20;

// Piece by piece: some kernels give back all that they had reserved when a signal comes in between,
// and signals may come often.
void reserve(const Descriptor& memory, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    const size_t piece = std::min(kReservedAtOnce, bytes - done);
    const int error =
        ::posix_fallocate(memory.get(), static_cast<off_t>(done), static_cast<off_t>(piece));
    if (error == EINTR) continue;
    if (error != 0)
      throw std::system_error(error, std::generic_category(),
                              "reserving " + std::to_string(bytes) + " bytes of staging memory");
    done += piece;
  }
}

}  // namespace

SharedSlots::SharedSlots(size_t bytes)
    : memory_(::memfd_create("pccheck-slots", MFD_CLOEXEC | MFD_ALLOW_SEALING)) {
  if (!memory_) throw_errno("memfd_create of staging memory");
  // Reserved now: a page that cannot be had later would be a signal that kills the process.
  reserve(memory_, bytes);
  if (::fcntl(memory_.get(), F_ADD_SEALS, kSeals) != 0) throw_errno("sealing staging memory");
  map(bytes);
}

SharedSlots::SharedSlots(Descriptor memory) : memory_(std::move(memory)) {
  const int seals = ::fcntl(memory_.get(), F_GET_SEALS);
  if (seals < 0) throw_errno("looking at shared staging memory");
  if ((seals & F_SEAL_SHRINK) == 0)
    throw std::runtime_error("shared staging memory is not sealed against shrinking");
  struct stat status{};
  if (::fstat(memory_.get(), &status) != 0) throw_errno("fstat of shared staging memory");
  map(static_cast<size_t>(status.st_size));
}

void SharedSlots::map(size_t bytes) {
  void* mapped = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory_.get(), 0);
  if (mapped == MAP_FAILED)
    throw_errno("mmap of " + std::to_string(bytes) + " bytes of shared staging memory");
  slots_ = {static_cast<std::byte*>(mapped), bytes};
  // Advice only; most systems grant no huge pages to shared memory.
  ::madvise(mapped, bytes, MADV_HUGEPAGE);
  ::madvise(mapped, bytes, MADV_DONTFORK);
}

SharedSlots::~SharedSlots() { ::munmap(slots_.data(), slots_.size()); }

}  // namespace pccheck
