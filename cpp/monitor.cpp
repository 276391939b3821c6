#include "cpp/monitor.h"

#include <poll.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <stdexcept>

#include "cpp/posix_file.h"

namespace pccheck {
namespace {

constexpr int64_t kLongestWaitMs = 60'000;  // what poll() can count has an end

bool is_readable(int descriptor) {
  pollfd one{descriptor, POLLIN, 0};
  return ::poll(&one, 1, 0) > 0;
}

// What lies beyond all clocks is no limit.
Clock::time_point in_seconds(double seconds) {
  constexpr double kForEver = 1e9;
  if (seconds >= kForEver) return Clock::time_point::max();
  return Clock::now() +
         std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string("the trainer sent ") + what);
}

}  // namespace

Monitor::Borrowed::Borrowed(Descriptor memory, size_t slot_bytes, Channel& channel, Wake& wake)
    : memory_(std::move(memory)),
      slot_bytes_(slot_bytes),
      count_(memory_.bytes().size() / slot_bytes),
      channel_(channel),
      wake_(wake) {
  released_.reserve(count_);  // release() must not allocate
}

std::span<std::byte> Monitor::Borrowed::slot(size_t index) {
  return memory_.bytes().subspan(index * slot_bytes_, slot_bytes_);
}

bool Monitor::Borrowed::tell(size_t index) noexcept {
  try {
    return channel_.try_send(messages::encode(messages::FromMonitor(messages::Freed{index})));
  } catch (const std::exception&) {
    return false;  // the monitor's own thread finds out why
  }
}

void Monitor::Borrowed::release(size_t index) noexcept {
  if (tell(index)) return;
  {
    const std::lock_guard lock(mutex_);
    released_.push_back(index);
  }
  wake_.ring();
}

std::vector<size_t> Monitor::Borrowed::take_released() {
  std::vector<size_t> taken;
  taken.reserve(count_);
  const std::lock_guard lock(mutex_);
  taken.swap(released_);
  return taken;
}

Monitor::Monitor(Channel channel) : channel_(std::move(channel)) {}

// A block that nobody has written rings for the committer as it goes, which has to be there then.
Monitor::~Monitor() {
  while (full_.try_pop()) {
  }
}

Monitor::Outcome Monitor::run() {
  try {
    begin();
  } catch (const std::exception&) {
    if (!trainer_gone_) say(messages::Refused{messages::failure_of(std::current_exception())});
    send_what_waits();
    return Outcome::refused;
  }
  std::exception_ptr gave_up;
  try {
    serve();
  } catch (const std::exception&) {
    gave_up = std::current_exception();
    channel_.hang_up();
    trainer_has_gone("the monitor could not go on");
    serve();
  }
  const bool idle = persister_->in_flight() == 0;
  if (!idle) return Outcome::drain_timeout;
  persister_.reset();
  std::string complaint;
  try {
    run_->remove_spares();
  } catch (const std::exception& error) {
    complaint = error.what();
  }
  run_.reset();  // the lock is free before the trainer hears that it is
  if (gave_up) std::rethrow_exception(gave_up);
  if (!closing_) return Outcome::trainer_died;
  say(messages::Closed{complaint});
  send_what_waits();
  return Outcome::closed;
}

void Monitor::begin() {
  pollfd hello{channel_.descriptor(), POLLIN, 0};
  std::optional<Message> first;
  while (!(first = channel_.receive()))
    if (::poll(&hello, 1, -1) < 0 && errno != EINTR) throw_errno("poll");
  messages::FromTrainer message = messages::decode_from_trainer(first->bytes);
  require(std::holds_alternative<messages::Hello>(message), "something else than its greeting");
  hello_ = std::get<messages::Hello>(std::move(message));
  if (hello_.version != messages::kVersion || first->descriptors.size() != 2)
    throw std::runtime_error(
        "the monitor and the package were not built together; install the package anew");
  trainer_ = std::move(first->descriptors[1]);
  require(hello_.block_bytes != 0, "blocks without a size");
  slots_.emplace(std::move(first->descriptors[0]), hello_.block_bytes, channel_, wake_);
  persister_.emplace(hello_.writer_threads);
  run_ =
      open_run_directory(hello_.path, {hello_.keep_last, hello_.max_spares, hello_.keep_every},
                         std::chrono::duration<double>(hello_.lock_timeout_s), [&] {
                           // It says nothing before it has heard that we are ready.
                           if (!is_readable(trainer_.get()) && !is_readable(channel_.descriptor()))
                             return;
                           trainer_gone_ = true;
                           throw std::runtime_error("the trainer has ended");
                         });
  persister_->start(full_, full_bell_);
  say(messages::Ready{});
  send_what_waits();
}

