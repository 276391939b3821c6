#include "python/session.h"

#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <system_error>

#include "cpp/worker.h"
#include "python/backend.h"
#include "python/interruptible.h"

namespace pccheck::python {
Ticket::Ticket(Session& session, std::shared_ptr<Checkpoint> checkpoint,
               std::shared_ptr<const Layout> layout)
    : session_(session),
      checkpoint_(std::move(checkpoint)),
      layout_(std::move(layout)),
      held_(layout_->layers().size()) {}

HandOver Ticket::hold(size_t layer, const std::vector<at::Tensor>& tensors, const Layout& layout,
                      size_t layer_in_layout) {
  const std::vector<TensorRef>& planned = layout.layers()[layer_in_layout].tensors;
  if (planned.size() != tensors.size())
    throw std::invalid_argument("layer " + std::to_string(layer) + " of checkpoint " + name() +
                                " has " + std::to_string(planned.size()) + " tensors, not " +
                                std::to_string(tensors.size()));
  Held held{{}, std::make_unique<VersionWatch>(session_.options().verify_staged)};
  HandOver hand_over;
  held.views.reserve(tensors.size());
  hand_over.sources.reserve(tensors.size());
  bool on_device = false;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const TensorSpec& spec = layout.tensor(planned[i]).spec;
    const TensorView& view = held.views.emplace_back(tensors[i], spec.name);
    if (view.dtype() != spec.dtype)
      throw std::invalid_argument("tensor '" + spec.name + "' was planned as " + spec.dtype);
    hand_over.sources.push_back(view.source());
    if (view.is_own_memory()) held.watch->add(view, spec.name);
    on_device = on_device || !tensors[i].is_cpu();
  }
  if (on_device)
    hand_over.ready = mark_ready(session_.engine().copier(), session_.options().device);
  hand_over.watch = held.watch.get();
  if (layer == held_.size()) held_.emplace_back();
  held_.at(layer) = std::move(held);
  return hand_over;
}

void Ticket::hand_over(size_t layer, const std::vector<at::Tensor>& tensors) {
  session_.require_open();
  if (layer >= layout_->layers().size())
    throw std::invalid_argument("there is no layer " + std::to_string(layer));
  if (held_[layer])
    throw std::invalid_argument("layer " + std::to_string(layer) + " was handed over already");
  HandOver hand_over = hold(layer, tensors, *layout_, layer);
  try {
    checkpoint_->hand_over(layer, std::move(hand_over));
  } catch (...) {
    held_[layer].reset();
    throw;
  }
}

Checkpoint::Addition Ticket::hold_addition(std::shared_ptr<const Layout> addition,
                                           const std::vector<at::Tensor>& tensors) {
  const size_t slots = session_.engine().slot_count();
  const size_t needed = layout_->open_blocks() + addition->open_blocks() + 1;
  if (slots < needed)
    throw std::invalid_argument("staging memory holds " + std::to_string(slots) +
                                " blocks; what is added to checkpoint " + name() +
                                " needs at least " + std::to_string(needed));
  HandOver hand_over = hold(held_.size(), tensors, *addition, 0);
  return {std::move(addition), std::move(hand_over)};
}

size_t Ticket::add(std::shared_ptr<const Layout> addition, const std::vector<at::Tensor>& tensors) {
  const size_t layer = held_.size();
  try {
    return checkpoint_->add(hold_addition(std::move(addition), tensors));
  } catch (...) {
    held_.resize(layer);
    throw;
  }
}

void Ticket::seal(std::string_view manifest, std::shared_ptr<const Layout> addition,
                  const std::vector<at::Tensor>& tensors) {
  session_.require_open();
  const auto bytes = std::as_bytes(std::span(manifest));
  std::optional<Checkpoint::Addition> added;
  if (addition) added = hold_addition(std::move(addition), tensors);
  checkpoint_->seal({bytes.begin(), bytes.end()}, std::move(added));
}

void Ticket::abandon(const std::string& reason) {
  session_.require_open();
  checkpoint_->fail(std::make_exception_ptr(std::runtime_error(reason)));
}

