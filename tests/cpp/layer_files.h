// States whose layers have files of their own, for incremental saves.
#pragma once

#include <string>
#include <vector>

#include "tests/cpp/run_on_disk.h"

namespace pccheck::test {

inline constexpr const char* kIndexName = "model.safetensors.index.json";

inline std::string model_file(size_t layer) {
  return "model-" + std::to_string(layer) + ".safetensors";
}
inline std::string optimizer_file(size_t layer) {
  return "optimizer-" + std::to_string(layer) + ".safetensors";
}

// For each layer, of so many elements: a file of an F32, an F16 and an empty tensor; for every
// other one a second file; and an index.
inline std::vector<FileSpec> layer_files(const std::vector<uint64_t>& elements,
                                         const std::string& index = "{}") {
  std::vector<FileSpec> files;
  for (uint32_t layer = 0; layer < elements.size(); ++layer) {
    const uint64_t count = elements[layer];
    files.push_back({model_file(layer),
                     {{"format", "pt"}},
                     {{"weight", "F32", {count}, layer},
                      {"half", "F16", {count / 2}, layer},
                      {"none", "F32", {0}, layer}}});
    if (layer % 2 == 0)
      files.push_back({optimizer_file(layer), {}, {{"weight.m", "F32", {count}, layer}}});
  }
  files.push_back({kIndexName, {}, {}, index});
  return files;
}

inline std::shared_ptr<const Layout> layer_layout(const std::vector<FileSpec>& files,
                                                  uint32_t layer_count) {
  return Layout::make(
      files, {.block_bytes = kBlockBytes, .layer_count = layer_count, .files_of_layers = true});
}

inline State layer_state(const std::vector<uint64_t>& elements, uint64_t seed = 1) {
  Random random(seed);
  return fill(layer_layout(layer_files(elements), static_cast<uint32_t>(elements.size())), random);
}

// The same with one bit of one layer's first tensor that is not empty flipped.
inline State changed(State state, size_t layer, size_t bit = 3) {
  for (Bytes& tensor : state.tensors[layer]) {
    if (tensor.empty()) continue;
    flip_bit(tensor, bit % (8 * tensor.size()));
    return state;
  }
  return state;
}

}  // namespace pccheck::test
