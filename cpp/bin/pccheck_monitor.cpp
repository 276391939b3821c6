// The monitor's executable. A trainer starts it, with a socket as descriptor 3; nobody else does.
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <exception>

#include "cpp/monitor.h"
#include "cpp/monitor_process.h"

namespace {

int serve(int argc, char** argv) {
  // What tells a whole job to end, or warns it that its time is running out, is not for the one who
  // has yet to save it: the monitor ends when its trainer has.
  for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGPIPE, SIGUSR1, SIGUSR2, SIGXCPU})
    ::signal(signal, SIG_IGN);
  if (::fcntl(pccheck::kMonitorSocket, F_GETFD) < 0) {
    std::fprintf(stderr, "%s is started by pccheck_ext (use_monitor=True), not by hand\n", argv[0]);
    return 2;
  }
  // Nothing of the trainer's is kept open that is not meant for us, nor a file system kept busy.
  ::close_range(pccheck::kMonitorSocket + 1, ~0U, 0);
  if (::chdir("/") != 0) return 2;
  try {
    pccheck::Monitor monitor(pccheck::Channel(pccheck::Descriptor(pccheck::kMonitorSocket)));
    switch (monitor.run()) {
      case pccheck::Monitor::Outcome::closed:
      case pccheck::Monitor::Outcome::trainer_died:
        return 0;
      case pccheck::Monitor::Outcome::refused:
        return 1;
      case pccheck::Monitor::Outcome::drain_timeout:
        std::fprintf(stderr,
                     "pccheck_ext: the trainer of %s died, and its last checkpoints could not be "
                     "committed in time\n",
                     argc > 1 ? argv[1] : "a run");
        std::fflush(stderr);
        ::_exit(1);  // here: threads that hang in the disk cannot be waited for
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "pccheck_ext: the monitor of %s gives up: %s\n",
                 argc > 1 ? argv[1] : "a run", error.what());
  }
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  const int status = serve(argc, argv);
  std::fflush(stderr);
  // At once: there is nothing to clear up, and whoever waits for the end of this process (a
  // trainer, a lock) should not wait for what runtimes and sanitizers do at an exit.
  ::_exit(status);
}
