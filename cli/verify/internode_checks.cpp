#include <cstring>

#include "plan/layout.hpp"
#include "verify/checks.hpp"

// What must hold of the handle of a dispatch over several nodes.
namespace deep_ep::verify {
namespace {

/// As InternodeHandle describes recv_src_meta.
struct Meta {
  std::int32_t node;
  std::int32_t token;
  std::uint64_t ranks;
};

/// Of `tokens`, ascending, how many are before `end`.
std::int32_t count_before(const std::vector<std::int32_t>& tokens, std::int64_t end) {
  std::int32_t count = 0;
  for (const std::int32_t token : tokens) count += token < end ? 1 : 0;
  return count;
}

}  // namespace

void Checks::handle(const InternodeHandle& handle) {
  const InternodeExpected& want = expected_.internode;
  const int nodes = case_.ranks / case_.node_size();
  if (compare_.shape("internode_handle.is_token_in_rank", handle.is_token_in_rank, DType::kBool,
                     {inputs_.tokens(), case_.ranks}))
    compare_.values("internode_handle.is_token_in_rank", handle.is_token_in_rank,
                    expected_.is_token_in_rank);
  if (compare_.shape("send_rdma_head", handle.send_rdma_head, DType::kInt32,
                     {inputs_.tokens(), nodes}))
    compare_.values("send_rdma_head", handle.send_rdma_head, want.send_rdma_head);

  std::vector<std::int32_t> prefix(static_cast<std::size_t>(case_.ranks), 0);
  for (const RowSource& row : expected_.sources)
    for (int rank = row.rank; rank < case_.ranks; ++rank) ++prefix[static_cast<std::size_t>(rank)];
  if (compare_.shape("recv_gbl_rank_prefix_sum", handle.recv_gbl_rank_prefix_sum, DType::kInt32,
                     {case_.ranks}))
    compare_.values("recv_gbl_rank_prefix_sum", handle.recv_gbl_rank_prefix_sum, prefix);

  std::vector<std::int32_t> records;
  for (const auto& tokens : want.record_tokens)
    records.push_back((records.empty() ? 0 : records.back()) +
                      static_cast<std::int32_t>(tokens.size()));
  if (compare_.shape("recv_rdma_rank_prefix_sum", handle.recv_rdma_rank_prefix_sum, DType::kInt32,
                     {nodes}))
    compare_.values("recv_rdma_rank_prefix_sum", handle.recv_rdma_rank_prefix_sum, records);

  const std::int64_t head_rows =
      case_.num_worst_tokens == 0 ? records.back() : inputs_.result_rows();
  std::vector<std::int32_t> heads = want.send_nvl_head;
  heads.resize(static_cast<std::size_t>(head_rows * case_.node_size()), -1);
  if (compare_.shape("send_nvl_head", handle.send_nvl_head, DType::kInt32,
                     {head_rows, case_.node_size()}))
    compare_.values("send_nvl_head", handle.send_nvl_head, heads);

  std::vector<std::uint8_t> metas(static_cast<std::size_t>(inputs_.result_rows()) * sizeof(Meta),
                                  0xff);
  for (std::size_t row = 0; row < expected_.sources.size(); ++row) {
    const RowSource& source = expected_.sources[row];
    const Meta meta{source.rank / case_.node_size(), source.token, want.row_masks[row]};
    std::memcpy(metas.data() + row * sizeof meta, &meta, sizeof meta);
  }
  if (compare_.shape("recv_src_meta", handle.recv_src_meta, DType::kUint8,
                     {inputs_.result_rows(), static_cast<std::int64_t>(sizeof(Meta))}))
    compare_.values("recv_src_meta", handle.recv_src_meta, metas);
  channels(handle);
}

void Checks::channels(const InternodeHandle& handle) {
  const InternodeExpected& want = expected_.internode;
  const int nodes = case_.ranks / case_.node_size();
  const int channels = static_cast<int>(handle.gbl_channel_prefix_matrix.shape[1]);
  compare_.expect(channels >= 1, "a handle has at least one channel");
  std::vector<std::int32_t> records, rows, recv_records, recv_rows;
  const auto end_of = [&](int c) { return plan::channel_begin(inputs_.tokens(), c + 1, channels); };
  const auto begin_at = [&](int source, int c) {
    return plan::channel_begin(case_.tokens_of(source), c, channels);
  };
  for (int node = 0; node < nodes; ++node) {
    const int source = node * case_.node_size() + expected_.rank % case_.node_size();
    for (int c = 0; c < channels; ++c) {
      std::int32_t count = 0;
      for (std::int64_t token = 0; token < end_of(c); ++token)
        count += want.send_rdma_head[static_cast<std::size_t>(token * nodes + node)] >= 0 ? 1 : 0;
      records.push_back(count);
      recv_records.push_back(
          count_before(want.record_tokens[static_cast<std::size_t>(node)], begin_at(source, c)));
    }
  }
  for (int rank = 0; rank < case_.ranks; ++rank) {
    std::vector<std::int32_t> tokens;
    for (const RowSource& row : expected_.sources)
      if (row.rank == rank) tokens.push_back(row.token);
    for (int c = 0; c < channels; ++c) {
      std::int32_t count = 0;
      for (std::int64_t token = 0; token < end_of(c); ++token)
        count += expected_.is_token_in_rank[static_cast<std::size_t>(token * case_.ranks + rank)];
      rows.push_back(count);
      recv_rows.push_back(count_before(tokens, begin_at(rank, c)));
    }
  }
  const auto check = [&](std::string_view name, const Tensor& got, int length,
                         const std::vector<std::int32_t>& values) {
    if (compare_.shape(name, got, DType::kInt32, {length, channels}))
      compare_.values(name, got, values);
  };
  check("rdma_channel_prefix_matrix", handle.rdma_channel_prefix_matrix, nodes, records);
  check("gbl_channel_prefix_matrix", handle.gbl_channel_prefix_matrix, case_.ranks, rows);
  check("recv_rdma_channel_prefix_matrix", handle.recv_rdma_channel_prefix_matrix, nodes,
        recv_records);
  check("recv_gbl_channel_prefix_matrix", handle.recv_gbl_channel_prefix_matrix, case_.ranks,
        recv_rows);
}

}  // namespace deep_ep::verify
