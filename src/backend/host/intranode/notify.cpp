#include <algorithm>

#include "backend/host/intranode/checks.hpp"
#include "backend/host/intranode/steps.hpp"
#include "base/error.hpp"
#include "plan/layout.hpp"

namespace deep_ep::host::intranode {

using deep_ep::intranode::NotifyDispatchParams;

namespace {

constexpr int kMaxLocalExperts = protocol::ControlBlock::kMaxLocalExperts;

// Counts that do not fit is_token_in_rank would send rows to where other rows go.
void build_own_slots(const NotifyDispatchParams& params, int num_ranks) {
  const int channels = params.num_channels;
  plan::build_send_slots(params.is_token_in_rank, params.call.record.num_tokens, num_ranks,
                         channels, params.send_head, params.channel_prefix_matrix);
  for (int i = 0; i < num_ranks; ++i) {
    const std::int32_t counted = params.channel_prefix_matrix[(i + 1) * channels - 1];
    require(params.num_tokens_per_rank[i] == counted,
            "num_tokens_per_rank[{}] is {}, but column {} of is_token_in_rank has {} tokens", i,
            params.num_tokens_per_rank[i], i, counted);
  }
}

void write_counts(Context& context, const NotifyDispatchParams& params) {
  const int num_ranks = context.num_ranks();
  const int local_experts = params.call.record.num_experts / num_ranks;
  for (int i = 0; i < num_ranks; ++i) {
    protocol::Mailbox& mailbox = context.mailbox_of(i, params.call);
    std::copy_n(params.num_tokens_per_rank, num_ranks,
                mailbox.tokens_per_rank + context.rank() * num_ranks);
    if (params.num_tokens_per_expert == nullptr) continue;
    std::copy_n(params.num_tokens_per_expert + i * local_experts, local_experts,
                mailbox.tokens_per_expert + context.rank() * kMaxLocalExperts);
  }
}

void read_counts(Context& context, const NotifyDispatchParams& params) {
  const int num_ranks = context.num_ranks();
  const protocol::Mailbox& mailbox = context.mailbox_of(context.rank(), params.call);
  std::copy_n(mailbox.tokens_per_rank, num_ranks * num_ranks, params.rank_prefix_matrix);
  require(plan::build_rank_prefix_matrix(params.rank_prefix_matrix, num_ranks),
          "the ranks send more than 2^31 - 1 rows to one rank");
  const std::int64_t rows =
      plan::rows_from(params.rank_prefix_matrix, num_ranks - 1, context.rank(), num_ranks).end;
  if (params.max_rows > 0 && rows > params.max_rows) {
    throw Error(ErrorCode::kCapacity,
                fmt::format("intranode_dispatch: rank {} receives {} rows, num_worst_tokens is {}",
                            context.rank(), rows, params.max_rows),
                {context.rank()});
  }
  if (params.num_recv_rows == nullptr) return;
  *params.num_recv_rows = rows;
  if (params.num_tokens_per_expert == nullptr) return;
  const int local_experts = params.call.record.num_experts / num_ranks;
  for (int e = 0; e < local_experts; ++e) {
    std::int64_t sum = 0;
    for (int i = 0; i < num_ranks; ++i) {
      sum += mailbox.tokens_per_expert[i * kMaxLocalExperts + e];
    }
    params.recv_tokens_per_expert[e] = sum;
  }
}

}  // namespace

void notify_dispatch(Context& context, const NotifyDispatchParams& params) {
  require(params.call.record.num_experts / context.num_ranks() <= kMaxLocalExperts,
          "num_experts is {}, more than {} for each of {} ranks", params.call.record.num_experts,
          kMaxLocalExperts, context.num_ranks());
  check_routing(
      {params.call, params.topk_idx, params.is_token_in_rank, params.num_tokens_per_expert},
      context.num_ranks());
  build_own_slots(params, context.num_ranks());
  write_counts(context, params);
  context.post(params.call);
  context.wait_posted(params.call, params.wait_stats);
  read_counts(context, params);
}

}  // namespace deep_ep::host::intranode
