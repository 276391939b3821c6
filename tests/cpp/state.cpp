#include "tests/cpp/state.h"

#include <gtest/gtest.h>

#include "cpp/crc32c.h"

namespace pccheck::test {

HandOver State::hand_over(size_t layer) const {
  HandOver hand_over;
  for (const Bytes& tensor : tensors[layer])
    hand_over.sources.push_back({tensor.data(), tensor.size()});
  return hand_over;
}

Bytes State::file(size_t index) const {
  const PayloadFile& plan = layout->files()[index];
  Bytes bytes = to_bytes(plan.header);
  bytes.resize(plan.size_bytes);
  for (size_t layer = 0; layer < layout->layers().size(); ++layer) {
    const std::vector<TensorRef>& refs = layout->layers()[layer].tensors;
    for (size_t t = 0; t < refs.size(); ++t)
      if (refs[t].file == index)
        std::ranges::copy(tensors[layer][t],
                          bytes.begin() + static_cast<ptrdiff_t>(layout->tensor(refs[t]).begin));
  }
  return bytes;
}

State fill(std::shared_ptr<const Layout> layout, Random& random) {
  State state{std::move(layout), {}};
  for (const LayerPlan& layer : state.layout->layers()) {
    state.tensors.emplace_back();
    for (const uint64_t bytes : layer.source_bytes)
      state.tensors.back().push_back(random_bytes(random, bytes));
  }
  return state;
}

std::vector<FileSpec> simple_files(const std::vector<uint64_t>& elements_of_layers) {
  FileSpec file{"model.safetensors", {}, {}};
  for (uint32_t layer = 0; layer < elements_of_layers.size(); ++layer)
    file.tensors.push_back(
        {"t" + std::to_string(layer), "F32", {elements_of_layers[layer]}, layer});
  return {file};
}

State simple_state(const std::vector<uint64_t>& elements_of_layers, uint64_t seed) {
  Random random(seed);
  return fill(Layout::make(simple_files(elements_of_layers),
                           {.block_bytes = kBlockBytes,
                            .layer_count = static_cast<uint32_t>(elements_of_layers.size())}),
              random);
}

std::vector<FileSpec> random_files(Random& random, uint32_t layer_count, uint64_t most_elements) {
  static const std::vector<std::string> dtypes = {"F64", "I64",  "F32",  "I32",     "F16",
                                                  "U16", "BF16", "BOOL", "F8_E4M3", "U8"};
  const auto name = [&](const std::string& stem) {
    return stem + std::string(below(random, 40) == 0 ? 2 * kBlockBytes : below(random, 30), 'n');
  };
  std::vector<FileSpec> files(1 + below(random, 3));
  for (size_t f = 0; f < files.size(); ++f) {
    files[f].name = "file" + std::to_string(f) + ".safetensors";
    if (below(random, 2) == 0) files[f].metadata = {{"format", "pt"}};
    for (uint64_t t = 0, count = below(random, 12); t < count; ++t) {
      std::vector<uint64_t> shape(below(random, 4));
      for (uint64_t& extent : shape) extent = below(random, 8) == 0 ? 0 : 1 + below(random, 4);
      if (!shape.empty() && shape[0] != 0) shape[0] = 1 + below(random, most_elements);
      files[f].tensors.push_back({name(std::to_string(t)), dtypes[below(random, dtypes.size())],
                                  shape, static_cast<uint32_t>(below(random, layer_count))});
    }
  }
  return files;
}

State random_state(Random& random) {
  const auto layers = static_cast<uint32_t>(1 + below(random, 6));
  const auto files = random_files(random, layers, 1 + below(random, 1500));
  return fill(Layout::make(files, {.block_bytes = kBlockBytes * (1 + below(random, 2)),
                                   .layer_count = layers}),
              random);
}

Identity identity_of(uint64_t step) {
  Identity identity{.step = step};
  identity.run.fill(std::byte{0x5a});
  identity.save.fill(static_cast<std::byte>(step));
  return identity;
}

void expect_checkpoint(const MemoryDisk& disk, const std::string& path, const Identity& identity,
                       const State& state, const Bytes& manifest) {
  const Layout& layout = *state.layout;
  ASSERT_TRUE(disk.exists(path)) << path;
  EXPECT_EQ(disk.names(path).size(), layout.files().size() + 2) << "strange files in " << path;
  EXPECT_EQ(disk.contents(path + "/" + kManifestName), manifest);
  const Checksums sums = decode_checksums(disk.contents(path + "/" + kChecksumsName));
  EXPECT_EQ(sums.identity.step, identity.step);
  EXPECT_EQ(sums.identity.run, identity.run);
  EXPECT_EQ(sums.identity.save, identity.save);
  EXPECT_EQ(sums.block_bytes, layout.block_bytes());
  EXPECT_EQ(sums.manifest_bytes, manifest.size());
  EXPECT_EQ(sums.manifest_crc, detail::crc32c_portable(0, manifest));
  ASSERT_EQ(sums.files.size(), layout.files().size());
  for (size_t f = 0; f < layout.files().size(); ++f) {
    const std::string& name = layout.files()[f].name;
    const Bytes expected = state.file(f);
    ASSERT_EQ(disk.contents(path + "/" + name), expected) << path << "/" << name;
    EXPECT_EQ(sums.files[f].name, name);
    EXPECT_EQ(sums.files[f].size_bytes, expected.size());
    std::vector<uint32_t> blocks;
    for (size_t at = 0; at < expected.size(); at += layout.block_bytes()) {
      const size_t size = std::min(layout.block_bytes(), expected.size() - at);
      blocks.push_back(detail::crc32c_portable(0, std::span(expected).subspan(at, size)));
    }
    ASSERT_EQ(sums.files[f].blocks, blocks) << path << "/" << name;
  }
}

}  // namespace pccheck::test
