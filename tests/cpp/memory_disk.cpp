#include "tests/cpp/memory_disk.h"

#include <cerrno>
#include <system_error>
#include <utility>

namespace pccheck::test {
namespace {

template <typename Map>
std::vector<std::string> keys(const Map& map) {
  std::vector<std::string> names;
  for (const auto& [name, node] : map) names.push_back(name);
  return names;
}

}  // namespace

void fail_operation(const Operation& operation, int error) {
  throw std::system_error(error, std::generic_category(), operation.call + " " + operation.path);
}

class MemoryFile final : public File {
 public:
  // `locked`: the lock this handle lets go of at its end.
  MemoryFile(MemoryDisk& disk, std::string path, std::shared_ptr<MemoryDisk::Node> node,
             bool locked)
      : disk_(disk), path_(std::move(path)), node_(std::move(node)), locked_(locked) {
    ++disk_.handles_;
  }

  ~MemoryFile() override {
    const std::lock_guard lock(disk_.mutex_);
    if (locked_) node_->locked = false;
    --disk_.handles_;
  }

  void pread(std::span<std::byte> into, uint64_t offset) override {
    const Operation operation{"pread", path_, {}, offset, into.size()};
    disk_.begin(operation);
    const std::lock_guard lock(disk_.mutex_);
    if (offset > node_->bytes.size() || into.size() > node_->bytes.size() - offset)
      fail_operation(operation, EIO);
    std::ranges::copy(std::span(node_->bytes).subspan(offset, into.size()), into.begin());
  }

  void pwrite(std::span<const std::byte> from, uint64_t offset) override {
    disk_.begin({"pwrite", path_, {}, offset, from.size()});
    const std::lock_guard lock(disk_.mutex_);
    if (node_->bytes.size() < offset + from.size()) node_->bytes.resize(offset + from.size());
    std::ranges::copy(from, node_->bytes.begin() + static_cast<ptrdiff_t>(offset));
    node_->is_unsynced = true;
  }

  void allocate(uint64_t size_bytes) override {
    disk_.begin({"allocate", path_, {}, 0, size_bytes});
    const std::lock_guard lock(disk_.mutex_);
    node_->bytes.resize(size_bytes);
    node_->is_unsynced = true;
  }

  void sync_data() override {
    disk_.begin({"sync_data", path_});
    const std::lock_guard lock(disk_.mutex_);
    node_->is_unsynced = false;
  }

  uint64_t size_bytes() override {
    disk_.begin({"size_bytes", path_});
    const std::lock_guard lock(disk_.mutex_);
    return node_->bytes.size();
  }

  bool is_direct() const override { return false; }

 private:
  MemoryDisk& disk_;
  const std::string path_;
  const std::shared_ptr<MemoryDisk::Node> node_;
  const bool locked_;
};

class MemoryDirectory final : public Directory {
 public:
  MemoryDirectory(MemoryDisk& disk, std::string path, std::shared_ptr<MemoryDisk::Node> node)
      : disk_(disk), path_(std::move(path)), node_(std::move(node)) {
    ++disk_.handles_;
  }

  ~MemoryDirectory() override {
    const std::lock_guard lock(disk_.mutex_);
    let_go();
    --disk_.handles_;
  }

  const std::string& path() const override { return path_; }

  std::vector<Entry> list() override {
    disk_.begin({"list", path_});
    const std::lock_guard lock(disk_.mutex_);
    std::vector<Entry> entries;
    for (const auto& [name, node] : node_->entries)
      entries.push_back({name, node->is_directory ? EntryKind::directory : EntryKind::file});
    return entries;
  }

  std::unique_ptr<File> open_file(const std::string& name) override {
    const Operation operation = begin("open_file", name);
    const std::lock_guard lock(disk_.mutex_);
    return std::make_unique<MemoryFile>(disk_, operation.path, entry(operation, name), false);
  }

  std::unique_ptr<File> create_file(const std::string& name) override {
    const Operation operation = begin("create_file", name);
    const std::lock_guard lock(disk_.mutex_);
    const auto node = add(operation, name, false);
    node->is_unsynced = node->locked = true;
    return std::make_unique<MemoryFile>(disk_, operation.path, node, true);
  }

  std::unique_ptr<File> reuse_file(const std::string& name) override {
    const Operation operation = begin("reuse_file", name);
    const std::lock_guard lock(disk_.mutex_);
    const auto found = node_->entries.find(name);
    if (found == node_->entries.end() || found->second->is_directory || found->second->held_open ||
        found->second->locked || found->second->links != 1)
      return nullptr;
    found->second->locked = true;
    return std::make_unique<MemoryFile>(disk_, operation.path, found->second, true);
  }

