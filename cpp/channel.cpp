#include "cpp/channel.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "cpp/posix_file.h"

namespace pccheck {
namespace {

// A packet is one byte that says where the message is, then the message itself or nothing. What is
// too long for a packet travels in memory of its own, whose descriptor comes last.
constexpr std::byte kInline{0};
constexpr std::byte kInMemory{1};
constexpr size_t kMostInline = size_t{16} << 10;
constexpr size_t kMostDescriptors = 4;
constexpr size_t kMostInMemory = size_t{2} << 30;

Descriptor memory_holding(std::span<const std::byte> bytes) {
  Descriptor memory(::memfd_create("pccheck-message", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!memory) throw_errno("memfd_create of a message");
  for (size_t done = 0; done < bytes.size();) {
    const ssize_t written = ::write(memory.get(), bytes.data() + done, bytes.size() - done);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) throw_errno("write of a message");
    done += static_cast<size_t>(written);
  }
  return memory;
}

std::vector<std::byte> contents_of(const Descriptor& memory) {
  struct stat status{};
  if (::fstat(memory.get(), &status) != 0) throw_errno("fstat of a message");
  if (static_cast<size_t>(status.st_size) > kMostInMemory)
    throw std::runtime_error("a message of " + std::to_string(status.st_size) + " bytes");
  std::vector<std::byte> bytes(static_cast<size_t>(status.st_size));
  for (size_t done = 0; done < bytes.size();) {
    const ssize_t read =
        ::pread(memory.get(), bytes.data() + done, bytes.size() - done, static_cast<off_t>(done));
    if (read < 0 && errno == EINTR) continue;
    if (read < 0) throw_errno("pread of a message");
    if (read == 0) throw std::runtime_error("a message shrank while it was read");
    done += static_cast<size_t>(read);
  }
  return bytes;
}

union Control {
  std::array<char, CMSG_SPACE(sizeof(int) * kMostDescriptors)> bytes;
  cmsghdr alignment;
};

}  // namespace

std::pair<Channel, Channel> Channel::make_pair() {
  std::array<int, 2> ends{};
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends.data()) != 0)
    throw_errno("socketpair");
  Descriptor one(ends[0]), other(ends[1]);
  return {Channel(std::move(one)), Channel(std::move(other))};
}

void Channel::send(std::span<const std::byte> bytes, std::span<const int> descriptors) {
  send_with(0, bytes, descriptors);
}

bool Channel::try_send(std::span<const std::byte> bytes, std::span<const int> descriptors) {
  return send_with(MSG_DONTWAIT, bytes, descriptors);
}

bool Channel::send_with(int flags, std::span<const std::byte> bytes,
                        std::span<const int> descriptors) {
  std::vector<int> passed(descriptors.begin(), descriptors.end());
  Descriptor memory;
  std::byte where = kInline;
  std::array<iovec, 2> parts{{{&where, 1}, {const_cast<std::byte*>(bytes.data()), bytes.size()}}};
  if (bytes.size() > kMostInline) {
    where = kInMemory;
    memory = memory_holding(bytes);
    passed.push_back(memory.get());
    parts[1].iov_len = 0;
  }
  if (passed.size() > kMostDescriptors) throw std::invalid_argument("too many descriptors");

  msghdr header{};
  header.msg_iov = parts.data();
  header.msg_iovlen = parts.size();
  Control control{};
  if (!passed.empty()) {
    header.msg_control = control.bytes.data();
    header.msg_controllen = CMSG_SPACE(sizeof(int) * passed.size());
    cmsghdr* const rights = CMSG_FIRSTHDR(&header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int) * passed.size());
    std::memcpy(CMSG_DATA(rights), passed.data(), sizeof(int) * passed.size());
  }
  while (::sendmsg(socket_.get(), &header, MSG_NOSIGNAL | flags) < 0) {
    if (errno == EINTR) continue;
    if (errno == EAGAIN || errno == EWOULDBLOCK) return false;
    if (errno == EPIPE || errno == ECONNRESET || errno == ENOTCONN)
      throw ChannelClosed("the other process has gone");
    throw_errno("sendmsg");
  }
  return true;
}

std::optional<Message> Channel::receive() {
  std::byte where{};
  std::vector<std::byte> bytes(kMostInline);
  std::array<iovec, 2> parts{{{&where, 1}, {bytes.data(), bytes.size()}}};
  msghdr header{};
  header.msg_iov = parts.data();
  header.msg_iovlen = parts.size();
  Control control{};
  header.msg_control = control.bytes.data();
  header.msg_controllen = control.bytes.size();
  ssize_t received = 0;
  while ((received = ::recvmsg(socket_.get(), &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC)) < 0) {
    // ECONNRESET is told once, ahead of what still waits to be received: the other end has gone
    // without having read everything that we had sent.
    if (errno == EINTR || errno == ECONNRESET) continue;
    if (errno == EAGAIN || errno == EWOULDBLOCK) return std::nullopt;
    throw_errno("recvmsg");
  }
  if (received == 0) throw ChannelClosed("the other process has gone");
  Message message;
  for (cmsghdr* part = CMSG_FIRSTHDR(&header); part != nullptr; part = CMSG_NXTHDR(&header, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    std::vector<int> passed((part->cmsg_len - CMSG_LEN(0)) / sizeof(int));
    std::memcpy(passed.data(), CMSG_DATA(part), passed.size() * sizeof(int));
    for (const int fd : passed) message.descriptors.emplace_back(fd);
  }
  if (where == kInMemory) {
    if (message.descriptors.empty()) throw std::runtime_error("a message came without its memory");
    const Descriptor memory = std::move(message.descriptors.back());
    message.descriptors.pop_back();
    message.bytes = contents_of(memory);
  } else {
    bytes.resize(static_cast<size_t>(received) - 1);
    message.bytes = std::move(bytes);
  }
  return message;
}

void Channel::hang_up() noexcept { ::shutdown(socket_.get(), SHUT_RDWR); }

}  // namespace pccheck
