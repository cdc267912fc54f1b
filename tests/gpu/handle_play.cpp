#include "handle_play.hpp"

#include <fmt/format.h>

#include <bit>
#include <vector>

#include "verify/transfer.hpp"

namespace deep_ep::test {
namespace {

// 32 MiB a rank and peer; rings of one peer hold 16 MiB.
constexpr std::int64_t kTokens = 4096;
constexpr std::int64_t kHidden = 4096;

/// Small integers, whose sums over 8 ranks are exact in bfloat16.
int value(int source, std::int64_t token, std::int64_t column) {
  return 1 + static_cast<int>((source * 5 + token * 3 + column) % 31);
}

std::uint16_t bfloat16(int number) {
  return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(static_cast<float>(number)) >> 16);
}

/// The row is `times` what `source` sent.
std::string check_row(const char* what, const std::uint16_t* row, int source, std::int64_t token,
                      int times) {
  for (std::int64_t i = 0; i < kHidden; ++i) {
    const std::uint16_t want = bfloat16(times * value(source, token, i));
    if (row[i] != want)
      return fmt::format("{} of token {} of rank {}: value {} is {:#x}, not {:#x}; ", what, token,
                         source, i, row[i], want);
  }
  return "";
}

}  // namespace

HandlePlay::HandlePlay(Buffer& buffer) : buffer_(buffer) {
  std::vector<std::uint16_t> x;
  x.reserve(kTokens * kHidden);
  for (std::int64_t token = 0; token < kTokens; ++token)
    for (std::int64_t i = 0; i < kHidden; ++i)
      x.push_back(bfloat16(value(buffer.rank(), token, i)));
  const TensorView rows(x.data(), DType::kBfloat16, {kTokens, kHidden});
  x_ = Tensor(rows).to(buffer.device(), verify::own_stream());
  to_all_ = first_dispatch(true);
  to_self_ = first_dispatch(false);
}

InternodeHandle HandlePlay::first_dispatch(bool to_all) {
  const int ranks = buffer_.num_ranks();
  std::vector<std::int64_t> ids;
  for (std::int64_t token = 0; token < kTokens; ++token)
    for (int expert = 0; expert < ranks; ++expert) ids.push_back(to_all ? expert : buffer_.rank());
  const Tensor topk_idx =
      verify::on_device(TensorView(ids.data(), DType::kInt64, {kTokens, ranks}), buffer_.device());
  DispatchArgs args;
  args.x = x_;
  args.topk_idx = topk_idx;
  args.num_experts = ranks;
  args.options.stream = verify::own_stream();
  const DispatchResult got = buffer_.dispatch(args);
  got.event.host_wait();
  return got.internode_handle;
}

DispatchResult HandlePlay::dispatch_with(const Tensor& x, const InternodeHandle& handle) {
  DispatchArgs args;
  args.x = x;
  args.internode_handle = handle;
  args.options.stream = verify::own_stream();
  DispatchResult got = buffer_.dispatch(args);
  got.event.host_wait();
  return got;
}

void HandlePlay::dispatch() {
  received_ = {};
  sums_ = {};
  received_ = dispatch_with(x_, to_all_).recv_x;
}

void HandlePlay::combine() {
  CombineArgs args;
  args.x = received_;
  args.internode_handle = to_all_;
  args.options.stream = verify::own_stream();
  const CombineResult got = buffer_.combine(args);
  got.event.host_wait();
  sums_ = got.combined_x;
}

std::string HandlePlay::check() const {
  const Tensor rows = verify::on_host(received_);
  const Tensor sums = verify::on_host(sums_);
  if (rows.shape[0] != buffer_.num_ranks() * kTokens)
    return fmt::format("{} rows, not {}; ", rows.shape[0], buffer_.num_ranks() * kTokens);
  std::string wrong;
  for (std::int64_t row = 0; row < rows.shape[0] && wrong.empty(); ++row)
    wrong = check_row("recv_x", rows.as<std::uint16_t>() + row * kHidden,
                      static_cast<int>(row / kTokens), row % kTokens, 1);
  for (std::int64_t token = 0; token < kTokens && wrong.empty(); ++token)
    wrong = check_row("combined_x", sums.as<std::uint16_t>() + token * kHidden, buffer_.rank(),
                      token, buffer_.num_ranks());
  return wrong;
}

void HandlePlay::dispatch_other_hidden() {
  const TensorView shorter(x_.data, DType::kBfloat16, {kTokens, kHidden / 2}, buffer_.device());
  dispatch_with(Tensor(shorter, x_.owner()), to_all_);
}

void HandlePlay::dispatch_other_handle() { dispatch_with(x_, to_self_); }

}  // namespace deep_ep::test