  Link link_file(const std::string& name, Directory& from, uint64_t size_bytes) override {
    auto& other = dynamic_cast<MemoryDirectory&>(from);
    const Operation operation = {"link_file", other.path_ + "/" + name, path_ + "/" + name};
    disk_.begin(operation);
    const std::lock_guard lock(disk_.mutex_);
    const auto wanted = other.node_->entries.find(name);
    if (wanted == other.node_->entries.end() || wanted->second->is_directory ||
        wanted->second->bytes.size() != size_bytes)
      return Link::impossible;
    if (const auto there = node_->entries.find(name); there != node_->entries.end()) {
      if (there->second == wanted->second) return Link::was_there;
      unlink(operation, name);
    }
    if (wanted->second->links >= disk_.most_links) return Link::impossible;
    ++wanted->second->links;
    node_->entries[name] = wanted->second;
    return Link::made;
  }

  std::unique_ptr<Directory> open_directory(const std::string& name) override {
    const Operation operation = begin("open_directory", name);
    const std::lock_guard lock(disk_.mutex_);
    const auto node = entry(operation, name);
    if (!node->is_directory) fail_operation(operation, ENOTDIR);
    return std::make_unique<MemoryDirectory>(disk_, operation.path, node);
  }

  std::unique_ptr<Directory> create_directory(const std::string& name) override {
    const Operation operation = begin("create_directory", name);
    const std::lock_guard lock(disk_.mutex_);
    return std::make_unique<MemoryDirectory>(disk_, operation.path, add(operation, name, true));
  }

  bool exists(const std::string& name) override {
    begin("exists", name);
    const std::lock_guard lock(disk_.mutex_);
    return node_->entries.contains(name);
  }

  void rename(const std::string& from, const std::string& to) override {
    const Operation operation = begin("rename", from, to);
    const std::lock_guard lock(disk_.mutex_);
    if (node_->entries.contains(to)) fail_operation(operation, EEXIST);
    move(operation, from, to);
  }

  void replace(const std::string& from, const std::string& to) override {
    const Operation operation = begin("replace", from, to);
    const std::lock_guard lock(disk_.mutex_);
    move(operation, from, to);
  }

  void remove_file(const std::string& name) override {
    const Operation operation = begin("remove_file", name);
    const std::lock_guard lock(disk_.mutex_);
    unlink(operation, name);
  }

  void remove_directory(const std::string& name) override {
    const Operation operation = begin("remove_directory", name);
    const std::lock_guard lock(disk_.mutex_);
    if (!entry(operation, name)->entries.empty()) fail_operation(operation, ENOTEMPTY);
    node_->entries.erase(name);
  }

  void sync() override {
    disk_.begin({"sync", path_});
    const std::lock_guard lock(disk_.mutex_);
    node_->durable = node_->entries;
  }

  bool try_lock(LockMode mode) override {
    disk_.begin({"try_lock", path_});
    const std::lock_guard lock(disk_.mutex_);
    let_go();  // as flock does: the old lock is gone even where the new one is refused
    if (node_->locked || (mode == LockMode::exclusive && node_->shared_locks > 0)) return false;
    if (mode == LockMode::exclusive)
      node_->locked = exclusive_ = true;
    else
      node_->shared_locks += (shared_ = true);
    return true;
  }

  void unlock() override {
    disk_.begin({"unlock", path_});
    const std::lock_guard lock(disk_.mutex_);
    let_go();
  }

  bool leads_to(const std::string& name, Directory& child) override {
    begin("leads_to", name);
    const std::lock_guard lock(disk_.mutex_);
    const auto found = node_->entries.find(name);
    return found != node_->entries.end() &&
           found->second == dynamic_cast<MemoryDirectory&>(child).node_;
  }

  std::unique_ptr<File> try_lock_file(const std::string& name) override {
    const Operation operation = begin("try_lock_file", name);
    const std::lock_guard lock(disk_.mutex_);
    std::shared_ptr<MemoryDisk::Node>& node = node_->entries[name];
    if (!node) node = std::make_shared<MemoryDisk::Node>();
    if (node->locked) return nullptr;
    node->locked = true;
    return std::make_unique<MemoryFile>(disk_, operation.path, node, true);
  }

 private:
  Operation begin(const char* call, const std::string& name, const std::string& to = {}) {
    Operation operation{call, path_ + "/" + name, to.empty() ? "" : path_ + "/" + to};
    disk_.begin(operation);
    return operation;
  }

  std::shared_ptr<MemoryDisk::Node> entry(const Operation& operation, const std::string& name) {
    const auto found = node_->entries.find(name);
    if (found == node_->entries.end()) fail_operation(operation, ENOENT);
    return found->second;
  }

