// The monitor: a process that has the run's directory, writes what a trainer has staged in shared
// memory, and commits it. The trainer may die: every checkpoint whose Seal has arrived is committed
// before the monitor ends.
//
// Everything but the writers and the committer runs on the thread that calls run().
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "cpp/channel.h"
#include "cpp/local_persister.h"
#include "cpp/messages.h"
#include "cpp/run_directory.h"
#include "cpp/shared_slots.h"
#include "cpp/wake.h"

namespace pccheck {

class Monitor {
 public:
  explicit Monitor(Channel channel);
  ~Monitor();

  enum class Outcome {
    closed,         // the trainer asked for it
    trainer_died,   // and everything that could be committed has been
    drain_timeout,  // the trainer died, and the disk did not keep up: the process has to be ended
    refused,        // it could not begin; the trainer was told
  };

  // Serves one trainer to its end. Throws nothing that can be told to the trainer; std::exception
  // when it cannot go on, with the channel ended first and everything sealed committed.
  Outcome run();

 private:
  // Slots of the trainer's: leased to blocks here, told back when they come free. By the thread
  // that lets go of one, which spares the monitor's own a wake-up for each; where the channel has
  // no room, by that one, later.
  class Borrowed final : public SlotOwner {
   public:
    Borrowed(Descriptor memory, size_t slot_bytes, Channel& channel, Wake& wake);

    std::span<std::byte> slot(size_t index) override;
    void release(size_t index) noexcept override;
    size_t count() const { return count_; }
    std::vector<size_t> take_released();  // what is still to be told

   private:
    bool tell(size_t index) noexcept;

    SharedSlots memory_;
    const size_t slot_bytes_;
    const size_t count_;
    Channel& channel_;
    Wake& wake_;
    std::mutex mutex_;  // guards released_
    std::vector<size_t> released_;
  };

  struct InFlight {
    uint64_t ticket;
    std::shared_ptr<Checkpoint> checkpoint;
    bool failing_told = false;
  };

  void begin();
  void serve();
  bool receive_all();
  void take(messages::FromTrainer message);
  void take_block(const messages::Staged& staged);
  void link(const messages::Link& link);
  void seal(messages::Seal seal);
  Checkpoint& find(uint64_t ticket);
  std::vector<PayloadFile> files_of(const std::vector<messages::FilePlan>& plans) const;
  void tell_what_happened();
  void trainer_has_gone(const std::string& how);
  void say(const messages::FromMonitor& message);
  void send_what_waits();

  Channel channel_;
  Wake wake_;
  Descriptor trainer_;  // pidfd
  messages::Hello hello_;
  std::shared_ptr<RunDirectory> run_;
  std::optional<Borrowed> slots_;
  Doorbell full_bell_, nobody_;
  BlockQueue full_{full_bell_, nobody_};
  std::optional<LocalPersister> persister_;
  std::vector<InFlight> in_flight_;  // in the order in which they were begun
  std::deque<std::vector<std::byte>> unsent_;
  bool trainer_gone_ = false;
  bool closing_ = false;
  Clock::time_point until_ = Clock::time_point::max();
};

}  // namespace pccheck
