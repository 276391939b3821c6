// Messages between two processes of one machine, whole and in order, over a SOCK_SEQPACKET socket;
// descriptors may go with them. What was sent arrives though the sender be dead.
//
// send() and receive() may each be called by one thread at a time.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cpp/descriptor.h"

namespace pccheck {

struct Message {
  std::vector<std::byte> bytes;
  std::vector<Descriptor> descriptors;
};

class ChannelClosed : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Channel {
 public:
  explicit Channel(Descriptor socket) : socket_(std::move(socket)) {}

  // The two ends of a new one. Throws std::system_error.
  static std::pair<Channel, Channel> make_pair();

  // Waits while the other end has not fetched what it was sent before. Throws ChannelClosed when
  // there is no other end any more, std::system_error.
  void send(std::span<const std::byte> bytes, std::span<const int> descriptors = {});

  // As send(), but false instead of waiting.
  bool try_send(std::span<const std::byte> bytes, std::span<const int> descriptors = {});

  // The next message, or nothing when none has arrived yet. Throws ChannelClosed when none will
  // ever come, std::system_error.
  std::optional<Message> receive();

  // Whoever waits in send() goes on, with ChannelClosed. Any thread.
  void hang_up() noexcept;

  int descriptor() const { return socket_.get(); }  // to poll, or to be passed on

 private:
  bool send_with(int flags, std::span<const std::byte> bytes, std::span<const int> descriptors);

  Descriptor socket_;
};

}  // namespace pccheck
