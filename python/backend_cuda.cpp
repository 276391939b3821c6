#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>
#include <pybind11/stl.h>

#include "cpp/host_copier.h"
#include "cuda/cuda_probe.h"
#include "cuda/d2h_copier.h"
#include "cuda/pinned_memory.h"
#include "python/backend.h"

namespace py = pybind11;

namespace pccheck::python {
namespace {

void require_known(c10::Device device) {
  TORCH_CHECK(device.is_cpu() || device.is_cuda(), "pccheck_ext saves tensors on CPUs and on CUDA ",
              "devices, not on ", device);
}

}  // namespace

bool built_with_cuda() { return true; }

std::unique_ptr<Copier> make_copier(c10::Device device) {
  require_known(device);
  if (device.is_cpu()) return std::make_unique<HostCopier>();
  return std::make_unique<D2hCopier>(device.index());
}

std::unique_ptr<SlotMemory> make_slot_memory(c10::Device device, size_t bytes) {
  require_known(device);
  if (device.is_cpu()) return allocate_host_slots(bytes);
  return make_slot_memory(device, allocate_host_slots(bytes));
}

std::unique_ptr<SlotMemory> make_slot_memory(c10::Device device, std::unique_ptr<SlotMemory> host) {
  require_known(device);
  if (device.is_cpu()) return host;
  const c10::cuda::CUDAGuard guard(device);  // pinning makes a context on the current device
  return pin_slots(std::move(host));
}

std::unique_ptr<ReadyMark> mark_ready(Copier& copier, c10::Device device) {
  auto* of_device = dynamic_cast<D2hCopier*>(&copier);
  if (of_device == nullptr) return nullptr;
  return of_device->mark_ready(c10::cuda::getCurrentCUDAStream(device.index()).stream());
}

void bind_device_probes(py::module_& module) {
  using released = py::call_guard<py::gil_scoped_release>;
  module.def("cuda_gather", &probe_gather, py::arg("ranges"), py::arg("to"), py::arg("stream"),
             released());
  py::class_<CopierProbe>(module, "CudaCopierProbe")
      .def(py::init<int, size_t, size_t, size_t>(), py::arg("device"), py::arg("slots_bytes"),
           py::arg("small_bytes"), py::arg("scratch_bytes"), released())
      .def("submit", &CopierProbe::submit, py::arg("pieces"), py::arg("stream"), released())
      .def("done", &CopierProbe::done, py::arg("submission"), released())
      .def("wait", &CopierProbe::wait, py::arg("submission"), released())
      .def("make_stream_wait", &CopierProbe::make_stream_wait, py::arg("submission"),
           py::arg("stream"), released())
      .def_property_readonly("slots_address", &CopierProbe::slots_address)
      .def_property_readonly("slots_bytes", &CopierProbe::slots_bytes);
  py::class_<StreamGate>(module, "CudaStreamGate")
      .def(py::init<uint64_t>(), py::arg("stream"), released())
      .def("open", &StreamGate::open, released())
      .def_property_readonly("timed_out", &StreamGate::timed_out);
}

}  // namespace pccheck::python
