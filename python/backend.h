// What differs between a build for CPUs only and one with CUDA. Exactly one of backend_cpu.cpp and
// backend_cuda.cpp is compiled in.
#pragma once

#include <c10/core/Device.h>
#include <pybind11/pybind11.h>

#include <memory>

#include "cpp/copier.h"
#include "cpp/staging_pool.h"

namespace pccheck::python {

bool built_with_cuda();

// For tensors of one device; tensors in host memory are copied too. Throws c10::Error where this
// build has no support for the device.
std::unique_ptr<Copier> make_copier(c10::Device device);
std::unique_ptr<SlotMemory> make_slot_memory(c10::Device device, size_t bytes);
// Memory that is there already, made fit for the device.
std::unique_ptr<SlotMemory> make_slot_memory(c10::Device device, std::unique_ptr<SlotMemory> host);

// What the device's current stream has been asked to do up to now, for a copier of that device;
// null for CPUs. Caller's thread.
std::unique_ptr<ReadyMark> mark_ready(Copier& copier, c10::Device device);

// The device part's pieces by themselves, for tests.
void bind_device_probes(pybind11::module_& module);

}  // namespace pccheck::python
