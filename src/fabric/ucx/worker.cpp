#include "fabric/ucx/worker.hpp"

#include "base/env.hpp"
#include "base/error.hpp"

namespace deep_ep::fabric::ucx {
namespace {

using Config = std::unique_ptr<ucp_config_t, Destroy<ucp_config_release>>;

struct Setting {
  const char* variable;
  const char* name;  // as UCX's tables have it, without the prefix of a transport
  const char* value;
};

constexpr Setting kForTcp[] = {
    // Else a rank that cannot be reached holds up the making of the heap for minutes.
    {"UCX_TCP_CONN_NB", "CONN_NB", "y"},
    // UCX 1.13 completes a message that it sends from the caller's memory twice, and aborts, when
    // the connection breaks meanwhile. Copied into a segment that takes a whole piece (kPieceBytes)
    // it is as fast.
    {"UCX_ZCOPY_THRESH", "ZCOPY_THRESH", "inf"},
    {"UCX_TCP_TX_SEG_SIZE", "TX_SEG_SIZE", "60k"},
};

const char* variable(const char* name) { return env::value_of({name, "", ""}); }

/// Whether UCX_TLS, a list of transports or, behind a ^, of all others, lets UCX take TCP.
bool takes_tcp() {
  const char* value = variable("UCX_TLS");
  const std::string_view list = value == nullptr || *value == '\0' ? "all" : value;
  const bool named = list.find("tcp") != list.npos;
  return list.front() == '^' ? !named : named || list.find("all") != list.npos;
}

}  // namespace

void check(ucs_status_t status, std::string_view call) {
  if (status == UCS_OK) return;
  throw Error(ErrorCode::kSystem, fmt::format("{}: {}", call, ucs_status_string(status)));
}

Context make_context(int num_ranks) {
  ucp_config_t* read = nullptr;
  check(ucp_config_read(nullptr, nullptr, &read), "ucp_config_read");
  const Config config(read);
  if (takes_tcp()) {  // UCX complains of settings of transports that it does not take
    for (const Setting& setting : kForTcp) {
      if (variable(setting.variable) == nullptr)
        check(ucp_config_modify(config.get(), setting.name, setting.value), setting.variable);
    }
  }
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_ESTIMATED_NUM_EPS;
  params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
  params.estimated_num_eps = static_cast<std::size_t>(num_ranks);
  ucp_context_h context = nullptr;
  check(ucp_init(&params, config.get(), &context), "ucp_init");
  return Context(context);
}

Worker make_worker(ucp_context_h context) {
  ucp_worker_params_t params{};
  params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  params.thread_mode = UCS_THREAD_MODE_SERIALIZED;
  ucp_worker_h worker = nullptr;
  check(ucp_worker_create(context, &params, &worker), "ucp_worker_create");
  return Worker(worker);
}

std::string address_of(ucp_worker_h worker) {
  ucp_address_t* address = nullptr;
  std::size_t length = 0;
  check(ucp_worker_get_address(worker, &address, &length), "ucp_worker_get_address");
  std::string bytes(reinterpret_cast<const char*>(address), length);
  ucp_worker_release_address(worker, address);
  return bytes;
}

int event_fd(ucp_worker_h worker) {
  int fd = -1;
  check(ucp_worker_get_efd(worker, &fd), "ucp_worker_get_efd");
  return fd;
}

}  // namespace deep_ep::fabric::ucx
