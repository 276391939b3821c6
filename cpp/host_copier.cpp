#include "cpp/host_copier.h"

#include <algorithm>
#include <chrono>
#include <cstring>

namespace pccheck {
namespace {

using Clock = std::chrono::steady_clock;

// A shorter one says more about the clock than about memory.
constexpr size_t kWorthTiming = size_t{256} << 10;

}  // namespace

double StoreChoice::Times::best() const {
  const size_t known = std::min(count, kRecent);
  return known == 0 ? 0 : *std::min_element(recent.begin(), recent.begin() + known);
}

Stores StoreChoice::next() {
  const bool cached = cached_.best() <= kMuchSlower * streamed_.best() || streamed_.count == 0;
  const bool other = ++submissions_ % kTryAgainAfter == 2;
  return cached != other ? Stores::cached : Stores::streamed;
}

void StoreChoice::took(Stores stores, double seconds_per_byte) {
  (stores == Stores::cached ? cached_ : streamed_).add(seconds_per_byte);
}

uint64_t HostCopier::submit(std::span<const Piece> pieces, ReadyMark*) {
  const Stores stores = choice_.next();
  const Clock::time_point start = Clock::now();
  size_t summed = 0;
  for (const Piece& piece : pieces) {
    if (piece.crc != nullptr) {
      *piece.crc = copy_with_crc32c(*piece.crc, piece.to, piece.from, piece.bytes, stores);
      summed += piece.bytes;
    } else {
      std::memcpy(piece.to, piece.from, piece.bytes);
    }
  }
  if (summed >= kWorthTiming) {
    const std::chrono::duration<double> took = Clock::now() - start;
    choice_.took(stores, took.count() / static_cast<double>(summed));
  }
  return ++submissions_;
}

}  // namespace pccheck
