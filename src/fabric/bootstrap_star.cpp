#include "fabric/bootstrap_star.hpp"

#include <fmt/ranges.h>
#include <poll.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>
#include <optional>

#include "base/error.hpp"

namespace deep_ep::fabric {
namespace {

using std::chrono::milliseconds;

/// In front of everything that crosses a link.
struct Frame {
  static constexpr std::uint32_t kMagic = 0xdee9e901;
  std::uint32_t magic = kMagic;
  std::uint32_t code = 0;  // 0, or the ErrorCode of rank 0's verdict
  std::uint64_t bytes = 0;
};

/// Bounds what a stranger's garbage in a length can make us allocate.
constexpr std::uint64_t kMaxBytes = std::uint64_t{1} << 30;

/// What other ranks wait beyond their timeout, so that rank 0's verdict, which names the missing
/// rank, arrives before they blame rank 0.
constexpr milliseconds kVerdictGrace{2000};

void append(std::string& out, const void* data, std::size_t bytes) {
  out.append(static_cast<const char*>(data), bytes);
}

/// Lists of byte strings and of ranks, each with a 64-bit length in front.
std::string pack(const std::vector<std::string>& parts) {
  std::string out;
  for (const std::string& part : parts) {
    const std::uint64_t bytes = part.size();
    append(out, &bytes, sizeof(bytes));
    out += part;
  }
  return out;
}

std::vector<std::string> unpack(std::string_view in) {
  std::vector<std::string> parts;
  while (in.size() >= sizeof(std::uint64_t)) {
    std::uint64_t bytes = 0;
    std::memcpy(&bytes, in.data(), sizeof(bytes));
    in.remove_prefix(sizeof(bytes));
    if (bytes > in.size()) break;
    parts.emplace_back(in.substr(0, bytes));
    in.remove_prefix(bytes);
  }
  return parts;
}

Io send_frame(int fd, std::uint32_t code, std::string_view body, const Deadline& deadline) {
  std::string out;
  const Frame frame{.code = code, .bytes = body.size()};
  append(out, &frame, sizeof(frame));
  out += body;
  return send_all(fd, out.data(), out.size(), deadline);
}

/// A frame that arrives in pieces.
struct Incoming {
  Frame frame;
  std::size_t frame_have = 0;
  std::string body;
  std::size_t body_have = 0;

  /// Reads what is there. False: the other end is gone or talks nonsense.
  bool read(int fd) {
    while (!complete()) {
      const bool in_frame = frame_have < sizeof(frame);
      char* to = in_frame ? reinterpret_cast<char*>(&frame) + frame_have : body.data() + body_have;
      const std::size_t want = in_frame ? sizeof(frame) - frame_have : body.size() - body_have;
      const ssize_t got = recv(fd, to, want, 0);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return errno == EAGAIN || errno == EWOULDBLOCK;
      if (got == 0) return false;
      (in_frame ? frame_have : body_have) += static_cast<std::size_t>(got);
      if (in_frame && frame_have == sizeof(frame)) {
        if (frame.magic != Frame::kMagic || frame.bytes > kMaxBytes) return false;
        body.resize(frame.bytes);
      }
    }
    return true;
  }
  bool complete() const { return frame_have == sizeof(frame) && body_have == body.size(); }
};

class Star final : public Bootstrap {
 public:
  Star(int rank, int size, std::vector<Fd> links, milliseconds timeout)
      : rank_(rank), size_(size), links_(std::move(links)), timeout_(timeout) {}

  int rank() const override { return rank_; }
  int size() const override { return size_; }

  std::vector<std::string> all_gather(std::string_view bytes) override {
    if (failure_) throw *failure_;
    require(bytes.size() <= kMaxBytes / static_cast<std::size_t>(size_) - sizeof(std::uint64_t),
            "all_gather: {} bytes of one of {} ranks, all together must be below 2^30",
            bytes.size(), size_);
    if (size_ == 1) return {std::string(bytes)};
    try {
      return rank_ == 0 ? collect_and_answer(bytes) : send_and_wait(bytes);
    } catch (const Error& error) {
      failure_.emplace(error);
      throw;
    }
  }

