// torch.ops.pccheck: one safetensors file saved, or read, in parallel.
//
// save_chunks has no fake kernel on purpose: with one, torch.compile removes a call whose result is
// not used, and with it the save. Without, it makes a graph break and runs. It is registered for
// devices, not CompositeExplicit, which would run on fake tensors while compiling.
#include "python/ops.h"

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "cpp/engine.h"
#include "cpp/file_target.h"
#include "python/backend.h"
#include "python/interruptible.h"
#include "python/tensor_view.h"

namespace pccheck::python {
namespace {

constexpr size_t kBlockBytes = size_t{4} << 20;
constexpr size_t kStagingBytes = size_t{64} << 20;
constexpr unsigned kThreads = 4;
constexpr size_t kMaxInFlight = 4;

// The process's engines for these operators, one for each device used, made when first needed.
// A forked child begins anew: the parent's threads and saves are not its own.
class Savers {
 public:
  static Savers& instance() {
    // Never destroyed, as close_chunks() ends it: at the exit of a forked child its threads, which
    // the destructors would wait for, do not exist.
    static std::mutex& making = *std::make_unique<std::mutex>().release();
    static Savers* savers = nullptr;
    static pid_t owner = 0;
    const std::lock_guard lock(making);
    if (owner != ::getpid()) {
      savers = std::make_unique<Savers>().release();
      owner = ::getpid();
    }
    return *savers;
  }

  std::mutex mutex;  // one save begins at a time; held while it waits for room and for staging,
                     // never together with the interpreter's lock
  std::map<int64_t, std::shared_ptr<Checkpoint>> saves;  // in flight, or failed and not waited for
  int64_t last_ticket = 0;

  Engine& engine(c10::Device device) {
    std::unique_ptr<Engine>& engine = engines_[device.is_cpu() ? -1 : device.index()];
    if (!engine)
      engine = std::make_unique<Engine>(
          EngineOptions{kBlockBytes, kMaxInFlight}, make_copier(device),
          make_slot_memory(device, kStagingBytes), std::make_unique<LocalPersister>(kThreads));
    return *engine;
  }

  void forget_committed() {
    std::erase_if(saves, [](const auto& save) {
      return save.second->state() == Checkpoint::State::committed;
    });
  }

  void forget(int64_t ticket) {
    const std::lock_guard lock(mutex);
    saves.erase(ticket);
  }

  void close() { engines_.clear(); }

