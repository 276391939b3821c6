// Waiting with the GIL released and signals looked at.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>
#include <optional>

#include "cpp/checkpoint.h"

namespace pccheck::python {

// Calls wait_until(deadline) -> bool until it is true; false when `timeout_s` has passed first.
template <typename WaitUntil>
bool wait_interruptibly(WaitUntil wait_until, std::optional<double> timeout_s = std::nullopt) {
  constexpr auto kSignalsEvery = std::chrono::milliseconds(50);
  const auto begun = Clock::now();
  if (wait_until(begun)) return true;  // most waits are over before they begin: keep the GIL
  while (true) {
    const auto now = Clock::now();
    if (timeout_s && std::chrono::duration<double>(now - begun).count() >= *timeout_s) return false;
    {
      const pybind11::gil_scoped_release release;
      if (wait_until(now + kSignalsEvery)) return true;
    }
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
  }
}

// For waits that have released the GIL and call this now and then.
inline void look_for_signals() {
  const pybind11::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

}  // namespace pccheck::python
