// pccheck_ext._C: control of the engine. Data goes through it as at::Tensor, everything else as
// plain Python values; policy and names live in the package. pccheck_ext/_C.pyi describes it.
#include <torch/csrc/utils/pybind.h>

#include <cstring>
#include <system_error>

#include "cpp/recovery.h"
#include "python/backend.h"
#include "python/interruptible.h"
#include "python/ops.h"
#include "python/session.h"

namespace py = pybind11;

namespace pccheck::python {
namespace {

Id id_from(const py::bytes& bytes) {
  const std::string_view view = bytes;
  Id id;
  if (view.size() != id.size()) throw std::invalid_argument("an id has 16 bytes");
  std::memcpy(id.data(), view.data(), id.size());
  return id;
}

py::bytes id_to(const Id& id) { return {reinterpret_cast<const char*>(id.data()), id.size()}; }

py::bytes to_bytes(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

using TensorTuple = std::tuple<std::string, std::string, std::vector<uint64_t>, uint32_t>;
using FileTuple = std::tuple<std::string, std::vector<std::pair<std::string, std::string>>,
                             std::vector<TensorTuple>>;

using TextTuple = std::pair<std::string, std::string>;

std::shared_ptr<const Layout> make_layout(const std::vector<FileTuple>& files, uint32_t layer_count,
                                          size_t block_bytes, uint32_t chunk_count,
                                          const std::vector<TextTuple>& texts,
                                          bool files_of_layers) {
  std::vector<FileSpec> specs;
  for (const auto& [name, metadata, tensors] : files) {
    FileSpec spec{name, metadata, {}};
    for (const auto& [tensor, dtype, shape, layer] : tensors)
      spec.tensors.push_back({tensor, dtype, shape, layer});
    specs.push_back(std::move(spec));
  }
  for (const auto& [name, text] : texts) specs.push_back({name, {}, {}, text});
  return Layout::make(std::move(specs), {.block_bytes = block_bytes,
                                         .layer_count = layer_count,
                                         .chunk_count = chunk_count,
                                         .files_of_layers = files_of_layers});
}

py::list layer_tensors(const Layout& layout, size_t layer) {
  py::list tensors;
  for (const TensorRef& ref : layout.layers().at(layer).tensors) {
    const TensorExtent& extent = layout.tensor(ref);
    tensors.append(py::make_tuple(layout.files()[ref.file].name, extent.spec.name, extent.begin,
                                  extent.bytes));
  }
  return tensors;
}

std::unique_ptr<Session> open_session(const std::string& path, size_t block_bytes,
                                      size_t staging_bytes, unsigned writer_threads,
                                      size_t max_in_flight, size_t keep_last, uint64_t keep_every,
                                      double lock_timeout_s, const std::string& device,
                                      bool manual_copier, bool verify_staged,
                                      const std::optional<std::string>& monitor,
                                      double drain_timeout_s) {
  SessionOptions options{.block_bytes = block_bytes,
                         .staging_bytes = staging_bytes,
                         .writer_threads = writer_threads,
                         .max_in_flight = max_in_flight,
                         .keep_last = keep_last,
                         .keep_every = keep_every,
                         .lock_timeout_s = lock_timeout_s,
                         .device = c10::Device(device),
                         .manual_copier = manual_copier,
                         .verify_staged = verify_staged,
                         .monitor = std::nullopt};
  if (monitor)
    options.monitor = MonitorOptions{*monitor, std::chrono::duration<double>(drain_timeout_s)};
  const py::gil_scoped_release release;
  return std::make_unique<Session>(path, std::move(options), look_for_signals);
}

py::dict session_stats(Session& session) {
  const CommitCounts counts = session.counts();
  py::dict stats;
  stats["checkpoints_committed"] = counts.committed;
  stats["checkpoints_failed"] = counts.failed;
  stats["bytes_persisted"] = counts.bytes;
  stats["bytes_linked"] = counts.bytes_linked;
  stats["links_refused"] = session.links_refused();
  stats["durable_s_total"] = counts.durable_seconds;
  stats["durable_s_last"] = counts.last_durable_seconds;
  stats["last_committed_step"] = counts.last_committed_step;
  const Engine* const engine = session.has_engine() ? &session.engine() : nullptr;
  stats["in_flight"] = engine != nullptr ? engine->in_flight() : 0;
  stats["staging_bytes"] = engine != nullptr ? engine->staging_bytes() : 0;
  stats["free_slots"] = engine != nullptr ? engine->free_slots() : 0;
  stats["slots"] = engine != nullptr ? engine->slot_count() : 0;
  stats["last_sealed_step"] = session.last_sealed_step();
  return stats;
}

using ReadTuple = std::tuple<uint32_t, uint64_t, at::Tensor>;

void read_into(CheckpointReader& reader, const std::vector<ReadTuple>& reads, unsigned threads) {
  std::vector<ReadRequest> requests;
  for (const auto& [file, offset, tensor] : reads) {
    if (!tensor.is_cpu() || !tensor.is_contiguous())
      throw std::invalid_argument("can only read into contiguous tensors in host memory");
    requests.push_back(
        {file, offset, {static_cast<std::byte*>(tensor.mutable_data_ptr()), tensor.nbytes()}});
  }
  {
    const py::gil_scoped_release release;
    reader.read(std::move(requests), threads);
  }
  for (const auto& [file, offset, tensor] : reads)
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

// OSError(errno, text) becomes FileNotFoundError, PermissionError and so on by itself.
void set_os_error(int code, const char* text) {
  const py::tuple arguments = py::make_tuple(code, text);
  PyErr_SetObject(PyExc_OSError, arguments.ptr());
}

// What this module's functions throw.
void translate(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const std::system_error& failed) {
    set_os_error(failed.code().value(), failed.what());
  } catch (const TimedOut& failed) {
    py::set_error(PyExc_TimeoutError, failed.what());
  } catch (const c10::TypeError& failed) {
    py::set_error(PyExc_TypeError, failed.what_without_backtrace());
  } catch (const c10::ValueError& failed) {
    py::set_error(PyExc_ValueError, failed.what_without_backtrace());
  } catch (const c10::Error& failed) {
    py::set_error(PyExc_RuntimeError, failed.what_without_backtrace());
  }
}

// What the operators throw, too: types of our own and no others, for this one hears everybody's.
void translate_own(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const CorruptCheckpoint& failed) {
    py::set_error(py::module_::import("pccheck_ext.errors").attr("CheckpointCorrupt"),
                  failed.what());
  } catch (const OperatorOsError& failed) {
    set_os_error(failed.code, failed.what());
  }
}

void bind_save(py::module_& module) {
  py::class_<Layout, std::shared_ptr<Layout>>(module, "Layout")
      .def(py::init([](const std::vector<FileTuple>& files, uint32_t layer_count,
                       size_t block_bytes, uint32_t chunk_count,
                       const std::vector<TextTuple>& texts, bool files_of_layers) {
             return std::const_pointer_cast<Layout>(
                 make_layout(files, layer_count, block_bytes, chunk_count, texts, files_of_layers));
           }),
           py::arg("files"), py::arg("layer_count"), py::arg("block_bytes"),
           py::arg("chunk_count") = 1, py::kw_only(), py::arg("texts") = std::vector<TextTuple>(),
           py::arg("files_of_layers") = false)
      .def("layer_tensors", &layer_tensors, py::arg("layer"))
      .def_property_readonly("layer_count",
                             [](const Layout& layout) { return layout.layers().size(); })
      .def_property_readonly("total_bytes", &Layout::total_bytes)
      .def_property_readonly("open_blocks", &Layout::open_blocks);

  py::class_<Ticket, std::shared_ptr<Ticket>>(module, "Ticket")
      .def_property_readonly("name", &Ticket::name)
      .def_property_readonly("step", &Ticket::step)
      .def_property_readonly("save_id",
                             [](const Ticket& ticket) { return id_to(ticket.identity().save); })
      .def("hand_over", &Ticket::hand_over, py::arg("layer"), py::arg("tensors"))
      .def("add", &Ticket::add, py::arg("layout"), py::arg("tensors"))
      .def(
          "seal",
          [](Ticket& ticket, const py::bytes& manifest, const std::shared_ptr<Layout>& addition,
             const std::vector<at::Tensor>& tensors) { ticket.seal(manifest, addition, tensors); },
          py::arg("manifest"), py::arg("addition") = nullptr,
          py::arg("tensors") = std::vector<at::Tensor>())
      .def("leaves_time_to_update", &Ticket::leaves_time_to_update)
      .def("update_ended", &Ticket::update_ended)
      .def("abandon", &Ticket::abandon, py::arg("reason"))
      .def("open_gate", &Ticket::open_gate, py::arg("layer"))
      .def("open_all_gates", &Ticket::open_all_gates)
      .def_property_readonly("written_bytes", &Ticket::written_bytes)
      .def_property_readonly("payload_bytes", &Ticket::payload_bytes)
      .def("staged", &Ticket::staged)
      .def("layer_staged", &Ticket::layer_staged, py::arg("layer"))
      .def("wait_layer_staged", &Ticket::wait_layer_staged, py::arg("layer"),
           py::arg("timeout_s") = std::nullopt)
      .def("in_flight", &Ticket::in_flight)
      .def("committed", &Ticket::committed)
      .def("error", &Ticket::error)
      .def("wait", &Ticket::wait, py::arg("timeout_s") = std::nullopt);

  py::class_<Session>(module, "Session")
      .def(py::init(&open_session), py::arg("path"), py::kw_only(), py::arg("block_bytes"),
           py::arg("staging_bytes"), py::arg("writer_threads"), py::arg("max_in_flight"),
           py::arg("keep_last"), py::arg("keep_every") = 0, py::arg("lock_timeout_s"),
           py::arg("device") = "cpu", py::arg("manual_copier") = false,
           py::arg("verify_staged") = false, py::arg("monitor") = std::nullopt,
           py::arg("drain_timeout_s") = 60.0)
      .def(
          "begin",
          [](Session& session, const std::string& name, uint64_t step, const py::bytes& run_id,
             const py::bytes& save_id, const std::shared_ptr<Layout>& layout, bool during_update) {
            return session.begin(name, {step, id_from(run_id), id_from(save_id)}, layout,
                                 during_update);
          },
          py::arg("name"), py::arg("step"), py::arg("run_id"), py::arg("save_id"),
          py::arg("layout"), py::arg("during_update") = false, py::keep_alive<0, 1>())
      .def("set_aside_after", &Session::set_aside_after, py::arg("step"))
      .def("keep", &Session::keep, py::arg("steps"))
      .def("adopt_base", &Session::adopt_base, py::arg("reader"), py::arg("threads"))
      .def("close", &Session::close, py::arg("timeout_s") = std::nullopt)
      .def("leave", &Session::leave)
      .def_property_readonly("is_open", &Session::is_open)
      .def_property_readonly("path", &Session::path)
      .def("reap", &Session::reap)
      .def_property_readonly("monitor_process", &Session::monitor_process)
      .def("monitor_death", &Session::monitor_death)
      .def("restart_monitor", [](Session& session) { session.restart_monitor(look_for_signals); })
      .def("go_direct", [](Session& session) { session.go_direct(look_for_signals); })
      .def("stats", &session_stats)
      .def("take_complaint", &Session::take_complaint)
      .def(
          "release_copies",
          [](Session& session, uint64_t count) { session.manual_copier().release(count); },
          py::arg("count"))
      .def("release_all_copies", [](Session& session) { session.manual_copier().release_all(); })
      .def("copies_submitted",
           [](Session& session) { return session.manual_copier().submitted(); });
}

void bind_load(py::module_& module) {
  py::class_<CheckpointReader>(module, "Reader")
      .def(py::init<const std::string&, const std::string&>(), py::arg("run_path"), py::arg("name"))
      .def_property_readonly(
          "manifest", [](const CheckpointReader& reader) { return to_bytes(reader.manifest()); })
      .def_property_readonly(
          "step", [](const CheckpointReader& reader) { return reader.checksums().identity.step; })
      .def_property_readonly(
          "run_id",
          [](const CheckpointReader& reader) { return id_to(reader.checksums().identity.run); })
      .def_property_readonly(
          "save_id",
          [](const CheckpointReader& reader) { return id_to(reader.checksums().identity.save); })
      .def_property_readonly("files",
                             [](const CheckpointReader& reader) {
                               py::list files;
                               for (const FileSums& file : reader.checksums().files)
                                 files.append(py::make_tuple(file.name, file.size_bytes));
                               return files;
                             })
      .def_property_readonly("bytes_read", &CheckpointReader::bytes_read)
      .def_property_readonly(
          "block_bytes",
          [](const CheckpointReader& reader) { return reader.checksums().block_bytes; })
      .def(
          "block_sums",
          [](const CheckpointReader& reader, size_t file) {
            return reader.checksums().files.at(file).blocks;
          },
          py::arg("file"))
      .def("read_ahead", &CheckpointReader::read_ahead, py::arg("file"), py::arg("threads"),
           py::call_guard<py::gil_scoped_release>())
      .def("read", &read_into, py::arg("reads"), py::arg("threads"))
      .def("verify", &CheckpointReader::verify, py::arg("threads"),
           py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  py::register_local_exception_translator(&translate);
  py::register_exception_translator(&translate_own);
  bind_save(module);
  bind_load(module);
  bind_device_probes(module);
  module.def("built_with_cuda", &built_with_cuda);
  module.def(
      "dtype_name",
      [](const at::Tensor& tensor, const std::string& name) {
        return std::string(safetensors_dtype(tensor, name));
      },
      py::arg("tensor"), py::arg("name"));
  module.def("wait_chunks", &wait_chunks, py::arg("ticket"), py::arg("timeout_s") = std::nullopt);
  module.def("close_chunks", &close_chunks, py::call_guard<py::gil_scoped_release>());
}

}  // namespace pccheck::python
