// Where tensors live, as far as copying them is concerned. Any thread.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pccheck {

enum class Place : uint8_t { kHost, kPinnedHost, kThisDevice, kOtherDevice };

// Asks the CUDA runtime, anew each time: an address that was freed can come back as another kind of
// memory. Throws std::runtime_error.
Place place_of(const std::byte* memory, int this_device);

}  // namespace pccheck
