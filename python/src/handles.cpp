#include "handles.hpp"

#include "arrays.hpp"

namespace deep_ep::python {

IntranodeHandle intranode_handle_of(const nb::tuple& parts) {
  return {view_of(parts[0]), view_of(parts[1]), view_of(parts[2]),
          view_of(parts[3]), view_of(parts[4]), view_of(parts[5])};
}

InternodeHandle internode_handle_of(const nb::tuple& parts) {
  return {view_of(parts[0]), view_of(parts[1]), view_of(parts[2]), view_of(parts[3]),
          view_of(parts[4]), view_of(parts[5]), view_of(parts[6]), view_of(parts[7]),
          view_of(parts[8]), view_of(parts[9])};
}

nb::object result_of_handle(const IntranodeHandle& handle, const InternodeHandle& internode) {
  if (internode.is_token_in_rank.defined()) {
    return nb::make_tuple(
        result_of(internode.is_token_in_rank), result_of(internode.rdma_channel_prefix_matrix),
        result_of(internode.gbl_channel_prefix_matrix),
        result_of(internode.recv_rdma_channel_prefix_matrix),
        result_of(internode.recv_rdma_rank_prefix_sum),
        result_of(internode.recv_gbl_channel_prefix_matrix),
        result_of(internode.recv_gbl_rank_prefix_sum), result_of(internode.recv_src_meta),
        result_of(internode.send_rdma_head), result_of(internode.send_nvl_head));
  }
  if (!handle.rank_prefix_matrix.defined()) return nb::none();
  return nb::make_tuple(
      result_of(handle.rank_prefix_matrix), result_of(handle.channel_prefix_matrix),
      result_of(handle.recv_channel_prefix_matrix), result_of(handle.recv_src_idx),
      result_of(handle.is_token_in_rank), result_of(handle.send_head));
}

}  // namespace deep_ep::python
