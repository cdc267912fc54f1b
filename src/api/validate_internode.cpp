#include "api/expect.hpp"
#include "api/validate.hpp"
#include "base/error.hpp"

namespace deep_ep {

namespace {

constexpr std::int64_t kMetaBytes = sizeof(plan::SourceMeta);

/// What a dispatch takes of a handle.
void expect_internode_sends(const InternodeHandle& handle, const plan::Topology& topology,
                            Device device) {
  const std::int64_t ranks = topology.num_ranks;
  const std::int64_t nodes = topology.num_nodes();
  const auto expect_int32 = [&](const Tensor& tensor, std::string_view name,
                                std::initializer_list<std::int64_t> shape) {
    expect(tensor, {name, device, {DType::kInt32}, shape});
  };
  expect(handle.is_token_in_rank,
         {"internode_handle.is_token_in_rank", device, {DType::kBool}, {-1, ranks}});
  expect_int32(handle.gbl_channel_prefix_matrix, "internode_handle.gbl_channel_prefix_matrix",
               {ranks, -1});
  require(handle.gbl_channel_prefix_matrix.shape[1] >= 1,
          "internode_handle.gbl_channel_prefix_matrix is {}, it needs at least one column",
          handle.gbl_channel_prefix_matrix);
  expect_int32(handle.recv_rdma_rank_prefix_sum, "internode_handle.recv_rdma_rank_prefix_sum",
               {nodes});
  expect_int32(handle.recv_gbl_rank_prefix_sum, "internode_handle.recv_gbl_rank_prefix_sum",
               {ranks});
  expect_int32(handle.send_rdma_head, "internode_handle.send_rdma_head",
               {handle.is_token_in_rank.shape[0], nodes});
}

void expect_internode_handle(const InternodeHandle& handle, const plan::Topology& topology,
                             Device device) {
  expect_internode_sends(handle, topology, device);
  expect(handle.recv_src_meta,
         {"internode_handle.recv_src_meta", device, {DType::kUint8}, {-1, kMetaBytes}});
  require(
      reinterpret_cast<std::uintptr_t>(handle.recv_src_meta.data) % alignof(plan::SourceMeta) == 0,
      "internode_handle.recv_src_meta begins at {}, it must be a multiple of {} bytes",
      handle.recv_src_meta.data, alignof(plan::SourceMeta));
  expect(
      handle.send_nvl_head,
      {"internode_handle.send_nvl_head", device, {DType::kInt32}, {-1, topology.ranks_per_node}});
}

void expect_tokens(const InternodeHandle& handle, const TensorView& x) {
  require(handle.is_token_in_rank.shape[0] == x.shape[0],
          "x is {}, but internode_handle is of a dispatch of {} tokens", x,
          handle.is_token_in_rank.shape[0]);
}

}  // namespace

DispatchShape validate_internode_dispatch(const DispatchArgs& args, const plan::Topology& topology,
                                          Device device) {
  require(!args.handle, "handle is given, with several nodes it must be internode_handle");
  DispatchShape shape = validate_payload(args, topology.num_ranks, device);
  shape.format.src_meta_bytes = kMetaBytes;
  shape.record.kind = args.prepared           ? protocol::OpKind::kPreparedDispatch
                      : args.internode_handle ? protocol::OpKind::kCachedDispatch
                                              : protocol::OpKind::kDispatch;
  if (args.prepared) {
    const PreparedDispatch& prepared = *args.prepared;
    add_prepared(args, args.internode_handle.has_value(), "internode_handle", topology.num_ranks,
                 device, shape);
    require(prepared.num_rdma_recv_tokens >= 0 && prepared.num_rdma_recv_tokens <= INT32_MAX,
            "prepared.num_rdma_recv_tokens is {}, must be in [0, 2^31)",
            prepared.num_rdma_recv_tokens);
    expect_internode_sends(prepared.internode_handle, topology, device);
    expect_tokens(prepared.internode_handle, args.x);
  } else if (args.internode_handle) {
    refuse_with_handle(args, "internode_handle");
    expect_internode_handle(*args.internode_handle, topology, device);
    expect_tokens(*args.internode_handle, args.x);
  } else {
    add_routing(args, topology.num_ranks, device, shape);
  }
  validate_groups(args, args.internode_handle ? args.internode_handle->recv_src_meta.shape[0] : -1,
                  device);
  return shape;
}

protocol::CallRecord validate_internode_combine(const CombineArgs& args,
                                                const plan::Topology& topology, Device device) {
  expect_rows(args.x,
              {"x", device, {DType::kBfloat16, DType::kFloat16, DType::kFloat32}, {-1, -1}});
  expect_internode_handle(args.internode_handle, topology, device);
  const std::int64_t rows =
      validate_summands(args, args.internode_handle.recv_src_meta.shape[0], device);
  return validate_sums(args, args.internode_handle.is_token_in_rank.shape[0], rows,
                       topology.num_ranks, device);
}

}  // namespace deep_ep