// Until there is nothing left to do, or no time.
void Monitor::serve() {
  while (true) {
    wake_.clear();
    // Before the end is looked for and before poll(): it may have been the last there was to do,
    // and there may be no room for all of it in the channel.
    tell_what_happened();
    if (trainer_gone_ || closing_) {
      if (persister_->in_flight() == 0 && in_flight_.empty() && unsent_.empty()) return;
      if (Clock::now() >= until_) return;
    }
    const auto left = until_ - Clock::now();
    const int64_t left_ms = std::chrono::ceil<std::chrono::milliseconds>(left).count();
    const int at_most = until_ == Clock::time_point::max()
                            ? -1
                            : static_cast<int>(std::clamp<int64_t>(left_ms, 1, kLongestWaitMs));
    const auto channel_events = static_cast<short>(POLLIN | (unsent_.empty() ? 0 : POLLOUT));
    std::array<pollfd, 3> awaited{{{wake_.descriptor(), POLLIN, 0},
                                   {channel_.descriptor(), channel_events, 0},
                                   {trainer_.get(), POLLIN, 0}}};
    if (trainer_gone_) awaited[1].fd = awaited[2].fd = -1;
    if (::poll(awaited.data(), awaited.size(), at_most) < 0 && errno != EINTR) throw_errno("poll");
    if (trainer_gone_) continue;
    // In this order: what a trainer said before it died is all there once it is known to be dead.
    const bool dead = awaited[2].revents != 0 || is_readable(trainer_.get());
    if (!receive_all()) {
      trainer_has_gone("the channel to the trainer has ended");
    } else if (dead) {
      trainer_has_gone("the trainer has died");
    }
    if (!trainer_gone_) send_what_waits();
  }
}

// False when nothing will ever come any more.
bool Monitor::receive_all() try {
  while (std::optional<Message> message = channel_.receive())
    take(messages::decode_from_trainer(message->bytes));
  return true;
} catch (const ChannelClosed&) {
  return false;
}

Checkpoint& Monitor::find(uint64_t ticket) {
  const auto found = std::ranges::find(in_flight_, ticket, &InFlight::ticket);
  require(found != in_flight_.end(), "a ticket that is not in flight");
  return *found->checkpoint;
}

std::vector<PayloadFile> Monitor::files_of(const std::vector<messages::FilePlan>& plans) const {
  std::vector<PayloadFile> files;
  for (const messages::FilePlan& plan : plans)
    files.push_back({.name = plan.name,
                     .header = {},
                     .grid_begin = plan.grid_begin,
                     .size_bytes = plan.size_bytes,
                     .tensors = {}});
  return files;
}

void Monitor::take(messages::FromTrainer message) {
  if (auto* begun = std::get_if<messages::Begin>(&message)) {
    auto checkpoint = std::make_shared<Checkpoint>(
        begun->identity, begun->name, Layout::of_files(files_of(begun->files), hello_.block_bytes),
        make_directory_target(run_, begun->name),
        Checkpoint::Bells{[] {},
                          [this, &persister = *persister_] {
                            persister.look();
                            wake_.ring();
                          }});
    in_flight_.push_back({begun->ticket, checkpoint});
    persister_->add(std::move(checkpoint));
  } else if (auto* addition = std::get_if<messages::Addition>(&message)) {
    find(addition->ticket).extend(Layout::of_files(files_of(addition->files), hello_.block_bytes));
  } else if (const auto* staged = std::get_if<messages::Staged>(&message)) {
    take_block(*staged);
  } else if (const auto* link = std::get_if<messages::Link>(&message)) {
    this->link(*link);
  } else if (auto* seal = std::get_if<messages::Seal>(&message)) {
    this->seal(std::move(*seal));
    persister_->look();  // one that has failed already waits for this, and does not ring
  } else if (const auto* abandon = std::get_if<messages::Abandon>(&message)) {
    Checkpoint& checkpoint = find(abandon->ticket);
    checkpoint.fail(std::make_exception_ptr(std::runtime_error(abandon->reason)));
    checkpoint.stop_staging();
  } else if (const auto* aside = std::get_if<messages::SetAside>(&message)) {
    messages::Names names;
    try {
      names.names = run_->set_aside_after(aside->step);
    } catch (const std::exception&) {
      names.failure = messages::failure_of(std::current_exception());
    }
    say(names);
  } else if (const auto* keep = std::get_if<messages::Keep>(&message)) {
    run_->keep({keep->steps.begin(), keep->steps.end()});
  } else if (std::holds_alternative<messages::Close>(message)) {
    closing_ = true;
  } else {
    require(false, "a second greeting");
  }
}