void Ticket::open_gate(size_t layer) {
  if (layer >= held_.size() || !held_[layer]) return;
  session_.require_open();
  wait_interruptibly(
      [&](Clock::time_point until) { return checkpoint_->wait_staged(layer, until); });
  checkpoint_->open_gate(layer);
  held_[layer].reset();
}

void Ticket::open_all_gates() {
  for (size_t layer = 0; layer < held_.size(); ++layer) open_gate(layer);
}

bool Ticket::staged() const { return checkpoint_->wait_all_staged(Clock::now()); }

bool Ticket::layer_staged(size_t layer) const {
  return checkpoint_->wait_staged(layer, Clock::time_point{});
}

bool Ticket::wait_layer_staged(size_t layer, std::optional<double> timeout_s) const {
  session_.require_open();
  return wait_interruptibly(
      [&](Clock::time_point until) { return checkpoint_->wait_staged(layer, until); }, timeout_s);
}

std::optional<std::pair<std::string, int>> Ticket::error() const {
  const std::exception_ptr error = checkpoint_->error();
  if (!error) return std::nullopt;
  try {
    std::rethrow_exception(error);
  } catch (const std::system_error& failed) {
    return std::pair(std::string(failed.what()), failed.code().value());
  } catch (const std::exception& failed) {
    return std::pair(std::string(failed.what()), 0);
  }
}

bool Ticket::wait(std::optional<double> timeout_s) const {
  if (!in_flight()) return true;
  session_.require_open();
  return wait_interruptibly(
      [&](Clock::time_point until) { return checkpoint_->wait_finished(until); }, timeout_s);
}

bool Ticket::may_be_dropped() const {
  if (!in_flight()) return true;
  for (const std::optional<Held>& held : held_)
    if (held) return false;
  // Not everything was handed over yet, or nothing is held any more.
  return !checkpoint_->awaits_seal();
}

Session::Session(const std::string& path, SessionOptions options,
                 const std::function<void()>& interrupted)
    : path_(path), options_(std::move(options)), owner_(::getpid()) {
  open(interrupted);
}

// Everything that can be refused is refused before the directory is touched.
void Session::open(const std::function<void()>& interrupted) {
  std::unique_ptr<Copier> copier;
  if (options_.manual_copier) {
    auto manual = std::make_unique<ManualCopier>();
    manual_copier_ = manual.get();
    copier = std::move(manual);
  } else {
    copier = make_copier(options_.device);
  }
  const EngineOptions engine{options_.block_bytes, options_.max_in_flight};
  if (!options_.monitor) {
    auto made = std::make_unique<Engine>(
        engine, std::move(copier), make_slot_memory(options_.device, options_.staging_bytes),
        std::make_unique<LocalPersister>(options_.writer_threads), book_);
    std::shared_ptr<RunDirectory> run =
        open_run_directory(path_, {options_.keep_last, options_.max_in_flight, options_.keep_every},
                           std::chrono::duration<double>(options_.lock_timeout_s), interrupted);
    run->keep(kept_);
    const pybind11::gil_scoped_acquire acquire;  // another thread may be asking for stats
    run_ = std::move(run);
    engine_ = std::move(made);
    return;
  }
  auto slots = std::make_unique<SharedSlots>(options_.staging_bytes);
  auto client =
      std::make_unique<MonitorClient>(*options_.monitor,
                                      messages::Hello{.path = path_,
                                                      .block_bytes = options_.block_bytes,
                                                      .writer_threads = options_.writer_threads,
                                                      .keep_last = options_.keep_last,
                                                      .max_spares = options_.max_in_flight,
                                                      .keep_every = options_.keep_every,
                                                      .lock_timeout_s = options_.lock_timeout_s},
                                      *slots, interrupted);
  MonitorClient* const monitor = client.get();
  auto made = std::make_unique<Engine>(engine, std::move(copier),
                                       make_slot_memory(options_.device, std::move(slots)),
                                       std::move(client), book_);
  monitor->keep(kept_);
  const pybind11::gil_scoped_acquire acquire;
  engine_ = std::move(made);
  monitor_ = monitor;
}

