// Messages arrive whole and in order, with their descriptors, whatever becomes of their sender.
#include "cpp/channel.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <thread>

#include "tests/cpp/bytes.h"
#include "tests/cpp/monitor_world.h"

namespace pccheck::test {
namespace {

constexpr size_t kAtOnce = 16 << 10;  // what is longer goes another way

struct Ends {
  Ends() : Ends(Channel::make_pair()) {}
  explicit Ends(std::pair<Channel, Channel> pair)
      : one(std::in_place, std::move(pair.first)), other(std::in_place, std::move(pair.second)) {}
  std::optional<Channel> one, other;
};

bool becomes_readable(const Channel& channel) {
  pollfd readable{channel.descriptor(), POLLIN, 0};
  int ready = 0;
  while ((ready = ::poll(&readable, 1, 60'000)) < 0 && errno == EINTR) {
  }
  return ready > 0;
}

Bytes next(Channel& channel) {
  EXPECT_TRUE(becomes_readable(channel));
  std::optional<Message> message = channel.receive();
  EXPECT_TRUE(message);
  return message ? std::move(message->bytes) : Bytes{};
}

// Until no more go; how many those were.
size_t fill(Channel& channel) {
  size_t sent = 0;
  while (channel.try_send(to_bytes(std::to_string(sent)))) ++sent;
  return sent;
}

TEST(Channel, MessagesOfAllLengthsArriveWholeAndInOrder) {
  Ends ends;
  Random random(1);
  std::vector<Bytes> sent;
  for (const size_t size : {size_t{0}, size_t{1}, size_t{2}, kAtOnce - 1, kAtOnce, kAtOnce + 1,
                            size_t{1} << 20, size_t{0}, size_t{5}})
    sent.push_back(random_bytes(random, size));
  for (const Bytes& message : sent) ends.one->send(message);
  for (const Bytes& message : sent) {
    const std::optional<Message> arrived = ends.other->receive();
    ASSERT_TRUE(arrived);
    ASSERT_EQ(arrived->bytes, message);
    EXPECT_TRUE(arrived->descriptors.empty());
  }
  EXPECT_FALSE(ends.other->receive());
}

TEST(Channel, BothEndsSpeak) {
  Ends ends;
  ends.one->send(to_bytes("to the other"));
  ends.other->send(to_bytes("to the one"));
  EXPECT_EQ(to_text(next(*ends.one)), "to the one");
  EXPECT_EQ(to_text(next(*ends.other)), "to the other");
}

TEST(Channel, DescriptorsComeWithShortMessagesAndWithLongOnes) {
  for (const size_t size : {size_t{3}, 2 * kAtOnce}) {
    Ends ends;
    std::array<int, 2> pipe{};
    ASSERT_EQ(::pipe(pipe.data()), 0);
    const Bytes sent(size, std::byte{9});
    ends.one->send(sent, pipe);
    const std::optional<Message> arrived = ends.other->receive();
    ASSERT_TRUE(arrived);
    EXPECT_EQ(arrived->bytes, sent);
    ASSERT_EQ(arrived->descriptors.size(), 2u);
    ASSERT_EQ(::write(arrived->descriptors[1].get(), "x", 1), 1);
    char byte = 0;
    ASSERT_EQ(::read(pipe[0], &byte, 1), 1) << "they came in another order";
    EXPECT_EQ(byte, 'x');
    for (const Descriptor& descriptor : arrived->descriptors)
      EXPECT_NE(::fcntl(descriptor.get(), F_GETFD) & FD_CLOEXEC, 0);
    for (const int end : pipe) ::close(end);
  }
}

TEST(Channel, MoreDescriptorsThanThereIsRoomForAreRefused) {
  Ends ends;
  const std::array<int, 5> many{0, 0, 0, 0, 0};
  EXPECT_THROW(ends.one->send(to_bytes("five"), many), std::invalid_argument);
  EXPECT_THROW(ends.one->send(Bytes(2 * kAtOnce), std::span(many).first(4)), std::invalid_argument);
  EXPECT_NO_THROW(ends.one->send(to_bytes("four"), std::span(many).first(4)));
  EXPECT_EQ(ends.other->receive()->descriptors.size(), 4u);
}

TEST(Channel, NoDescriptorIsLeftOpen) {
  const std::set<int> before = open_descriptors();
  {
    Ends ends;
    const std::array<int, 1> passed{0};
    for (int time = 0; time < 20; ++time) {
      ends.one->send(Bytes(kAtOnce + 1));
      ends.one->send(to_bytes("x"), passed);
      ends.other->receive();
      ends.other->receive();
    }
    ends.one->send(Bytes(kAtOnce + 1), passed);  // never fetched
  }
  EXPECT_EQ(open_descriptors(), before);
}

TEST(Channel, WhatWasSentArrivesThoughTheSenderBeGone) {
  Ends ends;
  for (int i = 0; i < 10; ++i) ends.one->send(Bytes(static_cast<size_t>(i) * 4000, std::byte{1}));
  ends.one.reset();
  for (int i = 0; i < 10; ++i)
    ASSERT_EQ(next(*ends.other).size(), static_cast<size_t>(i) * 4000) << i;
  EXPECT_THROW(ends.other->receive(), ChannelClosed);
  EXPECT_THROW(ends.other->receive(), ChannelClosed) << "and so it stays";
}

TEST(Channel, WhatWasSentArrivesThoughTheSenderLeftItsOwnMessagesUnread) {
  Ends ends;
  ends.other->send(to_bytes("never read"));
  ends.one->send(to_bytes("first"));
  ends.one->send(Bytes(3 * kAtOnce));
  ends.one.reset();  // the kernel tells of the unread one by an error, ahead of what was sent
  EXPECT_EQ(to_text(next(*ends.other)), "first");
  EXPECT_EQ(next(*ends.other).size(), 3 * kAtOnce);
  EXPECT_THROW(ends.other->receive(), ChannelClosed);
}

TEST(Channel, WhatAKilledProcessSentArrives) {
  Ends ends;
  const int end = ::dup(ends.one->descriptor());  // a child closes those that we own
  const pid_t child = ::fork();
  if (child == 0) {
    const iovec parts{const_cast<char*>("\0last words"), 11};
    msghdr header{};
    header.msg_iov = const_cast<iovec*>(&parts);
    header.msg_iovlen = 1;
    ::sendmsg(end, &header, 0);
    ::raise(SIGKILL);
  }
  ::close(end);
  ends.other->send(to_bytes("never read"));
  ends.one.reset();
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(to_text(next(*ends.other)), "last words");
  EXPECT_THROW(ends.other->receive(), ChannelClosed);
}

TEST(Channel, SendingToNobodySaysSoWithoutASignal) {
  Ends ends;
  ends.other.reset();
  EXPECT_THROW(ends.one->send(to_bytes("hello")), ChannelClosed);
  EXPECT_THROW(ends.one->try_send(to_bytes("hello")), ChannelClosed);
  EXPECT_THROW(ends.one->send(Bytes(2 * kAtOnce)), ChannelClosed);
}

TEST(Channel, AFullOneTakesNothingMoreUntilSomethingIsFetched) {
  Ends ends;
  const size_t sent = fill(*ends.one);
  EXPECT_GT(sent, 20u);
  EXPECT_FALSE(ends.one->try_send(to_bytes("no room")));
  for (size_t i = 0; i < sent; ++i) ASSERT_EQ(to_text(next(*ends.other)), std::to_string(i));
  EXPECT_FALSE(ends.other->receive());
  EXPECT_TRUE(ends.one->try_send(to_bytes("room again")));
}

TEST(Channel, AFullOneCanBeWaitedFor) {
  Ends ends;
  const size_t sent = fill(*ends.one);
  pollfd writable{ends.one->descriptor(), POLLOUT, 0};
  EXPECT_EQ(::poll(&writable, 1, 0), 0);
  for (size_t i = 0; i < sent; ++i) next(*ends.other);
  EXPECT_EQ(::poll(&writable, 1, 60'000), 1);
  EXPECT_TRUE(ends.one->try_send(to_bytes("x")));
}

TEST(Channel, SendWaitsUntilThereIsRoom) {
  Ends ends;
  const size_t sent = fill(*ends.one);
  std::jthread sender([&] { ends.one->send(to_bytes("the last")); });
  for (size_t i = 0; i < sent; ++i) ASSERT_EQ(to_text(next(*ends.other)), std::to_string(i));
  EXPECT_EQ(to_text(next(*ends.other)), "the last");
}

TEST(Channel, HangingUpEndsTheWaitingInSend) {
  Ends ends;
  fill(*ends.one);
  std::atomic<bool> ended = false;
  std::jthread sender([&] {
    EXPECT_THROW(ends.one->send(to_bytes("never")), ChannelClosed);
    ended = true;
  });
  ends.one->hang_up();
  sender.join();
  EXPECT_TRUE(ended);
}

TEST(Channel, TheEndOfTheOtherSideEndsTheWaitingInSend) {
  Ends ends;
  fill(*ends.one);
  std::jthread sender([&] { EXPECT_THROW(ends.one->send(to_bytes("never")), ChannelClosed); });
  ends.other.reset();
}

TEST(Channel, WhatWasSentBeforeHangingUpArrives) {
  Ends ends;
  ends.one->send(to_bytes("first"));
  ends.one->hang_up();
  EXPECT_EQ(to_text(next(*ends.other)), "first");
  EXPECT_THROW(ends.other->receive(), ChannelClosed);
  EXPECT_THROW(ends.other->send(to_bytes("back")), ChannelClosed);
  EXPECT_THROW(ends.one->receive(), ChannelClosed);
}

TEST(Channel, SignalsInterruptNothing) {
  const SignalStorm storm(std::chrono::microseconds(300));
  Ends ends;
  std::jthread receiver([&] {
    for (int i = 0; i < 20'000; ++i) {
      const Bytes arrived = next(*ends.other);
      ASSERT_EQ(arrived.size(), i % 500 == 0 ? kAtOnce + 1 : 8u);
    }
  });
  for (int i = 0; i < 20'000; ++i) ends.one->send(Bytes(i % 500 == 0 ? kAtOnce + 1 : 8u));
}

TEST(Channel, ALongMessageWithoutItsMemoryIsRefused) {
  Ends ends;
  const char kind = 1;  // what says that the message is in memory
  ASSERT_EQ(::send(ends.one->descriptor(), &kind, 1, 0), 1);
  EXPECT_THROW(ends.other->receive(), std::runtime_error);
}

TEST(Channel, AMessageWhoseMemoryNobodyHasRoomForIsRefused) {
  Ends ends;
  const std::array<int, 1> memory{::memfd_create("pccheck-test", MFD_CLOEXEC)};
  ASSERT_EQ(::ftruncate(memory[0], off_t{3} << 30), 0);
  iovec part{const_cast<char*>("\1"), 1};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = control.data();
  header.msg_controllen = control.size();
  cmsghdr* const rights = CMSG_FIRSTHDR(&header);
  rights->cmsg_level = SOL_SOCKET;
  rights->cmsg_type = SCM_RIGHTS;
  rights->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(rights), memory.data(), sizeof(int));
  ASSERT_EQ(::sendmsg(ends.one->descriptor(), &header, 0), 1);
  ::close(memory[0]);
  const size_t open = open_descriptors().size();
  EXPECT_THROW(ends.other->receive(), std::runtime_error);
  EXPECT_EQ(open_descriptors().size(), open);
}

// The kernel drops descriptors for which the receiver has no room, and does not call it an error.
TEST(Channel, ALongMessageThatMeetsAFullDescriptorTableIsRefused) {
  Ends ends;
  ends.one->send(Bytes(2 * kAtOnce));
  rlimit before{};
  ::getrlimit(RLIMIT_NOFILE, &before);
  const rlimit none{static_cast<rlim_t>(0), before.rlim_max};
  ::setrlimit(RLIMIT_NOFILE, &none);
  EXPECT_THROW(ends.other->receive(), std::runtime_error);
  EXPECT_THROW(ends.other->send(Bytes(2 * kAtOnce)), std::system_error) << "no memory for it";
  ::setrlimit(RLIMIT_NOFILE, &before);
  EXPECT_NO_THROW(ends.other->send(to_bytes("goes on")));
}

}  // namespace
}  // namespace pccheck::test
