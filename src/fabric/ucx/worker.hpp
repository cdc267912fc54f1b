#pragma once

#include <ucp/api/ucp.h>

#include <memory>
#include <string>
#include <string_view>
#include <type_traits>

namespace deep_ep::fabric::ucx {

/// Throws Error(kSystem) with UCX's text unless all is well.
void check(ucs_status_t status, std::string_view call);

template <auto destroy>
struct Destroy {
  template <class T>
  void operator()(T* handle) const {
    destroy(handle);
  }
};

using Context = std::unique_ptr<std::remove_pointer_t<ucp_context_h>, Destroy<ucp_cleanup>>;
using Worker = std::unique_ptr<std::remove_pointer_t<ucp_worker_h>, Destroy<ucp_worker_destroy>>;

/// Reads UCX's variables. What they leave open that a Buffer cares about is set here: see the
/// source.
Context make_context(int num_ranks);
/// For one thread at a time, with a descriptor to sleep on.
Worker make_worker(ucp_context_h context);
std::string address_of(ucp_worker_h worker);
/// Readable when an armed worker has something to do. The worker's own.
int event_fd(ucp_worker_h worker);

}  // namespace deep_ep::fabric::ucx