// Where it fails, the session goes on without an engine.
void Session::reopen(const std::function<void()>& interrupted) {
  const pybind11::gil_scoped_release release;
  try {
    open(interrupted);
  } catch (const std::exception& error) {
    const pybind11::gil_scoped_acquire acquire;
    manual_copier_ = nullptr;
    why_no_engine_ = error.what();
    throw;
  }
}

std::optional<pid_t> Session::monitor_process() const {
  if (monitor_ == nullptr) return std::nullopt;
  return monitor_->process();
}

std::optional<std::string> Session::monitor_death() const {
  if (monitor_ == nullptr) return std::nullopt;
  require_owner();  // a thread that is not here may have held the lock when this process was forked
  const std::exception_ptr death = monitor_->death();
  if (!death) return std::nullopt;
  return messages::failure_of(death).text;
}

void Session::restart_monitor(const std::function<void()>& interrupted) {
  require_open();
  if (engine_) {
    engine_->abandon_unsealed();
    wait_interruptibly([&](Clock::time_point until) { return engine_->wait_idle(until); });
    std::unique_ptr<Engine> ended = take_engine();
    const pybind11::gil_scoped_release release;
    ended.reset();
  }
  reopen(interrupted);
}

// What it counted is kept.
std::unique_ptr<Engine> Session::take_engine() {
  counts_before_ = counts();
  links_refused_before_ = links_refused();
  monitor_ = nullptr;
  manual_copier_ = nullptr;
  return std::move(engine_);
}

void Session::go_direct(const std::function<void()>& interrupted) {
  options_.monitor.reset();
  restart_monitor(interrupted);
}

uint64_t Session::last_sealed_step() {
  const uint64_t committed = counts().last_committed_step;
  return monitor_ != nullptr ? std::max(committed, monitor_->last_sealed_step()) : committed;
}

CommitCounts Session::counts() {
  require_open();
  if (!engine_) return counts_before_;
  CommitCounts counts = engine_->counts();
  if (counts.committed == 0) {
    counts.last_durable_seconds = counts_before_.last_durable_seconds;
    counts.last_committed_step = counts_before_.last_committed_step;
  }
  counts.committed += counts_before_.committed;
  counts.failed += counts_before_.failed;
  counts.bytes += counts_before_.bytes;
  counts.bytes_linked += counts_before_.bytes_linked;
  counts.durable_seconds += counts_before_.durable_seconds;
  return counts;
}

std::optional<std::string> Session::take_complaint() {
  require_open();
  return engine_ ? engine_->take_complaint() : std::nullopt;
}

Session::~Session() {
  if (!open_) return;
  if (::getpid() != owner_) {
    // The threads are the parent's, and so is whatever their locks protect: leave all of it alone.
    leave();
    return;
  }
  if (manual_copier_ != nullptr) manual_copier_->release_all();
  const pybind11::gil_scoped_release release;
  engine_.reset();
  clearing_.reset();
}

void Session::require_open() const {
  TORCH_CHECK(open_, "this session is closed");
  require_owner();
}

Engine& Session::engine() {
  require_open();
  TORCH_CHECK(engine_, "nothing can be saved: ", why_no_engine_);
  return *engine_;
}

Engine& Session::engine_to_begin_with() {
  require_open();
  TORCH_CHECK(!closing_, "this session is being closed: nothing more can be saved");
  if (!engine_) reopen(look_for_signals);
  return engine();
}

void Session::require_owner() const {
  TORCH_CHECK(::getpid() == owner_, "checkpoints are saved by process ", owner_,
              ", which this one was forked from; a forked child cannot save through it");
}

ManualCopier& Session::manual_copier() {
  TORCH_CHECK(manual_copier_ != nullptr, "this session has no manual copier");
  return *manual_copier_;
}

std::shared_ptr<Ticket> Session::begin(const std::string& name, Identity identity,
                                       std::shared_ptr<const Layout> layout, bool during_update) {
  Engine& engine = engine_to_begin_with();
  wait_interruptibly([&](Clock::time_point until) { return engine.wait_room(until); });
  reap();
  std::shared_ptr<Checkpoint> checkpoint = engine.begin(
      identity, name, layout, run_ ? make_directory_target(run_, name) : nullptr, during_update);
  tickets_.push_back(std::make_shared<Ticket>(*this, std::move(checkpoint), std::move(layout)));
  return tickets_.back();
}