 private:
  std::vector<std::string> collect_and_answer(std::string_view bytes) {
    const Deadline deadline(timeout_);
    std::vector<std::string> all;
    try {
      all = collect(bytes, deadline);
    } catch (const Error& error) {
      tell_verdict(error);
      throw;
    }
    const std::string body = pack(all);
    for (int i = 1; i < size_; ++i) {
      // A rank that died after it sent its bytes is found missing by the next call.
      if (send_frame(links_[i].get(), 0, body, deadline) == Io::kExpired)
        throw Error(ErrorCode::kTimeout,
                    fmt::format("bootstrap: rank {} did not read the result of an all_gather "
                                "within {} ms",
                                i, timeout_.count()),
                    {i});
    }
    return all;
  }

  std::vector<std::string> collect(std::string_view bytes, const Deadline& deadline) {
    std::vector<Incoming> incoming(size_);
    std::vector<int> missing;
    while (true) {
      missing.clear();
      std::vector<pollfd> polled;
      for (int i = 1; i < size_; ++i) {
        if (!incoming[i].read(links_[i].get()))
          throw Error(ErrorCode::kPeerFailed,
                      fmt::format("bootstrap: rank {} died or left before an all_gather", i), {i});
        if (incoming[i].complete()) continue;
        missing.push_back(i);
        polled.push_back({links_[i].get(), POLLIN, 0});
      }
      if (missing.empty()) break;
      if (deadline.expired())
        throw Error(ErrorCode::kTimeout,
                    fmt::format("bootstrap: {} did not come to an all_gather within {} ms",
                                name_ranks(missing), timeout_.count()),
                    missing);
      poll(polled.data(), polled.size(), deadline.poll_ms());
    }
    std::vector<std::string> all{std::string(bytes)};
    for (int i = 1; i < size_; ++i) all.push_back(std::move(incoming[i].body));
    return all;
  }

  void tell_verdict(const Error& error) {
    std::string ranks;
    append(ranks, error.ranks().data(), error.ranks().size() * sizeof(int));
    const std::string body = pack({error.what(), ranks});
    // Best effort: whoever cannot take a small frame at once finds out by its own timeout.
    for (int i = 1; i < size_; ++i)
      send_frame(links_[i].get(), static_cast<std::uint32_t>(error.code()), body,
                 Deadline(milliseconds(50)));
  }

  std::vector<std::string> send_and_wait(std::string_view bytes) {
    const Deadline deadline(timeout_ + kVerdictGrace);
    const int fd = links_[0].get();
    // If rank 0 is gone, its verdict may still be in the socket: so read before giving up.
    bool expired = send_frame(fd, 0, bytes, deadline) == Io::kExpired;
    Incoming answer;
    while (!expired && !answer.complete()) {
      if (!answer.read(fd))
        throw Error(ErrorCode::kPeerFailed, "bootstrap: rank 0 died or left before an all_gather",
                    {0});
      if (answer.complete()) break;
      pollfd entry{fd, POLLIN, 0};
      poll(&entry, 1, deadline.poll_ms());
      expired = deadline.expired();
    }
    if (expired)
      throw Error(ErrorCode::kTimeout,
                  fmt::format("bootstrap: rank 0 did not answer an all_gather within {} ms (it may "
                              "be waiting for another rank)",
                              (timeout_ + kVerdictGrace).count()),
                  {0});
    std::vector<std::string> parts = unpack(answer.body);
    if (answer.frame.code != 0) throw_verdict(answer.frame.code, parts);
    if (parts.size() != static_cast<std::size_t>(size_))
      throw Error(ErrorCode::kPeerFailed, "bootstrap: rank 0 sent a malformed answer", {0});
    return parts;
  }

  [[noreturn]] static void throw_verdict(std::uint32_t code,
                                         const std::vector<std::string>& parts) {
    std::vector<int> ranks;
    if (parts.size() == 2) {
      ranks.resize(parts[1].size() / sizeof(int));
      std::memcpy(ranks.data(), parts[1].data(), ranks.size() * sizeof(int));
    }
    throw Error(static_cast<ErrorCode>(code), parts.empty() ? "bootstrap: failed" : parts[0],
                ranks);
  }

  int rank_;
  int size_;
  std::vector<Fd> links_;
  milliseconds timeout_;
  std::optional<Error> failure_;
};

}  // namespace

std::shared_ptr<Bootstrap> bootstrap_star(int rank, int size, std::vector<Fd> links,
                                          milliseconds timeout) {
  for (const Fd& link : links) {
    if (link) set_nonblocking(link.get());
  }
  return std::make_shared<Star>(rank, size, std::move(links), timeout);
}

std::string name_ranks(const std::vector<int>& ranks) {
  return fmt::format("rank{} {}", ranks.size() == 1 ? "" : "s", fmt::join(ranks, ", "));
}

}  // namespace deep_ep::fabric
