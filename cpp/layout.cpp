#include "cpp/layout.h"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <set>
#include <stdexcept>

#include "cpp/file.h"
#include "cpp/safetensors.h"

namespace pccheck {
namespace {

struct DType {
  std::string_view name;
  size_t bytes;
};

constexpr std::array<DType, 16> kDTypes = {{{"F64", 8},
                                            {"I64", 8},
                                            {"U64", 8},
                                            {"C64", 8},
                                            {"F32", 4},
                                            {"I32", 4},
                                            {"U32", 4},
                                            {"F16", 2},
                                            {"BF16", 2},
                                            {"I16", 2},
                                            {"U16", 2},
                                            {"F8_E4M3", 1},
                                            {"F8_E5M2", 1},
                                            {"I8", 1},
                                            {"U8", 1},
                                            {"BOOL", 1}}};

uint64_t checked_bytes(const TensorSpec& spec) {
  uint64_t bytes = dtype_bytes(spec.dtype);
  if (bytes == 0)
    throw std::invalid_argument("tensor '" + spec.name + "' has dtype '" + spec.dtype +
                                "', which safetensors cannot hold");
  // Any zero makes the tensor empty, whatever the other dimensions multiply to.
  if (std::find(spec.shape.begin(), spec.shape.end(), 0u) != spec.shape.end()) return 0;
  for (const uint64_t extent : spec.shape) {
    if (extent > std::numeric_limits<int64_t>::max() / bytes)
      throw std::invalid_argument("tensor '" + spec.name + "' is larger than any file");
    bytes *= extent;
  }
  return bytes;
}

}  // namespace

size_t dtype_bytes(std::string_view name) {
  for (const DType& dtype : kDTypes)
    if (dtype.name == name) return dtype.bytes;
  return 0;
}

std::shared_ptr<const Layout> Layout::make(std::vector<FileSpec> files, LayoutOptions options) {
  if (options.block_bytes == 0 || options.block_bytes % kDirectAlignment != 0)
    throw std::invalid_argument("block size of " + std::to_string(options.block_bytes) +
                                " bytes is not a multiple of " + std::to_string(kDirectAlignment));
  if (options.block_bytes > (size_t{1} << 30))
    throw std::invalid_argument("block size of " + std::to_string(options.block_bytes) +
                                " bytes is more than 1 GiB");
  if (options.chunk_count == 0) throw std::invalid_argument("chunk count must be at least 1");
  if (options.chunk_count > 1 && options.layer_count > 1)
    throw std::invalid_argument("chunks divide a save of the whole state, not one by layers");
  if (options.chunk_count > 1 && options.files_of_layers)
    throw std::invalid_argument("chunks divide files, not layers that have files of their own");
  if (options.layer_count == 0 && !files.empty())  // no layer would ever bring their headers
    throw std::invalid_argument("a layout of files must have at least 1 layer");
  std::shared_ptr<Layout> layout(new Layout(options));
  for (FileSpec& file : files)
    if (file.text.empty())
      layout->add_file(std::move(file));
    else
      layout->add_text(std::move(file));
  layout->plan_layers();
  if (options.chunk_count > 1) layout->interleave_chunks();
  return layout;
}

std::shared_ptr<const Layout> Layout::of_files(std::vector<PayloadFile> files, size_t block_bytes) {
  if (block_bytes == 0 || block_bytes % kDirectAlignment != 0)
    throw std::invalid_argument("block size of " + std::to_string(block_bytes) +
                                " bytes is not a multiple of " + std::to_string(kDirectAlignment));
  for (const PayloadFile& file : files)
    if (file.grid_begin > file.size_bytes)
      throw std::invalid_argument("file " + file.name + " ends before its blocks begin");
  std::shared_ptr<Layout> layout(new Layout({.block_bytes = block_bytes, .layer_count = 0}));
  layout->files_ = std::move(files);
  return layout;
}

void Layout::add_text(FileSpec spec) {
  if (!spec.tensors.empty() || !spec.metadata.empty() || options_.checksums_in_header)
    throw std::invalid_argument(spec.name + " is a text and can hold nothing else");
  PayloadFile file{.name = std::move(spec.name),
                   .header = std::move(spec.text),
                   .grid_begin = 0,
                   .size_bytes = 0,
                   .tensors = {}};
  file.size_bytes = file.header.size();
  files_.push_back(std::move(file));
}

void Layout::add_file(FileSpec spec) {
  PayloadFile file{
      .name = std::move(spec.name), .header = {}, .grid_begin = 0, .size_bytes = 0, .tensors = {}};
  std::set<std::string_view> names;
  for (const TensorSpec& tensor : spec.tensors) {
    if (tensor.layer >= options_.layer_count)
      throw std::invalid_argument("tensor '" + tensor.name + "' is of layer " +
                                  std::to_string(tensor.layer) + " of " +
                                  std::to_string(options_.layer_count));
    if (tensor.name == "__metadata__")
      throw std::invalid_argument(
          "a tensor cannot be called '__metadata__': safetensors keeps that name for itself");
    if (!names.insert(tensor.name).second)
      throw std::invalid_argument("two tensors are called '" + tensor.name + "' in " + file.name);
  }
  std::vector<size_t> order(spec.tensors.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    const size_t wide_a = dtype_bytes(spec.tensors[a].dtype);
    const size_t wide_b = dtype_bytes(spec.tensors[b].dtype);
    if (wide_a != wide_b) return wide_a > wide_b;
    return spec.tensors[a].layer < spec.tensors[b].layer;
  });
  uint64_t data_bytes = 0;
  file.tensors.resize(spec.tensors.size());
  std::set<size_t> widths;
  for (const size_t i : order) {
    const uint64_t bytes = checked_bytes(spec.tensors[i]);
    if (bytes > 0) widths.insert(dtype_bytes(spec.tensors[i].dtype));
    if (data_bytes + bytes > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) / 2)
      throw std::invalid_argument(file.name + " would be larger than any file may be");
    file.tensors[i] = {std::move(spec.tensors[i]), data_bytes, bytes};  // relative for the moment
    data_bytes += bytes;
  }
  // One block is open at the end of each width's filled range; the block two widths share stays
  // open, besides, until the wider one has reached it. A layer's own files are filled from front to
  // back, one after the other.
  if (!widths.empty())
    open_blocks_ = options_.files_of_layers ? 1 : open_blocks_ + 2 * widths.size() - 1;

  safetensors::HeaderRequest request{.metadata = std::move(spec.metadata),
                                     .tensors = file.tensors,
                                     .order = order,
                                     .data_bytes = data_bytes,
                                     .block_bytes = options_.block_bytes,
                                     .with_checksums = options_.checksums_in_header};
  file.header = safetensors::make_header(request);
  for (TensorExtent& extent : file.tensors) extent.begin += file.data_begin();
  file.size_bytes = file.data_begin() + data_bytes;
  file.grid_begin = options_.checksums_in_header ? file.data_begin() : 0;
  files_.push_back(std::move(file));
}

