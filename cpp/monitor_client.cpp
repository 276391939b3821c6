#include "cpp/monitor_client.h"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <stdexcept>

#include "cpp/posix_file.h"

namespace pccheck {
namespace {

using messages::FilePlan;

constexpr auto kHandshakePoll = std::chrono::milliseconds(20);
constexpr auto kAnswerPoll = std::chrono::milliseconds(50);
constexpr auto kEndsWithin = std::chrono::seconds(5);

std::vector<FilePlan> files_of(const Layout& layout) {
  std::vector<FilePlan> files;
  for (const PayloadFile& file : layout.files())
    files.push_back({file.name, file.size_bytes, file.grid_begin});
  return files;
}

// False when the time has passed first. Descriptors that are ready have their revents set.
bool poll_all(std::span<pollfd> descriptors, int at_most_ms) {
  int ready = 0;
  while ((ready = ::poll(descriptors.data(), descriptors.size(), at_most_ms)) < 0 &&
         errno == EINTR) {
  }
  if (ready < 0) throw_errno("poll");
  return ready > 0;
}

}  // namespace

MonitorClient::MonitorClient(const MonitorOptions& options, messages::Hello hello,
                             const SharedSlots& slots, const std::function<void()>& interrupted)
    : MonitorClient(options, std::move(hello), slots, interrupted, Channel::make_pair()) {}

MonitorClient::MonitorClient(const MonitorOptions& options, messages::Hello hello,
                             const SharedSlots& slots, const std::function<void()>& interrupted,
                             std::pair<Channel, Channel> ends)
    : channel_(std::move(ends.first)), process_(options.executable, hello.path, ends.second) {
  {
    const Channel its_end = std::move(ends.second);
  }  // or its death would not end the channel
  hello.drain_timeout_s = options.drain_timeout.count();
  try {
    greet(hello, slots, interrupted);
  } catch (const ChannelClosed&) {
    process_.wait_end(kEndsWithin);
    throw MonitorDied("the monitor " + options.executable + " " + process_.ending() +
                      " before it was ready");
  } catch (...) {
    channel_.hang_up();  // which ends the monitor, wherever it is
    process_.wait_end(kEndsWithin);
    throw;
  }
}

// Throws what the monitor is not ready for, ChannelClosed when it has ended.
void MonitorClient::greet(const messages::Hello& hello, const SharedSlots& slots,
                          const std::function<void()>& interrupted) {
  const Descriptor self = open_pidfd(::getpid());
  const std::array<int, 2> descriptors{slots.descriptor(), self.get()};
  send(hello, descriptors);
  std::array<pollfd, 1> awaited{{{channel_.descriptor(), POLLIN, 0}}};
  while (true) {
    poll_all(awaited, static_cast<int>(kHandshakePoll.count()));
    if (const std::optional<Message> message = channel_.receive()) {
      const messages::FromMonitor answer = messages::decode_from_monitor(message->bytes);
      if (std::holds_alternative<messages::Ready>(answer)) return;
      std::rethrow_exception(messages::to_error(std::get<messages::Refused>(answer).failure));
    }
    interrupted();
  }
}

MonitorClient::~MonitorClient() {
  channel_.hang_up();  // the sender may be waiting in it
  sending_.reset();
  if (receiving_.joinable()) {
    receiving_.request_stop();
    stop_receiving_.ring();
    receiving_.join();
  }
  process_.wait_end(kEndsWithin);
}

std::exception_ptr MonitorClient::death() const {
  const std::lock_guard lock(mutex_);
  return death_;
}

std::vector<std::string> MonitorClient::set_aside_after(uint64_t step,
                                                        const std::function<void()>& interrupted) {
  messages::Names answer = ask<messages::Names>(messages::SetAside{step}, interrupted);
  if (!answer.failure.text.empty()) std::rethrow_exception(messages::to_error(answer.failure));
  return std::move(answer.names);
}

void MonitorClient::keep(const std::set<uint64_t>& steps) try {
  send(messages::Keep{{steps.begin(), steps.end()}});
} catch (const ChannelClosed&) {
  // It has died: the receiver tells.
}

std::optional<std::string> MonitorClient::close(const std::function<void()>& interrupted) {
  if (death()) return std::nullopt;  // was told when it died
  try {
    if (!farewell_) farewell_ = ask<messages::Closed>(messages::Close{}, interrupted);
    while (!process_.wait_end(kAnswerPoll)) interrupted();
    if (farewell_->complaint.empty()) return std::nullopt;
    return farewell_->complaint;
  } catch (const MonitorDied& died) {
    return died.what();  // everything was committed by then
  }
}

uint64_t MonitorClient::last_sealed_step() const {
  const std::lock_guard lock(mutex_);
  return last_sealed_step_;
}

void MonitorClient::start(BlockQueue& full, Doorbell& pushed) {
  full_ = &full;
  bell_ = &pushed;
  sending_ = std::make_unique<WorkerThread>(sender_, pushed, "pccheck-send");
  receiving_ =
      start_thread("pccheck-receive", [this](const std::stop_token& stop) { receive_all(stop); });
}

void MonitorClient::add(std::shared_ptr<Checkpoint> checkpoint) {
  std::exception_ptr death;
  {
    const std::lock_guard lock(mutex_);
    in_flight_.push_back({.ticket = ++tickets_, .checkpoint = checkpoint});
    death = death_;
  }
  // It died after the engine looked: died() has not seen this one.
  if (death) checkpoint->failed_elsewhere(death);
  // Otherwise no ring: the first block, or the seal, is soon enough to tell the monitor of it, and
  // a thread that wakes up now would only take time from the update that begins.
}

size_t MonitorClient::in_flight() const {
  const std::lock_guard lock(mutex_);
  return in_flight_.size();
}

CommitCounts MonitorClient::counts() const {
  const std::lock_guard lock(mutex_);
  return counts_;
}

// Asked by the sender, which knows what the monitor has heard of the checkpoint.
bool MonitorClient::link(const std::shared_ptr<Checkpoint>& checkpoint, uint32_t file,
                         const std::string& from, const FileDigest& digest) {
  {
    const std::lock_guard lock(mutex_);
    const auto found = std::ranges::find(in_flight_, checkpoint, &InFlight::checkpoint);
    if (found == in_flight_.end()) return false;
    wish_granted_.reset();
    wish_ = messages::Link{found->ticket, file, from, digest.whole};
  }
  bell_->ring();
  bool granted;
  {
    std::unique_lock lock(mutex_);
    answered_.wait(lock, [&] { return wish_granted_ || death_; });
    wish_.reset();
    granted = wish_granted_.value_or(false);
  }
  if (granted) checkpoint->linked_elsewhere(file, digest);
  return granted;
}

void MonitorClient::look() { bell_->ring(); }

std::exception_ptr MonitorClient::refusal() const {
  const std::lock_guard lock(mutex_);
  return death_ ? death_ : outcome_unknown_;
}

std::optional<std::string> MonitorClient::take_complaint() {
  const std::lock_guard lock(mutex_);
  return std::exchange(complaint_, std::nullopt);
}

void MonitorClient::send(const messages::FromTrainer& message, std::span<const int> descriptors) {
  const std::vector<std::byte> bytes = messages::encode(message);
  const std::lock_guard lock(send_mutex_);
  channel_.send(bytes, descriptors);
}

template <typename Reply>
Reply MonitorClient::ask(const messages::FromTrainer& question,
                         const std::function<void()>& interrupted) {
  try {
    send(question);
  } catch (const ChannelClosed&) {
    // The receiver finds out what has happened.
  }
  std::unique_lock lock(mutex_);
  // Another kind of answer is a late one, to a question whose asker was interrupted.
  const auto answered = [&] { return answer_ && std::holds_alternative<Reply>(*answer_); };
  while (!answered_.wait_for(lock, kAnswerPoll, [&] { return answered() || death_; })) {
    lock.unlock();
    interrupted();
    lock.lock();
  }
  if (!answered()) std::rethrow_exception(death_);
  Reply reply = std::get<Reply>(std::move(*answer_));
  answer_.reset();
  return reply;
}

// -- the sender -----------------------------------------------------------------------------------

std::vector<MonitorClient::InFlight> MonitorClient::all_in_flight() const {
  const std::lock_guard lock(mutex_);
  return {in_flight_.begin(), in_flight_.end()};
}

MonitorClient::InFlight* MonitorClient::find(uint64_t ticket) {
  for (InFlight& one : in_flight_)
    if (one.ticket == ticket) return &one;
  return nullptr;
}

bool MonitorClient::send_one() noexcept {
  try {
    // Looked at before the queue: of a checkpoint that is staged whole by now, every block is in
    // the queue or has been.
    std::vector<InFlight> staged;
    const bool dead = death() != nullptr;  // then there is nobody to tell, but blocks to let go of
    for (const InFlight& one : all_in_flight()) {
      if (finish(one) || (!dead && announce(one))) return true;
      if (!one.over && (one.checkpoint->staging_ended() || one.checkpoint->error()))
        staged.push_back(one);
    }
    if (ask_for_link()) return true;
    if (std::unique_ptr<Block> block = full_->try_pop()) {
      send_block(std::move(block));
      return true;
    }
    bool worked = false;
    for (const InFlight& one : staged) worked = send_end(one) || worked;
    return worked;
  } catch (const ChannelClosed&) {
  } catch (const std::exception& error) {
    // Out of memory, out of descriptors: the two do not know any more what the other knows.
    const std::lock_guard lock(mutex_);
    sending_failed_ = error.what();
    channel_.hang_up();
  }
  return false;  // the receiver fails what is in flight, and rings
}

// Begin, before anything else of a checkpoint.
bool MonitorClient::announce(const InFlight& one) {
  const Checkpoint& checkpoint = *one.checkpoint;
  if (!one.begun) {
    send(messages::Begin{one.ticket, checkpoint.identity(), checkpoint.name(),
                         files_of(*checkpoint.layout())});
    const std::lock_guard lock(mutex_);
    if (InFlight* found = find(one.ticket)) found->begun = true;
    return true;
  }
  const std::vector<std::shared_ptr<const Layout>> additions = checkpoint.additions();
  if (one.over || one.additions == additions.size()) return false;
  send(messages::Addition{one.ticket, files_of(*additions[one.additions])});
  const std::lock_guard lock(mutex_);
  if (InFlight* found = find(one.ticket)) ++found->additions;
  return true;
}

// With everything sent that has to precede its blocks and links. It may have been begun, or have
// got files more, after send_one() looked at what is in flight and before it took the block.
std::optional<MonitorClient::InFlight> MonitorClient::announced(const Checkpoint& checkpoint) {
  while (true) {
    std::optional<InFlight> one;
    {
      const std::lock_guard lock(mutex_);
      const auto found = std::ranges::find(
          in_flight_, &checkpoint, [](const InFlight& other) { return other.checkpoint.get(); });
      if (death_ || found == in_flight_.end()) return std::nullopt;
      one = *found;
    }
    if (!announce(*one)) return one;
  }
}

bool MonitorClient::ask_for_link() {
  std::shared_ptr<Checkpoint> checkpoint;
  std::optional<messages::Link> wish;
  {
    const std::lock_guard lock(mutex_);
    wish = std::exchange(wish_, std::nullopt);
    if (!wish) return false;
    const InFlight* const found = find(wish->ticket);
    if (found == nullptr || found->over) {  // failed meanwhile: the monitor knows it no more
      wish_granted_ = false;
      answered_.notify_all();
      return true;
    }
    checkpoint = found->checkpoint;
  }
  if (announced(*checkpoint)) send(*wish);
  return true;
}

void MonitorClient::send_block(std::unique_ptr<Block> block) {
  Checkpoint& checkpoint = *block->checkpoint;
  if (checkpoint.error()) return;  // the block is dropped, its slot comes free
  const std::optional<InFlight> one = announced(checkpoint);
  if (!one) return;
  messages::Staged message{.ticket = one->ticket,
                           .file = block->file,
                           .block = block->index,
                           .bytes = block->bytes,
                           .slot = block->slot(),
                           .crc = block->crc,
                           .summed = block->summed == block->bytes};
  {
    const std::lock_guard lock(mutex_);
    // Lent before it is sent: it may be back before send() returns.
    if (death_) return;
    lent_[message.slot] = std::move(block);
  }
  send(message);
}

bool MonitorClient::send_end(const InFlight& one) {
  Checkpoint& checkpoint = *one.checkpoint;
  const bool whole = checkpoint.staging_ended() && !checkpoint.error();
  if (whole) {
    try {
      checkpoint.begin_publishing();
    } catch (...) {
      checkpoint.fail(std::current_exception());
      return true;  // looked at again, as a failed one
    }
    const std::span<const std::byte> manifest = checkpoint.manifest();
    messages::Seal seal{one.ticket, {manifest.begin(), manifest.end()}};
    for (const auto& [file, digest] : checkpoint.digests()) seal.digests.push_back({file, digest});
    send(seal);
  } else {
    send(messages::Abandon{one.ticket, messages::failure_of(checkpoint.error()).text});
  }
  const std::lock_guard lock(mutex_);
  if (InFlight* found = find(one.ticket)) found->over = true;
  if (whole) last_sealed_step_ = checkpoint.identity().step;
  return true;
}

// The acknowledgement, once the monitor is done with a checkpoint and so are the threads here.
bool MonitorClient::finish(const InFlight& one) {
  Checkpoint& checkpoint = *one.checkpoint;
  const bool committed = one.committed == true;
  {
    const std::lock_guard lock(mutex_);
    if (!one.committed && !death_) return false;
    if (!committed && !checkpoint.ready_to_discard()) return false;
    std::erase_if(in_flight_, [&](const InFlight& other) { return other.ticket == one.ticket; });
    if (committed) {
      ++counts_.committed;
      const uint64_t linked = checkpoint.linked_bytes();
      counts_.bytes += checkpoint.payload_bytes() - linked;
      counts_.bytes_linked += linked;
      counts_.last_durable_seconds = checkpoint.durable_seconds();
      counts_.durable_seconds += counts_.last_durable_seconds;
      counts_.last_committed_step = checkpoint.identity().step;
    } else {
      ++counts_.failed;
    }
    checkpoint.end(committed ? Checkpoint::State::committed : Checkpoint::State::failed);
  }
  checkpoint.announce_end();
  return true;
}

// -- the receiver ---------------------------------------------------------------------------------

void MonitorClient::receive_all(const std::stop_token& stop) {
  std::string how;
  try {
    std::array<pollfd, 3> awaited{{{channel_.descriptor(), POLLIN, 0},
                                   {process_.descriptor(), POLLIN, 0},
                                   {stop_receiving_.descriptor(), POLLIN, 0}}};
    while (true) {
      poll_all(awaited, -1);
      if (stop.stop_requested()) return;
      const bool ended = awaited[1].revents != 0;  // before looking for the last it has said
      while (const std::optional<Message> message = channel_.receive())
        take(messages::decode_from_monitor(message->bytes));
      if (ended) break;
    }
  } catch (const ChannelClosed&) {
    if (!process_.wait_end(kEndsWithin)) how = "does not answer any more";
  } catch (const std::exception& error) {
    how = std::string("cannot be understood: ") + error.what();
  }
  {
    const std::lock_guard lock(mutex_);
    if (closed_) return;  // as it was asked to
    if (!sending_failed_.empty()) how = "could not be told: " + sending_failed_;
  }
  died(how.empty() ? process_.ending() : how);
}

void MonitorClient::take(const messages::FromMonitor& message) {
  std::unique_ptr<Block> freed;  // let go of outside the lock
  std::shared_ptr<Checkpoint> failing;
  std::exception_ptr error;
  {
    const std::lock_guard lock(mutex_);
    if (const auto* slot = std::get_if<messages::Freed>(&message)) {
      if (auto lent = lent_.extract(slot->slot)) freed = std::move(lent.mapped());
    } else if (const auto* failed = std::get_if<messages::Failing>(&message)) {
      if (InFlight* found = find(failed->ticket)) failing = found->checkpoint;
      error = messages::to_error(failed->failure);
    } else if (const auto* ended = std::get_if<messages::Ended>(&message)) {
      InFlight* found = find(ended->ticket);
      if (found == nullptr) return;
      found->committed = ended->committed;
      if (ended->committed) {
        found->checkpoint->published_elsewhere();
      } else {
        failing = found->checkpoint;
        error = messages::to_error(ended->failure);
        if (ended->outcome_unknown)
          outcome_unknown_ = std::make_exception_ptr(OutcomeUnknown(ended->failure.text));
      }
    } else if (const auto* linked = std::get_if<messages::Linked>(&message)) {
      wish_granted_ = linked->linked;
      answered_.notify_all();
    } else if (const auto* complaint = std::get_if<messages::Complaint>(&message)) {
      if (!complaint_) complaint_ = complaint->text;
    } else {
      closed_ = closed_ || std::holds_alternative<messages::Closed>(message);
      answer_ = message;
      answered_.notify_all();
    }
  }
  if (failing) failing->failed_elsewhere(error);
  if (freed) {
    freed->checkpoint->block_written_elsewhere(freed->bytes);
    return;  // letting go of it rings, where anybody is interested
  }
  bell_->ring();
}

void MonitorClient::died(const std::string& how) {
  const auto death = std::make_exception_ptr(
      MonitorDied("the monitor (process " + std::to_string(process_.id()) + ") " + how +
                  "; checkpoints that were not committed by then are lost"));
  std::map<size_t, std::unique_ptr<Block>> lent;
  std::vector<std::shared_ptr<Checkpoint>> lost;
  {
    const std::lock_guard lock(mutex_);
    death_ = death;
    lent.swap(lent_);
    for (const InFlight& one : in_flight_)
      if (!one.committed) lost.push_back(one.checkpoint);
  }
  answered_.notify_all();
  channel_.hang_up();
  for (const std::shared_ptr<Checkpoint>& checkpoint : lost) checkpoint->failed_elsewhere(death);
  lent.clear();
  bell_->ring();
}

}  // namespace pccheck