void Monitor::take_block(const messages::Staged& staged) {
  const std::shared_ptr<Checkpoint> checkpoint = find(staged.ticket).shared_from_this();
  require(staged.slot < slots_->count() && staged.bytes <= hello_.block_bytes &&
              checkpoint->has_block(staged.file, staged.block, staged.bytes),
          "a block that cannot be");
  auto block = std::make_unique<Block>(checkpoint, staged.file, staged.block, staged.bytes,
                                       SlotLease(*slots_, staged.slot));
  block->filled = staged.bytes;
  block->summed = staged.summed ? staged.bytes : 0;
  block->crc = staged.crc;
  full_.push(std::move(block));
}

void Monitor::link(const messages::Link& link) {
  Checkpoint& checkpoint = find(link.ticket);
  require(checkpoint.may_link(link.file), "a link that cannot be");
  bool linked = false;
  try {
    linked = checkpoint.link(link.file, link.from, {link.digest});
  } catch (const std::exception&) {
    checkpoint.fail(std::current_exception());
  }
  // A refusal may come from a commit that the trainer has not heard of: what that has, it may wish.
  if (!linked) tell_what_happened();
  say(messages::Linked{linked});
}

void Monitor::seal(messages::Seal seal) {
  Checkpoint& checkpoint = find(seal.ticket);
  for (const auto& [file, digest] : seal.digests) {
    require(checkpoint.has_file(file), "the digest of a file that is none");
    checkpoint.digested(file, {digest});
  }
  checkpoint.seal(std::move(seal.manifest), std::nullopt);
}

void Monitor::tell_what_happened() {
  // Ends before slots are looked at, and told after them: whoever hears of an end has its slots.
  std::vector<messages::FromMonitor> news;
  std::erase_if(in_flight_, [&](InFlight& one) {
    const Checkpoint& checkpoint = *one.checkpoint;
    const Checkpoint::State state = checkpoint.state();
    const std::exception_ptr error = checkpoint.error();
    if (state != Checkpoint::State::in_flight) {
      messages::Ended ended{.ticket = one.ticket,
                            .committed = state == Checkpoint::State::committed,
                            .outcome_unknown = error && error == persister_->refusal(),
                            .failure = messages::failure_of(error)};
      if (!ended.committed && trainer_gone_)
        std::fprintf(stderr, "pccheck_ext: checkpoint %s/%s was not committed: %s\n",
                     hello_.path.c_str(), checkpoint.name().c_str(), ended.failure.text.c_str());
      news.emplace_back(std::move(ended));
      return true;
    }
    if (error && !one.failing_told) {
      one.failing_told = true;
      news.emplace_back(messages::Failing{one.ticket, messages::failure_of(error)});
    }
    return false;
  });
  for (const size_t slot : slots_->take_released()) say(messages::Freed{slot});
  for (const messages::FromMonitor& one : news) say(one);
  if (const std::optional<std::string> complaint = persister_->take_complaint())
    say(messages::Complaint{*complaint});
  send_what_waits();
}

void Monitor::trainer_has_gone(const std::string& how) {
  trainer_gone_ = true;
  unsent_.clear();
  until_ = in_seconds(hello_.drain_timeout_s);
  for (const InFlight& one : in_flight_) {
    if (one.checkpoint->staging_ended()) continue;  // sealed: it needs the trainer no more
    one.checkpoint->fail(
        std::make_exception_ptr(std::runtime_error(how + " before everything was staged")));
    one.checkpoint->stop_staging();
  }
}

void Monitor::say(const messages::FromMonitor& message) {
  if (!trainer_gone_) unsent_.push_back(messages::encode(message));
}

void Monitor::send_what_waits() {
  try {
    while (!unsent_.empty() && channel_.try_send(unsent_.front())) unsent_.pop_front();
  } catch (const ChannelClosed&) {
    unsent_.clear();  // what there is to be read of it comes first
  }
}

}  // namespace pccheck
