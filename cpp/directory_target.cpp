// Committing a checkpoint as a directory: everything durable under `<name>.partial`, then the
// rename. The order of the steps is the guarantee; each is explained where it stands.
#include <algorithm>

#include "cpp/crc32c.h"
#include "cpp/run_directory.h"

namespace pccheck {
namespace {

class DirectoryTarget final : public Target {
 public:
  DirectoryTarget(std::shared_ptr<RunDirectory> run, std::string name)
      : run_(std::move(run)), name_(std::move(name)) {}

  std::unique_ptr<File> open(const PayloadFile& plan) override {
    prepare();
    return reuse_or_create(plan.name, plan.size_bytes);
  }

  std::optional<std::vector<uint32_t>> link(const Layout& layout, const PayloadFile& plan,
                                            const std::string& from,
                                            const Digest& digest) override {
    prepare();
    auto linked = run_->link(from, plan, layout.block_bytes(), digest, *directory_);
    if (!linked) return std::nullopt;
    entries_changed_ = entries_changed_ || linked->made;
    return std::move(linked->block_sums);
  }

  std::unique_ptr<File> open_manifest(size_t bytes) override {
    prepare();  // a checkpoint without a single tensor has not opened anything
    return reuse_or_create(kManifestName, bytes);
  }

  void publish(const Identity& identity, std::vector<PersistedFile>& files,
               std::span<const std::byte> manifest) override {
    Checksums checksums{.identity = identity,
                        .block_bytes = 0,
                        .manifest_bytes = manifest.size(),
                        .manifest_crc = crc32c(0, manifest),
                        .files = {}};
    for (PersistedFile& file : files) {
      checksums.block_bytes = file.layout->block_bytes();
      checksums.files.push_back(
          {file.plan->name, file.plan->size_bytes, file.block_sums, file.digest});
    }
    if (files.empty()) checksums.block_bytes = kDirectAlignment;
    remove_strangers(files);
    const std::vector<std::byte> sums = encode(checksums);
    const std::unique_ptr<File> sums_file = reuse_or_create(kChecksumsName, sums.size());
    sums_file->pwrite(sums, 0);
    sums_file->sync_data();
    // A recycled directory's entries are durable already.
    if (entries_changed_) directory_->sync();
    run_->publish(name_, *directory_);
  }

  void discard() override {
    if (!directory_) return;  // never begun: what bears its name is not its own
    directory_.reset();
    run_->discard(name_);
  }

  void retire() override {
    directory_.reset();
    run_->retire();
  }

 private:
  void prepare() {
    if (directory_) return;
    RunDirectory::Partial partial = run_->prepare(name_);
    directory_ = std::move(partial.directory);
    recycled_ = partial.recycled;
  }

  std::unique_ptr<File> reuse_or_create(const std::string& name, uint64_t bytes) {
    std::unique_ptr<File> file;
    if (recycled_ && directory_->exists(name)) {
      file = directory_->reuse_file(name);
      if (!file) directory_->remove_file(name);  // whoever still reads it keeps its own copy
    }
    if (!file) {
      file = directory_->create_file(name);
      entries_changed_ = true;
    }
    // A recycled file of the right size has its blocks already; that is what makes it fast.
    if (file->size_bytes() != bytes) file->allocate(bytes);
    return file;
  }

  // A recycled directory may hold a file that this checkpoint has not.
  void remove_strangers(const std::vector<PersistedFile>& files) {
    if (!recycled_) return;
    for (const Entry& entry : directory_->list()) {
      const bool ours = entry.name == kManifestName || entry.name == kChecksumsName ||
                        std::ranges::any_of(files, [&](const PersistedFile& file) {
                          return file.plan->name == entry.name;
                        });
      if (ours) continue;
      directory_->remove_file(entry.name);
      entries_changed_ = true;
    }
  }

  const std::shared_ptr<RunDirectory> run_;
  const std::string name_;
  std::unique_ptr<Directory> directory_;
  bool recycled_ = false;
  bool entries_changed_ = false;
};

}  // namespace

std::unique_ptr<Target> make_directory_target(std::shared_ptr<RunDirectory> run, std::string name) {
  return std::make_unique<DirectoryTarget>(std::move(run), std::move(name));
}

}  // namespace pccheck
