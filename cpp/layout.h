// Where every tensor of a checkpoint stands in its payload files, decided before a byte is written.
//
// A payload file is a safetensors file: 8 bytes of header length, a JSON header padded with spaces,
// the tensors without holes. Tensors of wider elements come first (so every tensor is aligned
// without padding), within one width they stand in layer order: a save that follows the layers
// fills each width's range from front to back. The file is divided into blocks of fixed size, the
// unit of one write and one checksum. See format.md.
//
// A Layout is immutable and shared by all checkpoints of the same set of tensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace pccheck {

// Bytes of one element of a safetensors dtype ("F32" -> 4); 0 where the name is not one we store.
size_t dtype_bytes(std::string_view safetensors_dtype);

struct TensorSpec {
  std::string name;
  std::string dtype;  // as safetensors names it
  std::vector<uint64_t> shape;
  uint32_t layer;  // 0 .. layer_count-1
};

struct FileSpec {
  std::string name;  // inside the checkpoint's directory
  std::vector<std::pair<std::string, std::string>> metadata;
  std::vector<TensorSpec> tensors;
  // If not empty: all that the file holds, word for word; it has no tensors and is no safetensors.
  std::string text = {};
};

struct TensorExtent {
  TensorSpec spec;
  uint64_t begin;  // from the start of the file
  uint64_t bytes;
};

struct PayloadFile {
  std::string name;
  // Length prefix, JSON and padding: the bytes before the first tensor. Or a text, and nothing
  // else.
  std::string header;
  uint64_t grid_begin;  // where block 0 begins: 0, or data_begin() where the header is not staged
  uint64_t size_bytes;
  std::vector<TensorExtent> tensors;  // in the order they were given

  uint64_t data_begin() const { return header.size(); }
};

// A range of one tensor to be copied to one place.
struct Run {
  uint32_t file;
  uint32_t source;  // index among the layer's tensors
  uint64_t source_offset;
  uint64_t begin;  // in the file
  uint64_t bytes;
};

struct TensorRef {
  uint32_t file;
  uint32_t tensor;
};

struct LayerPlan {
  std::vector<TensorRef> tensors;      // in the order they were given
  std::vector<uint64_t> source_bytes;  // of each
  std::vector<Run> runs;               // in the order they are staged
  std::vector<uint32_t> files;         // whose headers are staged with it
};

struct LayoutOptions {
  size_t block_bytes;
  uint32_t layer_count;
  // Chunks: staging visits this many contiguous ranges of each file in turn. With more than one,
  // all tensors must be of one layer.
  uint32_t chunk_count = 1;
  // For a file that stands alone, without checksums.bin beside it: reserves room in the header for
  // the checksums and leaves the header out of the blocks.
  bool checksums_in_header = false;
  // Each file belongs wholly to one layer (those without tensors to the first): a file that has not
  // changed can be left out of a save, and be what another checkpoint has. Staging fills one file
  // after the other. Otherwise all headers come with the first layer.
  bool files_of_layers = false;
};

class Layout {
 public:
  // Throws std::invalid_argument naming the tensor or argument that cannot be.
  static std::shared_ptr<const Layout> make(std::vector<FileSpec> files, LayoutOptions options);

  // The layout of a checkpoint that another process stages: files and their blocks, of which only
  // names and sizes are known, and no layers.
  static std::shared_ptr<const Layout> of_files(std::vector<PayloadFile> files, size_t block_bytes);

  size_t block_bytes() const { return options_.block_bytes; }
  bool files_of_layers() const { return options_.files_of_layers; }
  const std::vector<PayloadFile>& files() const { return files_; }
  const std::vector<LayerPlan>& layers() const { return layers_; }
  const TensorExtent& tensor(TensorRef ref) const { return files_[ref.file].tensors[ref.tensor]; }
  uint64_t total_bytes() const;

  // Slots that blocks still being filled may hold at the same time; staging needs at least these.
  size_t open_blocks() const { return open_blocks_; }

  uint64_t block_count(size_t file) const;
  uint64_t block_offset(size_t file, uint64_t block) const;
  size_t block_size(size_t file, uint64_t block) const;  // the last one may be short

 private:
  explicit Layout(LayoutOptions options) : options_(options) {}
  void add_file(FileSpec spec);
  void add_text(FileSpec spec);
  uint32_t home_of(const PayloadFile& file) const;
  void plan_layers();
  void interleave_chunks();

  const LayoutOptions options_;
  std::vector<PayloadFile> files_;
  std::vector<LayerPlan> layers_;
  size_t open_blocks_ = 0;
};

}  // namespace pccheck
