// What torch.ops.pccheck needs besides the operators themselves.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace pccheck::python {

// Waits until a save_chunks ticket has committed. False when `timeout_s` has passed first. Throws
// std::invalid_argument for a ticket that was never issued, and what failed the save.
bool wait_chunks(int64_t ticket, std::optional<double> timeout_s);

// Finishes every save under way; returns what failed and nobody has waited for. New saves may
// follow.
std::vector<std::string> close_chunks();

}  // namespace pccheck::python
