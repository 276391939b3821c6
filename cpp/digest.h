// XXH3-128, xxHash's digest of 128 bits, with seed 0 and the default secret. Written from its
// specification: doc/xxhash_spec.md of github.com/Cyan4973/xxHash, "XXH3".
//
// By it a layer's bytes are taken for equal to those of the checkpoint before. Two different byte
// strings share a digest with a chance of about 2^-128 (it passes SMHasher's tests); it is no
// defence against someone who looks for two such strings.
//
// The fastest implementation that the processor can run is used; all give the same values, and so
// do `xxhsum -H2` and Python's `xxhash.xxh3_128`.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace pccheck {

struct Digest {
  uint64_t low = 0, high = 0;

  friend bool operator==(const Digest&, const Digest&) = default;
};

// The canonical form: 32 lower-case hexadecimal digits, the highest first, as `xxhsum -H2` prints
// them.
std::string to_hex(const Digest& digest);

namespace detail {

using DigestLanes = std::array<uint64_t, 8>;

// One way to take whole rounds of 1024 bytes into the lanes; tests compare all that run here.
struct DigestFold {
  const char* name;
  void (*fold)(DigestLanes& lanes, const std::byte* from, size_t rounds);
};

// The portable one first, the fastest last.
const std::vector<DigestFold>& digest_folds();
const DigestFold& fastest_digest_fold();

}  // namespace detail

// Takes a byte string in parts, of whatever sizes. A value: a copy goes on by itself. Any thread,
// one at a time.
class Digester {
 public:
  explicit Digester(const detail::DigestFold& fold = detail::fastest_digest_fold());

  void update(std::span<const std::byte> bytes);

  // Of all that was given so far; more may follow.
  Digest finish() const;

 private:
  void fold_rest();

  const detail::DigestFold* fold_;
  detail::DigestLanes lanes_;
  uint64_t total_bytes_ = 0;
  size_t rest_bytes_ = 0;
  std::array<std::byte, 1024 + 64> rest_{};  // what the lanes have not taken: the last bytes given
};

Digest digest(std::span<const std::byte> bytes);

}  // namespace pccheck