 private:
  std::map<int, std::unique_ptr<Engine>> engines_;
};

[[noreturn]] void raise_failure(const Checkpoint& save) {
  try {
    std::rethrow_exception(save.error());
  } catch (const std::exception& error) {
    TORCH_CHECK(false, "save_chunks to ", save.name(), " failed: ", error.what());
  }
}

c10::Device device_of(const std::vector<at::Tensor>& tensors) {
  c10::Device device(c10::kCPU);
  for (const at::Tensor& tensor : tensors) {
    if (tensor.is_cpu()) continue;
    TORCH_CHECK_VALUE(device.is_cpu() || device == tensor.device(), "save_chunks: tensors are on ",
                      device, " and on ", tensor.device(), "; save those of one device at a time");
    device = tensor.device();
  }
  return device;
}

// Enough ranges to keep the writers busy, none smaller than a few blocks.
uint32_t chunks_for(int64_t wanted, uint64_t bytes) {
  if (wanted > 0) return static_cast<uint32_t>(wanted);
  return static_cast<uint32_t>(std::clamp<uint64_t>(bytes / (4 * kBlockBytes), 1, kThreads));
}

std::shared_ptr<const Layout> layout_of(const std::vector<at::Tensor>& tensors,
                                        const std::vector<std::string>& names,
                                        int64_t chunk_count) {
  FileSpec file{.name = "chunks", .metadata = {{"format", "pt"}}, .tensors = {}};
  uint64_t bytes = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto sizes = tensors[i].sizes();
    file.tensors.push_back({names[i],
                            std::string(safetensors_dtype(tensors[i], names[i])),
                            {sizes.begin(), sizes.end()},
                            0});
    bytes += tensors[i].nbytes();
  }
  return Layout::make({std::move(file)}, {.block_bytes = kBlockBytes,
                                          .layer_count = 1,
                                          .chunk_count = chunks_for(chunk_count, bytes),
                                          .checksums_in_header = true});
}

int64_t save_chunks(const std::vector<at::Tensor>& tensors, const std::vector<std::string>& names,
                    const std::string& path, int64_t chunk_count, bool wait) try {
  TORCH_CHECK_VALUE(tensors.size() == names.size(), "save_chunks: ", tensors.size(),
                    " tensors but ", names.size(), " names");
  TORCH_CHECK_VALUE(chunk_count >= 0 && chunk_count <= 4096,
                    "save_chunks: chunk_count must be 0 (automatic) to 4096, not ", chunk_count);
  const c10::Device device = device_of(tensors);
  const std::shared_ptr<const Layout> layout = layout_of(tensors, names, chunk_count);

  Savers& savers = Savers::instance();
  std::unique_lock lock(savers.mutex);
  Engine& engine = savers.engine(device);
  savers.forget_committed();
  engine.wait_room(Clock::time_point::max());
  const std::shared_ptr<Checkpoint> save = engine.begin({}, path, layout, make_file_target(path));
  const int64_t ticket = ++savers.last_ticket;

  std::vector<TensorView> views;
  HandOver hand_over;
  for (size_t i = 0; i < tensors.size(); ++i) {
    views.emplace_back(tensors[i], names[i]);
    hand_over.sources.push_back(views.back().source());
  }
  if (!device.is_cpu()) hand_over.ready = mark_ready(engine.copier(), device);
  save->hand_over(0, std::move(hand_over));
  save->seal({}, std::nullopt);
  // Nothing gates these tensors, so they are read before the caller can change them.
  save->wait_all_staged(Clock::time_point::max());
  savers.saves.emplace(ticket, save);
  lock.unlock();
  if (wait) save->wait_finished(Clock::time_point::max());
  if (wait && save->state() == Checkpoint::State::failed) {
    savers.forget(ticket);
    raise_failure(*save);
  }
  return ticket;
} catch (const std::system_error& error) {
  throw OperatorOsError(error);
}

void load_chunks(const std::vector<at::Tensor>& out, const std::vector<std::string>& names,
                 const std::string& path) try {
  TORCH_CHECK_VALUE(out.size() == names.size(), "load_chunks: ", out.size(), " tensors but ",
                    names.size(), " names");
  const SealedFile file(path);
  std::vector<ReadRequest> requests;
  std::vector<std::pair<at::Tensor, at::Tensor>> copies;  // read beside, then copied
  for (size_t i = 0; i < out.size(); ++i) {
    const auto found = file.header().tensors.find(names[i]);
    TORCH_CHECK_VALUE(found != file.header().tensors.end(), "load_chunks: ", path,
                      " has no tensor '", names[i], "'");
    const safetensors::Entry& entry = found->second;
    const std::string_view dtype = safetensors_dtype(out[i], names[i]);
    const auto sizes = out[i].sizes();
    TORCH_CHECK_VALUE(
        dtype == entry.dtype &&
            std::ranges::equal(sizes, entry.shape, {},
                               [](int64_t extent) { return static_cast<uint64_t>(extent); }),
        "load_chunks: tensor '", names[i], "' is ", entry.dtype,
        c10::IntArrayRef(std::vector<int64_t>(entry.shape.begin(), entry.shape.end())), " in ",
        path, ", but the tensor given for it is ", dtype, sizes);
    at::Tensor target = out[i].detach();
    if (!target.is_cpu() || !target.is_contiguous() || target.is_conj() || target.is_neg()) {
      copies.emplace_back(target, at::Tensor());
      target = target.new_empty(sizes, target.options().device(c10::kCPU));
      copies.back().second = target;
    }
    requests.push_back(
        {0, entry.begin, {static_cast<std::byte*>(target.mutable_data_ptr()), target.nbytes()}});
  }
  file.read(std::move(requests), kThreads);
  for (auto& [target, read] : copies) target.copy_(read);
  for (const at::Tensor& tensor : out)
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
} catch (const std::system_error& error) {
  throw OperatorOsError(error);
}

}  // namespace

bool wait_chunks(int64_t ticket, std::optional<double> timeout_s) {
  Savers& savers = Savers::instance();
  std::shared_ptr<Checkpoint> save;
  {
    const pybind11::gil_scoped_release release;
    const std::lock_guard lock(savers.mutex);
    if (ticket <= 0 || ticket > savers.last_ticket)
      throw std::invalid_argument("save_chunks has issued no ticket " + std::to_string(ticket));
    const auto found = savers.saves.find(ticket);
    if (found == savers.saves.end()) return true;  // committed, or its failure was told already
    save = found->second;
  }
  if (!wait_interruptibly([&](Clock::time_point until) { return save->wait_finished(until); },
                          timeout_s))
    return false;
  {
    const pybind11::gil_scoped_release release;
    savers.forget(ticket);
  }
  if (save->state() == Checkpoint::State::failed) raise_failure(*save);
  return true;
}

std::vector<std::string> close_chunks() {
  Savers& savers = Savers::instance();
  const std::lock_guard lock(savers.mutex);
  savers.close();
  std::vector<std::string> failures;
  for (const auto& [ticket, save] : savers.saves) {
    if (save->state() != Checkpoint::State::failed) continue;
    try {
      std::rethrow_exception(save->error());
    } catch (const std::exception& error) {
      failures.push_back(save->name() + ": " + error.what());
    }
  }
  savers.saves.clear();
  return failures;
}

}  // namespace pccheck::python

TORCH_LIBRARY(pccheck, library) {
  library.def(
      "save_chunks(Tensor[] tensors, str[] names, str path, int chunk_count=0, bool wait=False) -> "
      "int");
  library.def("load_chunks(Tensor(a!)[] out, str[] names, str path) -> ()");
}

namespace pccheck::python {
TORCH_LIBRARY_IMPL(pccheck, CPU, library) {
  library.impl("save_chunks", save_chunks);
  library.impl("load_chunks", load_chunks);
}
TORCH_LIBRARY_IMPL(pccheck, CUDA, library) {
  library.impl("save_chunks", save_chunks);
  library.impl("load_chunks", load_chunks);
}
}  // namespace pccheck::python
