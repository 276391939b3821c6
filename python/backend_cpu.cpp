#include <c10/util/Exception.h>

#include "cpp/host_copier.h"
#include "python/backend.h"

namespace pccheck::python {
namespace {

void require_cpu(c10::Device device) {
  TORCH_CHECK(device.is_cpu(), "pccheck_ext was built without CUDA and cannot save tensors on ",
              device, "; rebuild it where torch is a CUDA build and nvcc is installed: ",
              "pip install --no-build-isolation --force-reinstall --no-deps .");
}

}  // namespace

bool built_with_cuda() { return false; }

std::unique_ptr<Copier> make_copier(c10::Device device) {
  require_cpu(device);
  return std::make_unique<HostCopier>();
}

std::unique_ptr<SlotMemory> make_slot_memory(c10::Device device, size_t bytes) {
  require_cpu(device);
  return allocate_host_slots(bytes);
}

std::unique_ptr<SlotMemory> make_slot_memory(c10::Device device, std::unique_ptr<SlotMemory> host) {
  require_cpu(device);
  return host;
}

std::unique_ptr<ReadyMark> mark_ready(Copier&, c10::Device) { return nullptr; }

void bind_device_probes(pybind11::module_&) {}

}  // namespace pccheck::python
