#include "api/expect.hpp"
#include "api/validate.hpp"
#include "base/error.hpp"

namespace deep_ep {

namespace {

constexpr std::int64_t kMetaBytes = sizeof(plan::SourceMeta);

void expect_internode_handle(const InternodeHandle& handle, const plan::Topology& topology,
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
  expect(handle.recv_src_meta,
         {"internode_handle.recv_src_meta", device, {DType::kUint8}, {-1, kMetaBytes}});
  require(
      reinterpret_cast<std::uintptr_t>(handle.recv_src_meta.data) % alignof(plan::SourceMeta) == 0,
      "internode_handle.recv_src_meta begins at {}, it must be a multiple of {} bytes",
      handle.recv_src_meta.data, alignof(plan::SourceMeta));
  expect_int32(handle.send_rdma_head, "internode_handle.send_rdma_head",
               {handle.is_token_in_rank.shape[0], nodes});
  expect_int32(handle.send_nvl_head, "internode_handle.send_nvl_head",
               {-1, topology.ranks_per_node});
}

void refuse_for_several_nodes(bool given, const char* name) {
  if (!given) return;
  throw Error(ErrorCode::kUnsupported,
              fmt::format("{} is given, which is for ranks of one node only", name));
}

}  // namespace

DispatchShape validate_internode_dispatch(const DispatchArgs& args, const plan::Topology& topology,
                                          Device device) {
  refuse_for_several_nodes(args.prepared.has_value(), "prepared");
  refuse_for_several_nodes(args.group_rows || args.groups, "group_rows");
  require(!args.handle, "handle is given, with several nodes it must be internode_handle");
  DispatchShape shape = validate_payload(args, topology.num_ranks, device);
  shape.format.src_meta_bytes = kMetaBytes;
  if (!args.internode_handle) {
    shape.record.kind = protocol::OpKind::kDispatch;
    add_routing(args, topology.num_ranks, device, shape);
    return shape;
  }
  shape.record.kind = protocol::OpKind::kCachedDispatch;
  refuse_with_handle(args, "internode_handle");
  expect_internode_handle(*args.internode_handle, topology, device);
  require(args.internode_handle->is_token_in_rank.shape[0] == args.x.shape[0],
          "x is {}, but internode_handle is of a dispatch of {} tokens", args.x,
          args.internode_handle->is_token_in_rank.shape[0]);
  return shape;
}

protocol::CallRecord validate_internode_combine(const CombineArgs& args,
                                                const plan::Topology& topology, Device device) {
  refuse_for_several_nodes(args.groups.has_value(), "groups");
  expect_rows(args.x,
              {"x", device, {DType::kBfloat16, DType::kFloat16, DType::kFloat32}, {-1, -1}});
  expect_internode_handle(args.internode_handle, topology, device);
  return validate_sums(args, args.internode_handle.is_token_in_rank.shape[0], args.x.shape[0],
                       topology.num_ranks, device);
}

}  // namespace deep_ep
