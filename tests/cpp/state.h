// Tensors with contents, the layout they get, and what must come of them on disk, worked out from
// the places of the tensors alone: nothing here knows of runs, blocks in flight or slots.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cpp/checkpoint.h"
#include "cpp/format.h"
#include "cpp/layout.h"
#include "tests/cpp/bytes.h"
#include "tests/cpp/memory_disk.h"

namespace pccheck::test {

inline constexpr size_t kBlockBytes = kDirectAlignment;

struct State {
  std::shared_ptr<const Layout> layout;
  std::vector<std::vector<Bytes>> tensors;  // by layer, in the layer's order

  HandOver hand_over(size_t layer) const;
  Bytes file(size_t file) const;  // all of it, the header included
};

// The layout's tensors with random contents.
State fill(std::shared_ptr<const Layout> layout, Random& random);

// A layer of one F32 tensor for each count of elements, in one file.
std::vector<FileSpec> simple_files(const std::vector<uint64_t>& elements_of_layers);
State simple_state(const std::vector<uint64_t>& elements_of_layers, uint64_t seed = 1);

// One to three files, one to six layers; all widths of elements, tensors empty, without dimensions,
// or longer than a block; now and then a header longer than a block.
std::vector<FileSpec> random_files(Random& random, uint32_t layer_count, uint64_t most_elements);
State random_state(Random& random);

Identity identity_of(uint64_t step);

// Fails the running test unless `<path>` on the disk is exactly this checkpoint: its files, their
// checksums in checksums.bin, the manifest, and nothing else.
void expect_checkpoint(const MemoryDisk& disk, const std::string& path, const Identity& identity,
                       const State& state, const Bytes& manifest);

}  // namespace pccheck::test
