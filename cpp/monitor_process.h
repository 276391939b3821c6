// A monitor as a child process: started in a session of its own, watched, reaped.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <string>

#include "cpp/channel.h"
#include "cpp/descriptor.h"

namespace pccheck {

// The monitor finds its end of the channel there.
inline constexpr int kMonitorSocket = 3;

// A descriptor that becomes readable when the process ends. Throws std::system_error.
Descriptor open_pidfd(pid_t process);

class MonitorProcess {
 public:
  // Starts `executable` with `title` as its argument, for those who look at a list of processes.
  // Throws std::system_error naming the executable.
  MonitorProcess(const std::string& executable, const std::string& title, const Channel& socket);
  MonitorProcess(const MonitorProcess&) = delete;
  MonitorProcess& operator=(const MonitorProcess&) = delete;
  ~MonitorProcess();  // reaps it if it has ended; it ends by itself when its channel does

  pid_t id() const { return id_; }
  int descriptor() const { return pidfd_.get(); }  // readable once it has ended

  bool wait_end(std::chrono::milliseconds at_most) const;
  // How it ended, for a person to read; reaps it. Only once it has ended.
  std::string ending();

 private:
  pid_t id_ = -1;
  Descriptor pidfd_;
  std::string ending_;
};

}  // namespace pccheck