std::vector<std::string> Session::set_aside_after(uint64_t step) {
  engine_to_begin_with();
  const pybind11::gil_scoped_release release;
  if (run_) return run_->set_aside_after(step);
  return monitor_->set_aside_after(step, look_for_signals);
}

void Session::keep(std::set<uint64_t> steps) {
  require_open();
  kept_ = std::move(steps);
  const pybind11::gil_scoped_release release;  // a monitor's channel may be full
  if (run_) run_->keep(kept_);
  if (monitor_ != nullptr) monitor_->keep(kept_);
}

bool Session::adopt_base(CheckpointReader& reader, unsigned threads) {
  require_open();
  const size_t slash = reader.path().rfind('/');
  if (reader.path().substr(0, slash) != path_)
    throw std::invalid_argument(reader.path() + " is no checkpoint of " + path_);
  auto base = std::make_shared<Base>(Base{reader.path().substr(slash + 1), {}});
  for (const FileSums& file : reader.checksums().files)
    if (file.digest)
      base->files.emplace(file.name, Base::KnownFile{file.size_bytes, {*file.digest}});
  if (base->files.empty() || reader.checksums().block_bytes != options_.block_bytes) return false;
  {
    const pybind11::gil_scoped_release release;
    reader.verify_rest(threads);
  }
  book_->enter(std::move(base));
  return true;
}

void Session::reap() {
  std::erase_if(tickets_, [](const auto& ticket) { return ticket->may_be_dropped(); });
}

void Session::leave() {
  open_ = false;
  monitor_ = nullptr;
  (void)engine_.release();
  (void)clearing_.release();
  (void)std::make_unique<decltype(tickets_)>(std::move(tickets_)).release();
}

Session::Clearing::Clearing(std::shared_ptr<RunDirectory> run)
    : thread_(start_thread("pccheck-clear", [this, run = std::move(run)](const std::stop_token&) {
        try {
          run->remove_spares();
          done_.set_value(std::nullopt);
        } catch (const std::exception& error) {
          done_.set_value(error.what());
        }
      })) {}

bool Session::Clearing::wait(Clock::time_point until) const {
  return complaint_.wait_until(until) == std::future_status::ready;
}

std::optional<std::string> Session::close(std::optional<double> timeout_s) {
  if (!open_) return std::nullopt;
  require_open();
  const auto begun = Clock::now();
  const auto left_s = [&]() -> std::optional<double> {
    if (!timeout_s) return std::nullopt;
    return *timeout_s - std::chrono::duration<double>(Clock::now() - begun).count();
  };
  const auto require_time = [&](bool in_time) {
    if (!in_time)
      throw TimedOut("saving to " + path_ + " has not ended in time: it is still being cleared up");
  };
  std::optional<std::string> complaint;
  if (engine_) {
    engine_->abandon_unsealed();
    require_time(wait_interruptibly(
        [&](Clock::time_point until) { return engine_->wait_settled(until); }, left_s()));
    closing_ = true;
    if (monitor_ != nullptr) {
      const pybind11::gil_scoped_release release;
      complaint = monitor_->close([&] {
        look_for_signals();
        require_time(!timeout_s || *left_s() > 0);
      });
    }
    if (run_) {
      if (!clearing_) clearing_ = std::make_unique<Clearing>(run_);
      require_time(wait_interruptibly(
          [&](Clock::time_point until) { return clearing_->wait(until); }, left_s()));
      complaint = clearing_->complaint();
      clearing_.reset();
    }
  }
  open_ = false;
  std::unique_ptr<Engine> ended = std::move(engine_);
  monitor_ = nullptr;
  manual_copier_ = nullptr;
  {
    const pybind11::gil_scoped_release release;
    ended.reset();
  }
  tickets_.clear();
  run_.reset();
  return complaint;
}

}  // namespace pccheck::python
