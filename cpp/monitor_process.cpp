#include "cpp/monitor_process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <system_error>

#include "cpp/posix_file.h"

namespace pccheck {
namespace {

void check(int error, const char* call) {
  if (error != 0) throw std::system_error(error, std::generic_category(), call);
}

struct FileActions {
  posix_spawn_file_actions_t actions;
  FileActions() { check(::posix_spawn_file_actions_init(&actions), "posix_spawn_file_actions"); }
  ~FileActions() { ::posix_spawn_file_actions_destroy(&actions); }
};

struct Attributes {
  posix_spawnattr_t attributes;
  Attributes() { check(::posix_spawnattr_init(&attributes), "posix_spawnattr_init"); }
  ~Attributes() { ::posix_spawnattr_destroy(&attributes); }
};

}  // namespace

Descriptor open_pidfd(pid_t process) {
  Descriptor pidfd(static_cast<int>(::syscall(SYS_pidfd_open, process, 0)));
  if (!pidfd) throw_errno("pidfd_open of process " + std::to_string(process));
  return pidfd;
}

MonitorProcess::MonitorProcess(const std::string& executable, const std::string& title,
                               const Channel& socket) {
  FileActions files;
  check(::posix_spawn_file_actions_adddup2(&files.actions, socket.descriptor(), kMonitorSocket),
        "posix_spawn_file_actions_adddup2");
  // stderr stays the trainer's: the monitor may have something to say when nobody else can.
  check(::posix_spawn_file_actions_addopen(&files.actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0),
        "posix_spawn_file_actions_addopen");
  check(::posix_spawn_file_actions_addopen(&files.actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0),
        "posix_spawn_file_actions_addopen");

  // A session of its own: what a terminal or a launcher sends to the trainer's group is not for it.
  Attributes how;
  sigset_t none, all;
  ::sigemptyset(&none);
  ::sigfillset(&all);
  check(::posix_spawnattr_setsigmask(&how.attributes, &none), "posix_spawnattr_setsigmask");
  check(::posix_spawnattr_setsigdefault(&how.attributes, &all), "posix_spawnattr_setsigdefault");
  check(::posix_spawnattr_setflags(&how.attributes,
                                   static_cast<short>(POSIX_SPAWN_SETSID | POSIX_SPAWN_SETSIGMASK |
                                                      POSIX_SPAWN_SETSIGDEF)),
        "posix_spawnattr_setflags");
  std::string name = "pccheck-monitor", argument = title;
  const std::array<char*, 3> arguments{name.data(), argument.data(), nullptr};
  const int error = ::posix_spawn(&id_, executable.c_str(), &files.actions, &how.attributes,
                                  arguments.data(), environ);
  if (error != 0)
    throw std::system_error(error, std::generic_category(), "starting the monitor " + executable);
  try {
    pidfd_ = open_pidfd(id_);
  } catch (...) {
    // Nobody would hear of its end. It holds nothing yet: it has not been greeted.
    ::kill(id_, SIGKILL);
    while (::waitpid(id_, nullptr, 0) < 0 && errno == EINTR) {
    }
    throw;
  }
}

MonitorProcess::~MonitorProcess() {
  if (wait_end(std::chrono::milliseconds(0))) ending();
}

bool MonitorProcess::wait_end(std::chrono::milliseconds at_most) const {
  pollfd ended{pidfd_.get(), POLLIN, 0};
  int ready = 0;
  while ((ready = ::poll(&ended, 1, static_cast<int>(at_most.count()))) < 0 && errno == EINTR) {
  }
  return ready > 0;
}

std::string MonitorProcess::ending() {
  if (!ending_.empty()) return ending_;
  int status = 0;
  pid_t reaped = 0;
  while ((reaped = ::waitpid(id_, &status, WNOHANG)) < 0 && errno == EINTR) {
  }
  if (reaped != id_)
    ending_ = "ended";  // somebody else has reaped it: how is not known
  else if (WIFSIGNALED(status))
    ending_ = "was killed by signal " + std::to_string(WTERMSIG(status));
  else
    ending_ = "exited with status " + std::to_string(WEXITSTATUS(status));
  return ending_;
}

}  // namespace pccheck
