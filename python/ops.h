// What torch.ops.pccheck needs besides the operators themselves.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

namespace pccheck::python {

// A failed system call, on its way through torch's dispatcher to OSError. A type of our own, since
// only a global translator hears what an operator throws, and it must not hear what others throw.
class OperatorOsError : public std::runtime_error {
 public:
  explicit OperatorOsError(const std::system_error& error)
      : std::runtime_error(error.what()), code(error.code().value()) {}
  const int code;
};

// Waits until a save_chunks ticket has committed. False when `timeout_s` has passed first. Throws
// std::invalid_argument for a ticket that was never issued, and what failed the save.
bool wait_chunks(int64_t ticket, std::optional<double> timeout_s);

// Finishes every save under way; returns what failed and nobody has waited for. New saves may
// follow.
std::vector<std::string> close_chunks();

}  // namespace pccheck::python