  std::shared_ptr<MemoryDisk::Node> add(const Operation& operation, const std::string& name,
                                        bool is_directory) {
    if (node_->entries.contains(name)) fail_operation(operation, EEXIST);
    auto node = std::make_shared<MemoryDisk::Node>(MemoryDisk::Node{.is_directory = is_directory});
    node_->entries[name] = node;
    return node;
  }

  void unlink(const Operation& operation, const std::string& name) {
    const auto node = entry(operation, name);
    if (node->is_directory) fail_operation(operation, EISDIR);
    --node->links;
    node_->entries.erase(name);
  }

  void move(const Operation& operation, const std::string& from, const std::string& to) {
    const auto node = entry(operation, from);
    if (node_->entries.contains(to)) unlink(operation, to);
    node_->entries.erase(from);
    node_->entries[to] = node;
  }

  void let_go() {
    if (std::exchange(exclusive_, false)) node_->locked = false;
    if (std::exchange(shared_, false)) --node_->shared_locks;
  }

  MemoryDisk& disk_;
  const std::string path_;
  const std::shared_ptr<MemoryDisk::Node> node_;
  bool exclusive_ = false;
  bool shared_ = false;
};

MemoryDisk::MemoryDisk() : root_(std::make_shared<Node>(Node{.is_directory = true})) {}

MemoryDisk::~MemoryDisk() = default;

std::unique_ptr<Directory> MemoryDisk::root() {
  const std::lock_guard lock(mutex_);
  return std::make_unique<MemoryDirectory>(*this, kRoot, root_);
}

void MemoryDisk::begin(Operation operation) {
  {
    const std::lock_guard lock(mutex_);
    log_.push_back(operation);
  }
  if (before) before(operation);
}

std::vector<Operation> MemoryDisk::log() const {
  const std::lock_guard lock(mutex_);
  return log_;
}

size_t MemoryDisk::operations() const {
  const std::lock_guard lock(mutex_);
  return log_.size();
}

size_t MemoryDisk::open_handles() const {
  const std::lock_guard lock(mutex_);
  return handles_;
}

std::shared_ptr<MemoryDisk::Node> MemoryDisk::find(const std::string& path) const {
  std::shared_ptr<Node> node = root_;
  for (size_t at = std::string_view(kRoot).size(); at < path.size();) {
    const size_t end = std::min(path.find('/', at + 1), path.size());
    const auto found = node->entries.find(path.substr(at + 1, end - at - 1));
    if (found == node->entries.end()) fail_operation({"find", path}, ENOENT);
    node = found->second;
    at = end;
  }
  return node;
}

bool MemoryDisk::exists(const std::string& path) const {
  const std::lock_guard lock(mutex_);
  try {
    find(path);
    return true;
  } catch (const std::system_error&) {
    return false;
  }
}

Bytes MemoryDisk::contents(const std::string& path) const {
  const std::lock_guard lock(mutex_);
  return find(path)->bytes;
}

std::vector<std::string> MemoryDisk::names(const std::string& path) const {
  const std::lock_guard lock(mutex_);
  return keys(find(path)->entries);
}

std::vector<std::string> MemoryDisk::durable_names(const std::string& path) const {
  const std::lock_guard lock(mutex_);
  return keys(find(path)->durable);
}

std::vector<std::string> MemoryDisk::unsynced(const std::string& path) const {
  const std::lock_guard lock(mutex_);
  std::vector<std::string> found;
  collect_unsynced(*find(path), path, found);
  return found;
}

void MemoryDisk::collect_unsynced(const Node& node, const std::string& path,
                                  std::vector<std::string>& found) {
  if (node.is_directory ? node.entries != node.durable : node.is_unsynced) found.push_back(path);
  for (const auto& [name, child] : node.entries) collect_unsynced(*child, path + "/" + name, found);
}

const void* MemoryDisk::identity(const std::string& path) const {
  const std::lock_guard lock(mutex_);
  return find(path).get();
}

void MemoryDisk::put(const std::string& path, const Bytes& bytes) {
  const std::lock_guard lock(mutex_);
  std::shared_ptr<Node> node = root_;
  for (size_t at = std::string_view(kRoot).size(); at < path.size();) {
    const size_t end = std::min(path.find('/', at + 1), path.size());
    std::shared_ptr<Node>& next = node->entries[path.substr(at + 1, end - at - 1)];
    if (!next) next = std::make_shared<Node>(Node{.is_directory = end < path.size()});
    node->durable = node->entries;
    node = next;
    at = end;
  }
  node->bytes = bytes;
}

size_t MemoryDisk::links(const std::string& path) const {
  const std::lock_guard lock(mutex_);
  return find(path)->links;
}

void MemoryDisk::hold_open(const std::string& path) {
  const std::lock_guard lock(mutex_);
  find(path)->held_open = true;
}

}  // namespace pccheck::test
