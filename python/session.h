// What a trainer holds: a run's directory, the engine that writes to it, and the tensors that are
// being read. All of it belongs to the thread that trains; the engine's own threads never come
// here.
//
// Tensors are held from hand-over until their layer's gate has opened or their checkpoint has
// ended, and are dropped on the calling thread. A forked child may do nothing with a session but
// drop it.
#pragma once

#include <ATen/core/Tensor.h>
#include <sys/types.h>

#include <deque>
#include <future>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpp/engine.h"
#include "cpp/manual_copier.h"
#include "cpp/monitor_client.h"
#include "cpp/recovery.h"
#include "cpp/run_directory.h"
#include "python/tensor_view.h"

namespace pccheck::python {

struct SessionOptions {
  size_t block_bytes;
  size_t staging_bytes;
  unsigned writer_threads;
  size_t max_in_flight;
  size_t keep_last;
  uint64_t keep_every;
  double lock_timeout_s;
  c10::Device device;
  bool manual_copier;
  bool verify_staged;
  std::optional<MonitorOptions> monitor;  // none: the run is written from this process
};

class Session;

// What close() throws when its time has passed.
class TimedOut : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Ticket {
 public:
  Ticket(Session& session, std::shared_ptr<Checkpoint> checkpoint,
         std::shared_ptr<const Layout> layout);

  const std::string& name() const { return checkpoint_->name(); }
  uint64_t step() const { return checkpoint_->identity().step; }
  const Identity& identity() const { return checkpoint_->identity(); }

  void hand_over(size_t layer, const std::vector<at::Tensor>& tensors);
  // Files of their own for tensors that were not planned. Returns the number of their layer.
  size_t add(std::shared_ptr<const Layout> addition, const std::vector<at::Tensor>& tensors);
  void seal(std::string_view manifest, std::shared_ptr<const Layout> addition,
            const std::vector<at::Tensor>& tensors);
  bool leaves_time_to_update() const { return checkpoint_->leaves_time_to_update(); }
  void update_ended() { checkpoint_->update_ended(); }
  void abandon(const std::string& reason);

  // Waits until the layer is staged, then opens its gate. Never throws for the checkpoint's
  // failure.
  void open_gate(size_t layer);
  void open_all_gates();

  bool staged() const;
  bool layer_staged(size_t layer) const;
  // False when the time has passed first.
  bool wait_layer_staged(size_t layer, std::optional<double> timeout_s) const;
  bool in_flight() const { return checkpoint_->state() == Checkpoint::State::in_flight; }
  bool committed() const { return checkpoint_->state() == Checkpoint::State::committed; }
  uint64_t written_bytes() const { return checkpoint_->written_bytes(); }
  uint64_t payload_bytes() const { return checkpoint_->payload_bytes(); }
  // What failed it: message and errno (0 if it was no system call).
  std::optional<std::pair<std::string, int>> error() const;
  // False when the time has passed first.
  bool wait(std::optional<double> timeout_s) const;

  bool may_be_dropped() const;

 private:
  struct Held {
    std::vector<TensorView> views;
    std::unique_ptr<VersionWatch> watch;
  };

  HandOver hold(size_t layer, const std::vector<at::Tensor>& tensors, const Layout& layout,
                size_t layer_in_layout);

  Session& session_;
  const std::shared_ptr<Checkpoint> checkpoint_;
  const std::shared_ptr<const Layout> layout_;
  Checkpoint::Addition hold_addition(std::shared_ptr<const Layout> addition,
                                     const std::vector<at::Tensor>& tensors);

  std::vector<std::optional<Held>> held_;  // by layer; additions last
};

class Session {
 public:
  // `interrupted` may throw to end the waiting for the directory's lock.
  Session(const std::string& path, SessionOptions options,
          const std::function<void()>& interrupted);
  ~Session();

  std::shared_ptr<Ticket> begin(const std::string& name, Identity identity,
                                std::shared_ptr<const Layout> layout, bool during_update);
  std::vector<std::string> set_aside_after(uint64_t step);
  // As RunDirectory::keep.
  void keep(std::set<uint64_t> steps);
  // Lets the next checkpoint link the files of one that was restored: those whose digests its seal
  // tells. What the reader has not verified yet is read. False where it tells none, or has blocks
  // of another size. Throws CorruptCheckpoint, and std::invalid_argument for a checkpoint of
  // another directory.
  bool adopt_base(CheckpointReader& reader, unsigned threads);

  // Finishes what was sealed and lets go of the directory. What could not be cleared up there is
  // returned, not thrown: nothing was lost by it. Throws TimedOut when `timeout_s` have passed
  // first (none: waits on): then it goes on, nothing more can be begun, and it may be called again.
  std::optional<std::string> close(std::optional<double> timeout_s);
  // Lets go of everything without waiting, for good: what is in flight goes on as far as the disk
  // lets it, for as long as this process lives. The directory stays locked as long.
  void leave();
  bool is_open() const { return open_; }

  void require_open() const;  // throws when closed, or in a forked child
  // Throws as well where there is none, because the last monitor's successor did not come up. The
  // next begin() tries again.
  Engine& engine();
  bool has_engine() const { return engine_ != nullptr; }

  // The monitor's process, none in direct mode.
  std::optional<pid_t> monitor_process() const;
  // What the monitor has died of: nothing can be begun before one of the two is called.
  std::optional<std::string> monitor_death() const;
  void restart_monitor(const std::function<void()>& interrupted);
  void go_direct(const std::function<void()>& interrupted);

  // The newest step whose checkpoint needs this process no more.
  uint64_t last_sealed_step();
  CommitCounts counts();  // of monitors that have died, too
  uint64_t links_refused() const {
    return links_refused_before_ + (engine_ ? engine_->links_refused() : 0);
  }
  std::optional<std::string> take_complaint();

  const SessionOptions& options() const { return options_; }
  const std::string& path() const { return path_; }
  ManualCopier& manual_copier();

  // Drops what no copy needs any more.
  void reap();

 private:
  // Removes what waits to be recycled, on a thread of its own: a disk may hang over it.
  class Clearing {
   public:
    explicit Clearing(std::shared_ptr<RunDirectory> run);
    bool wait(Clock::time_point until) const;
    std::optional<std::string> complaint() { return complaint_.get(); }

   private:
    std::promise<std::optional<std::string>> done_;
    std::future<std::optional<std::string>> complaint_ = done_.get_future();
    std::jthread thread_;
  };

  void open(const std::function<void()>& interrupted);
  void reopen(const std::function<void()>& interrupted);
  Engine& engine_to_begin_with();
  std::unique_ptr<Engine> take_engine();
  void require_owner() const;

  const std::string path_;
  SessionOptions options_;
  const pid_t owner_;
  std::shared_ptr<RunDirectory> run_;      // null where a monitor has it
  MonitorClient* monitor_ = nullptr;       // inside engine_, in monitor mode
  ManualCopier* manual_copier_ = nullptr;  // inside engine_, in tests
  std::set<uint64_t> kept_;                // what the next monitor has to be told
  const std::shared_ptr<Book> book_ = std::make_shared<Book>();  // of this engine and the next
  bool open_ = true;
  bool closing_ = false;            // close() has begun to clear up
  std::unique_ptr<Engine> engine_;  // null when closed, and while there is no monitor to be had
  std::string why_no_engine_;
  std::unique_ptr<Clearing> clearing_;
  CommitCounts counts_before_;  // of engines before this one
  uint64_t links_refused_before_ = 0;
  std::deque<std::shared_ptr<Ticket>> tickets_;
};

}  // namespace pccheck::python
