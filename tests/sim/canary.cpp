#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <thread>
#include <vector>

#include "protocol/epoch.hpp"
#include "protocol/ring.hpp"

// Two ranks hand plain memory over through a ring, with nothing but its two flags in between. Built
// twice under a race detector: as it is, which must be silent, and with the flags' release made
// relaxed, which must be reported. Otherwise the silence of the other tests means nothing.
namespace {

using namespace deep_ep::protocol;

constexpr std::int64_t kRingBytes = 4096;
// Words, since the detector of g++ 12 misses races of single bytes, and of copies of a known size.
constexpr int kRowWords = 64;
constexpr std::int64_t kRecordBytes = kRowWords * sizeof(std::uint64_t);
constexpr int kRecords = 2000;

struct Shared {
  EpochFlag tail{}, head{};
  std::vector<std::byte> data = std::vector<std::byte>(kRingBytes);
};

void send(Shared& shared) {
  RingSender sender{{kRingBytes}, shared.data.data(), &shared.tail, &shared.head, 0, 0};
  for (int record = 0; record < kRecords; ++record) {
    std::byte* place = nullptr;
    while ((place = sender.reserve(kRecordBytes)) == nullptr) std::this_thread::yield();
    auto* row = reinterpret_cast<std::uint64_t*>(place);
    for (int i = 0; i < kRowWords; ++i) row[i] = static_cast<std::uint64_t>(record) + i;
    sender.advance(kRecordBytes);
    sender.publish();
  }
}

std::int64_t receive(Shared& shared) {
  RingReceiver receiver{{kRingBytes}, shared.data.data(), &shared.tail, &shared.head, 0, 0};
  std::int64_t wrong = 0;
  for (int record = 0; record < kRecords; ++record) {
    const std::byte* place = nullptr;
    while ((place = receiver.peek(kRecordBytes)) == nullptr) std::this_thread::yield();
    const auto* row = reinterpret_cast<const std::uint64_t*>(place);
    for (int i = 0; i < kRowWords; ++i) wrong += row[i] != static_cast<std::uint64_t>(record) + i;
    receiver.advance(kRecordBytes);
    receiver.release();
  }
  return wrong;
}

}  // namespace

int main() {
  Shared shared;
  std::thread sender([&] { send(shared); });
  const std::int64_t wrong = receive(shared);
  sender.join();
  std::printf("%lld wrong words\n", static_cast<long long>(wrong));
  return wrong == 0 ? 0 : 1;
}
