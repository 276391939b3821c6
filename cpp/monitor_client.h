// The trainer's side of monitor mode: persists by sending every full block to the monitor, a
// process of its own that has the run's directory.
//
// A slot is lent with Staged and comes back with Freed; a checkpoint is the monitor's alone once
// its Seal is sent. If the monitor dies, everything in flight fails, at once, and nothing can be
// begun any more: see refusal().
//
// The first group of functions is the trainer's thread's, the Persister's are any thread's.
#pragma once

#include <functional>
#include <map>
#include <set>
#include <thread>

#include "cpp/messages.h"
#include "cpp/monitor_process.h"
#include "cpp/persister.h"
#include "cpp/shared_slots.h"
#include "cpp/wake.h"

namespace pccheck {

// What the monitor died of, and that it did. Checkpoints in flight fail with it.
class MonitorDied : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct MonitorOptions {
  std::string executable;
  std::chrono::duration<double> drain_timeout;  // how long it goes on once the trainer has died
};

class MonitorClient final : public Persister {
 public:
  // Starts a monitor over `hello.path` and waits until it has locked the directory. `interrupted`
  // is called now and then meanwhile and may throw. Throws std::system_error, std::runtime_error.
  MonitorClient(const MonitorOptions& options, messages::Hello hello, const SharedSlots& slots,
                const std::function<void()>& interrupted);
  ~MonitorClient() override;

  pid_t process() const { return process_.id(); }
  // Null while it lives.
  std::exception_ptr death() const;

  // As RunDirectory::set_aside_after. In both, `interrupted` is called now and then while the
  // monitor does not answer and may throw. Throws MonitorDied.
  std::vector<std::string> set_aside_after(
      uint64_t step, const std::function<void()>& interrupted = [] {});

  // As RunDirectory::keep, before anything that is sealed later is committed.
  void keep(const std::set<uint64_t>& steps);

  // With nothing in flight: lets the monitor clear up, and waits for its end. Returns what it could
  // not clear up, be it that it died over it. May be called again where `interrupted` threw.
  std::optional<std::string> close(const std::function<void()>& interrupted = [] {});

  // The newest step that the monitor will commit even if this process ends now.
  uint64_t last_sealed_step() const;

  void start(BlockQueue& full, Doorbell& pushed) override;
  void add(std::shared_ptr<Checkpoint> checkpoint) override;
  size_t in_flight() const override;
  CommitCounts counts() const override;
  bool link(const std::shared_ptr<Checkpoint>& checkpoint, uint32_t file, const std::string& from,
            const FileDigest& digest) override;
  void look() override;
  std::exception_ptr refusal() const override;
  std::optional<std::string> take_complaint() override;

 private:
  struct InFlight {
    uint64_t ticket;
    std::shared_ptr<Checkpoint> checkpoint;
    bool begun = false;                            // Begin was sent
    size_t additions = 0;                          // of which Addition was sent
    bool over = false;                             // Seal or Abandon was sent
    std::optional<bool> committed = std::nullopt;  // Ended has arrived
  };

  class Sender final : public Worker {
   public:
    explicit Sender(MonitorClient& client) : client_(client) {}
    bool run_one() noexcept override { return client_.send_one(); }

   private:
    MonitorClient& client_;
  };

  MonitorClient(const MonitorOptions& options, messages::Hello hello, const SharedSlots& slots,
                const std::function<void()>& interrupted, std::pair<Channel, Channel> ends);

  void greet(const messages::Hello& hello, const SharedSlots& slots,
             const std::function<void()>& interrupted);
  void send(const messages::FromTrainer& message, std::span<const int> descriptors = {});
  template <typename Reply>
  Reply ask(const messages::FromTrainer& question, const std::function<void()>& interrupted);

  // The sender's thread.
  bool send_one() noexcept;
  std::vector<InFlight> all_in_flight() const;
  bool announce(const InFlight& one);
  bool finish(const InFlight& one);
  bool ask_for_link();
  bool send_end(const InFlight& one);
  void send_block(std::unique_ptr<Block> block);
  std::optional<InFlight> announced(const Checkpoint& checkpoint);
  InFlight* find(uint64_t ticket);  // under mutex_

  // The receiver's thread.
  void receive_all(const std::stop_token& stop);
  void take(const messages::FromMonitor& message);
  void died(const std::string& how);

  std::optional<messages::Closed> farewell_;  // the trainer's thread only

  Channel channel_;
  Wake stop_receiving_;
  MonitorProcess process_;
  std::mutex send_mutex_;  // guards channel_.send(), which may wait
  BlockQueue* full_ = nullptr;
  Doorbell* bell_ = nullptr;

  mutable std::mutex mutex_;  // guards everything below
  mutable std::condition_variable answered_;
  std::deque<InFlight> in_flight_;
  uint64_t tickets_ = 0;
  std::map<size_t, std::unique_ptr<Block>> lent_;  // by slot
  CommitCounts counts_;
  uint64_t last_sealed_step_ = 0;
  std::optional<messages::FromMonitor> answer_;
  std::optional<messages::Link> wish_;  // of the stager's, not sent yet
  std::optional<bool> wish_granted_;
  std::optional<std::string> complaint_;
  std::exception_ptr outcome_unknown_;
  std::exception_ptr death_;
  std::string sending_failed_;
  bool closed_ = false;

  Sender sender_{*this};
  std::unique_ptr<WorkerThread> sending_;
  std::jthread receiving_;
};

}  // namespace pccheck
