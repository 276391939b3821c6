#include "cpp/run_directory.h"

#include <algorithm>
#include <cerrno>
#include <exception>
#include <system_error>
#include <thread>

namespace pccheck {
namespace {

constexpr std::string_view kStepPrefix = "step-";
constexpr size_t kStepDigits = 8;

// What we put into checkpoint directories. A directory that holds anything else is not ours to
// remove or to write into, whatever it is called.
bool is_checkpoint_file(const Entry& entry) {
  return entry.kind == EntryKind::file &&
         (entry.name == kManifestName || entry.name == kChecksumsName ||
          entry.name.ends_with(".safetensors") || entry.name.ends_with(".safetensors.index.json"));
}

bool holds_only_checkpoint_files(Directory& directory) {
  return std::ranges::all_of(directory.list(), is_checkpoint_file);
}

}  // namespace

std::optional<uint64_t> step_of_name(const std::string& name) {
  if (!name.starts_with(kStepPrefix)) return std::nullopt;
  const std::string digits = name.substr(kStepPrefix.size());
  const bool plain = digits.size() >= kStepDigits && digits.size() <= 18 &&
                     digits.find_first_not_of("0123456789") == std::string::npos;
  if (!plain || (digits.size() > kStepDigits && digits[0] == '0')) return std::nullopt;
  return std::stoull(digits);
}

std::string name_of_step(uint64_t step) {
  std::string digits = std::to_string(step);
  if (digits.size() < kStepDigits) digits.insert(0, kStepDigits - digits.size(), '0');
  return std::string(kStepPrefix) + digits;
}

RunDirectory::RunDirectory(std::unique_ptr<Directory> directory, std::unique_ptr<File> lock,
                           Options options)
    : directory_(std::move(directory)), lock_(std::move(lock)), options_(options) {
  directory_->sync();
  for (const Entry& entry : directory_->list()) {
    if (entry.kind != EntryKind::directory) continue;
    if (const auto step = step_of_name(entry.name)) committed_.insert(*step);
    if (entry.name.ends_with(kPartialSuffix)) reclaim(entry.name);
  }
}

void RunDirectory::reclaim(const std::string& name) {
  std::unique_ptr<Directory> found = directory_->open_directory(name);
  // Locked: a write of the process that died is still under way. It keeps its directory.
  if (!holds_only_checkpoint_files(*found) || !found->try_lock(LockMode::exclusive)) return;
  found->sync();  // whoever recycles it counts on its entries
  if (spares_.size() < options_.max_spares)
    spares_.push_back({name, std::move(found)});
  else
    remove_tree(*directory_, name);
}

RunDirectory::Partial RunDirectory::prepare(const std::string& name) {
  const std::lock_guard lock(mutex_);
  if (directory_->exists(name) || under_way_.contains(name))
    throw std::system_error(EEXIST, std::generic_category(),
                            "checkpoint " + path() + "/" + name + " exists already");
  const std::string partial = name + kPartialSuffix;
  // One that bears the name already comes first: the name must come free in any case.
  auto spare = std::ranges::find(spares_, partial, &Spare::name);
  if (spare == spares_.end()) {
    if (directory_->exists(partial)) set_aside(partial);  // not ours, see reclaim()
    spare = spares_.begin();
  }
  if (spare != spares_.end()) {
    if (spare->name != partial) {
      directory_->rename(spare->name, partial);
      spare->name = partial;
    }
    // Opened again for its new path, which errors will name. The lock moves over without a gap that
    // matters: nobody but the holder of .lock locks a partial directory exclusively.
    std::unique_ptr<Directory> opened = directory_->open_directory(partial);
    spare->directory.reset();
    const bool locked = opened->try_lock(LockMode::exclusive);
    spares_.erase(spare);
    if (locked) {
      under_way_.insert(name);
      return {std::move(opened), true};
    }
    set_aside(partial);
  }
  std::unique_ptr<Directory> made = directory_->create_directory(partial);
  made->try_lock(LockMode::exclusive);
  under_way_.insert(name);
  return {std::move(made), false};
}

void RunDirectory::set_aside(const std::string& name) {
  std::string aside = name + kStaleSuffix;
  for (int n = 2; directory_->exists(aside); ++n)
    aside = name + kStaleSuffix + "-" + std::to_string(n);
  directory_->rename(name, aside);
}

void RunDirectory::publish(const std::string& name, Directory& partial) {
  const std::lock_guard lock(mutex_);
  partial.unlock();  // readers lock it shared from the moment they can see it
  directory_->rename(name + kPartialSuffix, name);
  under_way_.erase(name);
  if (linked_to_ && linked_to_->name == name) linked_to_.reset();  // the name's seal is another now
  try {
    directory_->sync();
  } catch (const std::exception& error) {
    throw OutcomeUnknown("checkpoint " + path() + "/" + name +
                         " is visible, but whether it would survive a power loss is unknown (" +
                         error.what() + "); nothing more is written to this directory");
  }
  if (const auto step = step_of_name(name)) committed_.insert(*step);
}

// With the directory's entries guarded: what is found committed under its name stays so until the
// link is made. Null for what is no checkpoint, or a damaged one.
const RunDirectory::Sealed* RunDirectory::find_sealed(const std::string& name) {
  if (linked_to_ && linked_to_->name == name && directory_->leads_to(name, *linked_to_->directory))
    return &*linked_to_;
  linked_to_.reset();
  if (name.ends_with(kPartialSuffix) || name.find(kStaleSuffix) != std::string::npos)
    return nullptr;
  try {
    Sealed found{name, directory_->open_directory(name), 0, {}};
    Checksums sums =
        decode_checksums(read_whole(*found.directory, kChecksumsName, kMaxChecksumsBytes));
    if (const auto step = step_of_name(name); step && *step != sums.identity.step) return nullptr;
    found.block_bytes = sums.block_bytes;
    for (FileSums& file : sums.files) found.files.emplace(file.name, std::move(file));
    linked_to_ = std::move(found);
  } catch (const std::exception&) {
    return nullptr;  // then everything is written anew, which needs nothing of it
  }
  return &*linked_to_;
}

std::optional<RunDirectory::Linked> RunDirectory::link(const std::string& from,
                                                       const PayloadFile& plan, size_t block_bytes,
                                                       const Digest& digest, Directory& into) {
  const std::lock_guard lock(mutex_);
  const Sealed* const found = find_sealed(from);
  if (found == nullptr || found->block_bytes != block_bytes) return std::nullopt;
  const auto file = found->files.find(plan.name);
  if (file == found->files.end()) return std::nullopt;
  const FileSums& sums = file->second;
  if (sums.size_bytes != plan.size_bytes || sums.digest != digest) return std::nullopt;
  const Link link = into.link_file(plan.name, *found->directory, plan.size_bytes);
  if (link == Link::impossible) return std::nullopt;
  return Linked{sums.blocks, link == Link::made};
}

void RunDirectory::discard(const std::string& name) {
  const std::lock_guard lock(mutex_);
  if (under_way_.erase(name) > 0) remove_tree(*directory_, name + kPartialSuffix);
}

void RunDirectory::keep(std::set<uint64_t> steps) {
  const std::lock_guard lock(kept_mutex_);
  kept_ = std::move(steps);
}

bool RunDirectory::is_kept(uint64_t step) const {
  if (options_.keep_every != 0 && step % options_.keep_every == 0) return true;
  const std::lock_guard lock(kept_mutex_);
  return kept_.contains(step);
}

void RunDirectory::retire() {
  const std::lock_guard lock(mutex_);
  if (options_.keep_last == 0 || committed_.size() <= options_.keep_last) return;
  size_t excess = committed_.size() - options_.keep_last;
  std::vector<Spare> retired;
  std::exception_ptr odd;
  for (auto step = committed_.begin(); excess > 0; --excess) {
    if (is_kept(*step)) {
      ++step;
      continue;
    }
    const std::string name = name_of_step(*step);
    try {
      std::unique_ptr<Directory> old = retire_one(name);
      if (!old) {  // somebody reads it: the next call tries again
        ++step;
        continue;
      }
      retired.push_back({name + kPartialSuffix, std::move(old)});
    } catch (const std::exception&) {
      // Removed, or replaced by something else: no checkpoint of ours any more. Told of, once.
      if (directory_->exists(name) && !odd) odd = std::current_exception();
    }
    step = committed_.erase(step);
  }
  // Before a byte of them is overwritten, no crash may bring their names back.
  if (!retired.empty()) directory_->sync();
  for (Spare& spare : retired) {
    if (spares_.size() < options_.max_spares)
      spares_.push_back(std::move(spare));
    else
      remove_tree(*directory_, spare.name);
  }
  if (odd) std::rethrow_exception(odd);
}

// Null while a reader has it locked.
std::unique_ptr<Directory> RunDirectory::retire_one(const std::string& name) {
  std::unique_ptr<Directory> old = directory_->open_directory(name);
  if (!holds_only_checkpoint_files(*old) || !old->try_lock(LockMode::exclusive)) return nullptr;
  old->sync();  // whoever recycles it counts on its entries, whoever has made them
  directory_->rename(name, name + kPartialSuffix);
  return old;
}

std::optional<uint64_t> RunDirectory::sealed_step(const std::string& name) {
  if (const auto step = step_of_name(name)) return step;
  try {
    const std::unique_ptr<Directory> directory = directory_->open_directory(name);
    return decode_checksums(read_whole(*directory, kChecksumsName, kMaxChecksumsBytes))
        .identity.step;
  } catch (const std::exception&) {
    return std::nullopt;  // not a checkpoint: no business of ours
  }
}

std::vector<std::string> RunDirectory::set_aside_after(uint64_t step) {
  const std::lock_guard lock(mutex_);
  std::vector<std::string> names;
  for (const Entry& entry : directory_->list()) {
    if (entry.kind != EntryKind::directory || entry.name.ends_with(kPartialSuffix) ||
        entry.name.find(kStaleSuffix) != std::string::npos)
      continue;
    const std::optional<uint64_t> sealed = sealed_step(entry.name);
    if (!sealed || *sealed <= step) continue;
    set_aside(entry.name);
    if (step_of_name(entry.name)) committed_.erase(*sealed);
    names.push_back(entry.name);
  }
  if (!names.empty()) directory_->sync();
  std::ranges::sort(names);
  return names;
}

void RunDirectory::remove_spares() {
  const std::lock_guard lock(mutex_);
  std::exception_ptr failed;
  for (const Spare& spare : spares_) try {
      remove_tree(*directory_, spare.name);
    } catch (const std::exception&) {
      if (!failed) failed = std::current_exception();
    }
  spares_.clear();
  if (failed) std::rethrow_exception(failed);
}

std::unique_ptr<RunDirectory> open_run_directory(const std::string& path,
                                                 RunDirectory::Options options,
                                                 std::chrono::duration<double> timeout,
                                                 const std::function<void()>& interrupted) {
  constexpr auto kRetryAfter = std::chrono::milliseconds(20);
  std::unique_ptr<Directory> directory = open_posix_directory(path, true);
  const auto until = Clock::now() + std::chrono::duration_cast<Clock::duration>(timeout);
  while (true) {
    if (std::unique_ptr<File> lock = directory->try_lock_file(kLockName))
      return std::make_unique<RunDirectory>(std::move(directory), std::move(lock), options);
    if (Clock::now() >= until)
      throw std::runtime_error("another process is writing checkpoints to " + path +
                               " and did not finish within " + std::to_string(timeout.count()) +
                               " s; stop it, or use another checkpoint directory");
    interrupted();
    std::this_thread::sleep_for(kRetryAfter);
  }
}

}  // namespace pccheck
