#include "cpp/messages.h"

#include <cstring>
#include <stdexcept>
#include <system_error>
#include <type_traits>
#include <utility>

namespace pccheck::messages {
namespace {

// One description of each message's parts serves writing and reading: `both(archive, message)`.
class Out {
 public:
  template <typename T>
    requires std::is_arithmetic_v<T>
  void operator()(const T& value) {
    const auto* bytes = reinterpret_cast<const std::byte*>(&value);
    bytes_.insert(bytes_.end(), bytes, bytes + sizeof value);
  }
  void operator()(const Id& id) { bytes_.insert(bytes_.end(), id.begin(), id.end()); }
  void operator()(const std::string& text) { put(std::as_bytes(std::span(text))); }
  void operator()(const std::vector<std::byte>& bytes) { put(bytes); }

  template <typename T>
  void each(const std::vector<T>& values);

  std::vector<std::byte> take() { return std::move(bytes_); }

 private:
  void put(std::span<const std::byte> bytes) {
    (*this)(uint64_t{bytes.size()});
    bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
  }

  std::vector<std::byte> bytes_;
};

class In {
 public:
  explicit In(std::span<const std::byte> bytes) : left_(bytes) {}

  template <typename T>
    requires std::is_arithmetic_v<T>
  void operator()(T& value) {
    std::memcpy(&value, take(sizeof value).data(), sizeof value);
  }
  void operator()(bool& value) { value = take(1)[0] != std::byte{0}; }
  void operator()(Id& id) { std::memcpy(id.data(), take(id.size()).data(), id.size()); }
  void operator()(std::string& text) {
    const auto bytes = take(length());
    text.assign(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }
  void operator()(std::vector<std::byte>& into) {
    const auto bytes = take(length());
    into.assign(bytes.begin(), bytes.end());
  }

  template <typename T>
  void each(std::vector<T>& values);

  void end() const {
    if (!left_.empty()) throw std::runtime_error("a message is too long");
  }

 private:
  uint64_t length() {
    uint64_t bytes = 0;
    (*this)(bytes);
    return bytes;
  }

  std::span<const std::byte> take(uint64_t bytes) {
    if (bytes > left_.size()) throw std::runtime_error("a message is too short");
    const auto taken = left_.first(static_cast<size_t>(bytes));
    left_ = left_.subspan(static_cast<size_t>(bytes));
    return taken;
  }

  std::span<const std::byte> left_;
};

template <typename T>
concept Plain = std::is_same_v<std::remove_const_t<T>, std::string> ||
                std::is_arithmetic_v<std::remove_const_t<T>>;

template <Plain T>
void both(auto& archive, T& value) {
  archive(value);
}

template <typename M, typename T>
concept Is = std::is_same_v<std::remove_const_t<M>, T>;

template <Is<FilePlan> M>
void both(auto& archive, M& m) {
  archive(m.name), archive(m.size_bytes), archive(m.grid_begin);
}
template <Is<Failure> M>
void both(auto& archive, M& m) {
  archive(m.code), archive(m.text);
}
template <Is<Hello> M>
void both(auto& archive, M& m) {
  archive(m.version), archive(m.path), archive(m.block_bytes), archive(m.writer_threads);
  archive(m.keep_last), archive(m.max_spares), archive(m.keep_every), archive(m.lock_timeout_s);
  archive(m.drain_timeout_s);
}
template <Is<Begin> M>
void both(auto& archive, M& m) {
  archive(m.ticket), archive(m.identity.step), archive(m.identity.run), archive(m.identity.save);
  archive(m.name), archive.each(m.files);
}
template <Is<Addition> M>
void both(auto& archive, M& m) {
  archive(m.ticket), archive.each(m.files);
}
template <Is<Staged> M>
void both(auto& archive, M& m) {
  archive(m.ticket), archive(m.file), archive(m.block), archive(m.bytes), archive(m.slot);
  archive(m.crc), archive(m.summed);
}
template <Is<Digest> M>
void both(auto& archive, M& m) {
  archive(m.low), archive(m.high);
}
template <Is<DigestOf> M>
void both(auto& archive, M& m) {
  archive(m.file), both(archive, m.digest);
}
template <Is<Seal> M>
void both(auto& archive, M& m) {
  archive(m.ticket), archive(m.manifest), archive.each(m.digests);
}
template <Is<Link> M>
void both(auto& archive, M& m) {
  archive(m.ticket), archive(m.file), archive(m.from), both(archive, m.digest);
}
template <Is<Linked> M>
void both(auto& archive, M& m) {
  archive(m.linked);
}
template <Is<Abandon> M>
void both(auto& archive, M& m) {
  archive(m.ticket), archive(m.reason);
}
template <Is<SetAside> M>
void both(auto& archive, M& m) {
  archive(m.step);
}
template <Is<Keep> M>
void both(auto& archive, M& m) {
  archive.each(m.steps);
}
template <Is<Refused> M>
void both(auto& archive, M& m) {
  both(archive, m.failure);
}
template <Is<Freed> M>
void both(auto& archive, M& m) {
  archive(m.slot);
}
template <Is<Failing> M>
void both(auto& archive, M& m) {
  archive(m.ticket), both(archive, m.failure);
}
template <Is<Ended> M>
void both(auto& archive, M& m) {
  archive(m.ticket), archive(m.committed), archive(m.outcome_unknown), both(archive, m.failure);
}
template <Is<Names> M>
void both(auto& archive, M& m) {
  archive.each(m.names), both(archive, m.failure);
}
template <Is<Complaint> M>
void both(auto& archive, M& m) {
  archive(m.text);
}
template <Is<Closed> M>
void both(auto& archive, M& m) {
  archive(m.complaint);
}
template <typename M>
  requires std::is_empty_v<M>
void both(auto&, M&) {}

template <typename T>
void Out::each(const std::vector<T>& values) {
  (*this)(uint64_t{values.size()});
  for (const T& value : values) both(*this, value);
}

template <typename T>
void In::each(std::vector<T>& values) {
  const uint64_t count = length();
  // Each takes some bytes, so a count that lies ends the reading before it fills the memory.
  for (uint64_t i = 0; i < count; ++i) both(*this, values.emplace_back());
}

template <typename Variant>
std::vector<std::byte> encoded(const Variant& message) {
  Out out;
  out(static_cast<uint8_t>(message.index()));
  std::visit([&](const auto& m) { both(out, m); }, message);
  return out.take();
}

template <typename Variant, size_t... I>
Variant decoded(std::span<const std::byte> bytes, std::index_sequence<I...>) {
  In in(bytes);
  uint8_t kind = 0;
  in(kind);
  Variant message;
  const bool known = ((kind == I && (both(in, message.template emplace<I>()), true)) || ...);
  if (!known) throw std::runtime_error("a message of unknown kind " + std::to_string(kind));
  in.end();
  return message;
}

template <typename Variant>
Variant decoded(std::span<const std::byte> bytes) {
  return decoded<Variant>(bytes, std::make_index_sequence<std::variant_size_v<Variant>>());
}

}  // namespace

std::vector<std::byte> encode(const FromTrainer& message) { return encoded(message); }
std::vector<std::byte> encode(const FromMonitor& message) { return encoded(message); }

FromTrainer decode_from_trainer(std::span<const std::byte> bytes) {
  return decoded<FromTrainer>(bytes);
}
FromMonitor decode_from_monitor(std::span<const std::byte> bytes) {
  return decoded<FromMonitor>(bytes);
}

Failure failure_of(const std::exception_ptr& error) {
  if (!error) return {};
  try {
    std::rethrow_exception(error);
  } catch (const std::system_error& failed) {
    return {failed.code().value(), failed.what()};
  } catch (const std::exception& failed) {
    return {0, failed.what()};
  }
}

namespace {

// A system error of another process: its text is complete as it came.
class ForeignSystemError : public std::system_error {
 public:
  ForeignSystemError(int code, std::string text)
      : std::system_error(code, std::generic_category()), text_(std::move(text)) {}
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  const std::string text_;
};

}  // namespace

std::exception_ptr to_error(const Failure& failure) {
  if (failure.code == 0) return std::make_exception_ptr(std::runtime_error(failure.text));
  return std::make_exception_ptr(ForeignSystemError(failure.code, failure.text));
}

}  // namespace pccheck::messages
