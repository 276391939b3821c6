// What a training process and its monitor say to each other, and how it is put into bytes. Both
// are built from the same sources and run on one machine: the bytes are the machine's own, and
// `Hello::version` tells builds apart that are not.
//
// A checkpoint is known by its ticket's number. Its life, as the two see it:
//
//   trainer  Begin, [Link,] Staged ... [Addition, Staged ...] Seal   or, after a failure, Abandon
//   monitor          Linked Freed ...  [Failing]                     Ended
//
// Nothing of a ticket follows its Seal or Abandon; nothing follows its Ended. A checkpoint whose
// Seal has arrived needs the trainer no more.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "cpp/format.h"

namespace pccheck::messages {

inline constexpr uint32_t kVersion = 2;

// A payload file as far as a writer has to know it.
struct FilePlan {
  std::string name;
  uint64_t size_bytes;
  uint64_t grid_begin;
  bool operator==(const FilePlan&) const = default;
};

// An error that crosses over: errno, 0 if it was no system call.
struct Failure {
  int32_t code = 0;
  std::string text;
  bool operator==(const Failure&) const = default;
};

// -- from the trainer -----------------------------------------------------------------------------

// First of all; the staging memory and the trainer's pidfd come with it.
struct Hello {
  uint32_t version = kVersion;
  std::string path;
  uint64_t block_bytes = 0;
  uint32_t writer_threads = 0;
  uint64_t keep_last = 0;
  uint64_t max_spares = 0;
  uint64_t keep_every = 0;
  double lock_timeout_s = 0;
  double drain_timeout_s = 0;
  bool operator==(const Hello&) const = default;
};

struct Begin {
  uint64_t ticket = 0;
  Identity identity;
  std::string name;
  std::vector<FilePlan> files;
};

struct Addition {  // more files of the same checkpoint
  uint64_t ticket = 0;
  std::vector<FilePlan> files;
};

struct Staged {  // a block is full: the slot is the monitor's until Freed
  uint64_t ticket = 0;
  uint32_t file = 0;
  uint64_t block = 0;
  uint64_t bytes = 0;
  uint64_t slot = 0;
  uint32_t crc = 0;
  bool summed = false;  // whether `crc` is that of the whole block
};

struct DigestOf {
  uint32_t file = 0;
  Digest digest;
  bool operator==(const DigestOf&) const = default;
};

struct Seal {
  uint64_t ticket = 0;
  std::vector<std::byte> manifest;
  std::vector<DigestOf> digests = {};  // of staged files, where they are known
};

struct Abandon {
  uint64_t ticket = 0;
  std::string reason;
};

struct SetAside {  // answered by Names
  uint64_t step = 0;
};

struct Keep {  // as RunDirectory::keep
  std::vector<uint64_t> steps;
};

struct Link {  // as Checkpoint::link, instead of any block of the file; answered by Linked
  uint64_t ticket = 0;
  uint32_t file = 0;
  std::string from;
  Digest digest;
};

struct Close {};  // answered by Closed, once everything sealed has been committed

// -- from the monitor -----------------------------------------------------------------------------

struct Ready {};  // the directory is locked, everything runs

struct Refused {  // instead of Ready
  Failure failure;
};

struct Freed {
  uint64_t slot = 0;
};

struct Failing {  // the first error of a checkpoint: nothing more of it needs to be staged
  uint64_t ticket = 0;
  Failure failure;
};

struct Ended {
  uint64_t ticket = 0;
  bool committed = false;
  bool outcome_unknown = false;
  Failure failure;
};

struct Names {
  std::vector<std::string> names;
  Failure failure;  // text empty: none
};

struct Complaint {
  std::string text;
};

struct Closed {
  std::string complaint;  // empty: none
};

struct Linked {
  bool linked = false;  // false: the file has to be staged
};

using FromTrainer =
    std::variant<Hello, Begin, Addition, Staged, Seal, Abandon, SetAside, Keep, Close, Link>;
using FromMonitor =
    std::variant<Ready, Refused, Freed, Failing, Ended, Names, Complaint, Closed, Linked>;

std::vector<std::byte> encode(const FromTrainer& message);
std::vector<std::byte> encode(const FromMonitor& message);

// Throw std::runtime_error for bytes that are no such message.
FromTrainer decode_from_trainer(std::span<const std::byte> bytes);
FromMonitor decode_from_monitor(std::span<const std::byte> bytes);

Failure failure_of(const std::exception_ptr& error);
std::exception_ptr to_error(const Failure& failure);  // a std::system_error where it was one

}  // namespace pccheck::messages