// The layer that a file's header is staged with.
uint32_t Layout::home_of(const PayloadFile& file) const {
  if (!options_.files_of_layers || file.tensors.empty()) return 0;
  const uint32_t layer = file.tensors.front().spec.layer;
  for (const TensorExtent& tensor : file.tensors)
    if (tensor.spec.layer != layer)
      throw std::invalid_argument(file.name + " has tensors of layers " + std::to_string(layer) +
                                  " and " + std::to_string(tensor.spec.layer) +
                                  ": it is to belong to one");
  return layer;
}

void Layout::plan_layers() {
  layers_.resize(options_.layer_count);
  for (uint32_t f = 0; f < files_.size(); ++f) {
    layers_[home_of(files_[f])].files.push_back(f);
    for (uint32_t t = 0; t < files_[f].tensors.size(); ++t) {
      const TensorExtent& extent = files_[f].tensors[t];
      LayerPlan& layer = layers_[extent.spec.layer];
      const auto source = static_cast<uint32_t>(layer.source_bytes.size());
      layer.tensors.push_back({f, t});
      layer.source_bytes.push_back(extent.bytes);
      if (extent.bytes > 0) layer.runs.push_back({f, source, 0, extent.begin, extent.bytes});
    }
  }
  // In file order, so that a block is filled, and can be summed, from front to back.
  for (LayerPlan& layer : layers_)
    std::stable_sort(layer.runs.begin(), layer.runs.end(), [](const Run& a, const Run& b) {
      return a.file != b.file ? a.file < b.file : a.begin < b.begin;
    });
}

void Layout::interleave_chunks() {
  // Cut at the borders of blocks, then deal out: first block of every chunk, second of every
  // chunk...
  struct Keyed {
    uint64_t round, chunk;
    Run run;
  };
  for (LayerPlan& layer : layers_) {
    std::vector<Keyed> cut;
    for (Run run : layer.runs) {
      const PayloadFile& file = files_[run.file];
      const uint64_t blocks = block_count(run.file);
      const uint64_t per_chunk = (blocks + options_.chunk_count - 1) / options_.chunk_count;
      while (run.bytes > 0) {
        const uint64_t block = (run.begin - file.grid_begin) / options_.block_bytes;
        const uint64_t end = block_offset(run.file, block) + block_size(run.file, block);
        Run part = run;
        part.bytes = std::min(run.bytes, end - run.begin);
        cut.push_back({block % per_chunk, block / per_chunk, part});
        run.begin += part.bytes;
        run.source_offset += part.bytes;
        run.bytes -= part.bytes;
      }
    }
    std::stable_sort(cut.begin(), cut.end(), [](const Keyed& a, const Keyed& b) {
      if (a.run.file != b.run.file) return a.run.file < b.run.file;
      return a.round != b.round ? a.round < b.round : a.chunk < b.chunk;
    });
    layer.runs.clear();
    for (const Keyed& keyed : cut) layer.runs.push_back(keyed.run);
  }
}

uint64_t Layout::total_bytes() const {
  uint64_t total = 0;
  for (const PayloadFile& file : files_) total += file.size_bytes;
  return total;
}

uint64_t Layout::block_count(size_t file) const {
  const uint64_t bytes = files_[file].size_bytes - files_[file].grid_begin;
  return (bytes + options_.block_bytes - 1) / options_.block_bytes;
}

uint64_t Layout::block_offset(size_t file, uint64_t block) const {
  return files_[file].grid_begin + block * options_.block_bytes;
}

size_t Layout::block_size(size_t file, uint64_t block) const {
  return static_cast<size_t>(std::min<uint64_t>(
      options_.block_bytes, files_[file].size_bytes - block_offset(file, block)));
}

}  // namespace pccheck
