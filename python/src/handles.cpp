#include "handles.hpp"

#include <array>
#include <string>

namespace deep_ep::python {

namespace {

constexpr const char* kElement = "an element of handle";

/// `in_rank`: the place of is_token_in_rank.
template <std::size_t kTensors>
nb::object tuple_of_handle(const Library& library,
                           const std::array<const Tensor*, kTensors>& tensors, std::size_t in_rank,
                           const GivenOfHandle& given) {
  nb::list parts;
  for (std::size_t i = 0; i < kTensors; ++i) {
    nb::object known = nb::none();
    if (!given.prepared.is_none()) {
      known = given.prepared[i];
    } else if (i == in_rank) {
      known = nb::borrow(given.is_token_in_rank);
    }
    parts.append(known.is_none() ? library.make(*tensors[i]) : known);
  }
  return nb::tuple(parts);
}

}  // namespace

nb::tuple require_handle(nb::handle handle, int num_nodes) {
  const std::size_t wanted = num_nodes == 1 ? kIntranodeTensors : kInternodeTensors;
  if (is_tuple_of(handle, wanted)) return nb::borrow<nb::tuple>(handle);
  throw wrong_tuple(
      "handle", handle,
      "the tuple of " + std::to_string(wanted) + " arrays that dispatch of a Buffer of " +
          (num_nodes == 1 ? "one node" : std::to_string(num_nodes) + " nodes") + " returned");
}

IntranodeHandle intranode_handle_of(const Library& library, const nb::tuple& parts) {
  const auto part = [&](int i) { return library.view(parts[i], kElement); };
  return {part(0), part(1), part(2), part(3), part(4), part(5)};
}

IntranodeHandle used_of_handle(const Library& library, const nb::tuple& parts) {
  const auto part = [&](int i) { return library.view(parts[i], kElement); };
  return {part(0), {}, {}, part(3), part(4), part(5)};
}

InternodeHandle internode_handle_of(const Library& library, const nb::tuple& parts) {
  const auto part = [&](int i) { return library.view(parts[i], kElement); };
  return {part(0), part(1), part(2), part(3), part(4), part(5), part(6), part(7), part(8), part(9)};
}

nb::object result_of_handle(const Library& library, const IntranodeHandle& handle,
                            const InternodeHandle& internode, const GivenOfHandle& given) {
  if (internode.is_token_in_rank.defined()) {
    return tuple_of_handle<kInternodeTensors>(
        library,
        {&internode.is_token_in_rank, &internode.rdma_channel_prefix_matrix,
         &internode.gbl_channel_prefix_matrix, &internode.recv_rdma_channel_prefix_matrix,
         &internode.recv_rdma_rank_prefix_sum, &internode.recv_gbl_channel_prefix_matrix,
         &internode.recv_gbl_rank_prefix_sum, &internode.recv_src_meta, &internode.send_rdma_head,
         &internode.send_nvl_head},
        0, given);
  }
  if (!handle.rank_prefix_matrix.defined()) return nb::none();
  return tuple_of_handle<kIntranodeTensors>(
      library,
      {&handle.rank_prefix_matrix, &handle.channel_prefix_matrix,
       &handle.recv_channel_prefix_matrix, &handle.recv_src_idx, &handle.is_token_in_rank,
       &handle.send_head},
      4, given);
}

}  // namespace deep_ep::python
