// What tests of monitor mode share: children to be killed, signals that interrupt, descriptors
// counted, checkpoints compared with what was staged.
#pragma once

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <set>
#include <string>

#include "cpp/recovery.h"
#include "cpp/run_directory.h"
#include "tests/cpp/state.h"
#include "tests/cpp/temp_dir.h"

namespace pccheck::test {

inline std::set<int> open_descriptors() {
  std::set<int> open;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd"))
    open.insert(std::stoi(entry.path().filename().string()));
  return open;
}

// A process that does nothing until it is killed.
class IdleChild {
 public:
  IdleChild() : pid_(::fork()) {
    if (pid_ != 0) return;
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    while (true) ::pause();
  }
  IdleChild(const IdleChild&) = delete;
  IdleChild& operator=(const IdleChild&) = delete;
  ~IdleChild() { kill(); }

  pid_t id() const { return pid_; }

  // Returns once it has ended and has been reaped.
  void kill() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    int status = 0;
    ::waitpid(std::exchange(pid_, -1), &status, 0);
  }

 private:
  pid_t pid_;
};

// Interrupts this process's system calls every `period` of time, as profilers and alarms do.
class SignalStorm {
 public:
  explicit SignalStorm(std::chrono::microseconds period) {
    struct sigaction action{};
    action.sa_handler = [](int) {};  // without SA_RESTART
    ::sigaction(SIGALRM, &action, &before_);
    const auto us = static_cast<suseconds_t>(period.count());
    const itimerval every{{0, us}, {0, us}};
    ::setitimer(ITIMER_REAL, &every, nullptr);
  }
  SignalStorm(const SignalStorm&) = delete;
  SignalStorm& operator=(const SignalStorm&) = delete;
  ~SignalStorm() {
    const itimerval never{};
    ::setitimer(ITIMER_REAL, &never, nullptr);
    ::sigaction(SIGALRM, &before_, nullptr);
  }

 private:
  struct sigaction before_{};
};

// Fails the running test unless `<run>/<name>` on the real disk is exactly this checkpoint.
inline void expect_on_disk(const std::string& run, const std::string& name,
                           const Identity& identity, const State& state, const Bytes& manifest) {
  try {
    const CheckpointReader reader(run, name);
    reader.verify(1);
    EXPECT_EQ(reader.checksums().identity.step, identity.step);
    EXPECT_EQ(reader.checksums().identity.run, identity.run);
    EXPECT_EQ(reader.checksums().identity.save, identity.save);
    EXPECT_TRUE(std::ranges::equal(reader.manifest(), manifest));
  } catch (const std::exception& error) {
    FAIL() << name << ": " << error.what();
  }
  std::vector<std::string> expected = {kManifestName, kChecksumsName};
  for (size_t f = 0; f < state.layout->files().size(); ++f) {
    const std::string& file = state.layout->files()[f].name;
    expected.push_back(file);
    EXPECT_EQ(read_file(run + "/" + name + "/" + file), state.file(f)) << name << "/" << file;
  }
  std::ranges::sort(expected);
  EXPECT_EQ(names_in(run + "/" + name), expected);
}

inline bool lock_is_free(const std::string& run) {
  const std::unique_ptr<Directory> directory = open_posix_directory(run, false);
  return directory->try_lock_file(kLockName) != nullptr;
}

inline std::vector<std::string> checkpoints_in(const std::string& run) {
  std::vector<std::string> found = names_in(run);
  std::erase(found, kLockName);
  return found;
}

}  // namespace pccheck::test
