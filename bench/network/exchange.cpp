#include "exchange.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <functional>

#include <nlohmann/json.hpp>

#include "deep_ep/deep_ep.hpp"
#include "perftest.hpp"
#include "plan/internode.hpp"
#include "protocol/rail.hpp"
#include "stats.hpp"
#include "verify/checks.hpp"

namespace deep_ep::bench {
namespace {

using net::Namespaces;

verify::Case case_of(const ExchangeSettings& settings) {
  verify::Case c;
  c.ranks = 2 * settings.ranks_per_node;
  c.ranks_per_node = settings.ranks_per_node;
  c.tokens = {settings.tokens};
  c.hidden = settings.hidden;
  c.topk = settings.topk;
  c.experts = settings.experts;
  return c;
}

/// Tokens of `routing` with an expert on `node`.
std::int64_t tokens_for(const verify::RankRouting& routing, const verify::Case& c, int node) {
  const std::int64_t experts_a_node = c.experts / c.ranks * c.ranks_per_node;
  std::int64_t tokens = 0;
  for (auto ids = routing.topk_idx.begin(); ids != routing.topk_idx.end(); ids += c.topk) {
    tokens += std::any_of(ids, ids + c.topk,
                          [&](std::int64_t id) { return id >= 0 && id / experts_a_node == node; })
                  ? 1
                  : 0;
  }
  return tokens;
}

/// What one rank is to hand to the network in a call.
struct Planned {
  std::int64_t records = 0;
  std::int64_t bytes = 0;
};

/// One rank's part.
class Rank {
 public:
  Rank(const Namespaces& nodes, const std::shared_ptr<Bootstrap>& bootstrap,
       const ExchangeSettings& settings)
      : nodes_(nodes),
        bootstrap_(*bootstrap),
        settings_(settings),
        case_(case_of(settings)),
        routings_(verify::make_routings(case_)),
        expected_(verify::make_expected(case_, routings_, bootstrap->rank())),
        inputs_(case_, expected_),
        node_(bootstrap->rank() / settings.ranks_per_node),
        buffer_(bootstrap, options(bootstrap->size())) {
    const Tensor x = inputs_.x(0), ids = inputs_.topk_idx(), weights = inputs_.topk_weights();
    DispatchArgs args;
    args.x = x;
    args.topk_idx = ids;
    args.topk_weights = weights;
    args.num_experts = case_.experts;
    handle_ = buffer_.dispatch(args).internode_handle;
  }

  std::string run() {
    const int other = 1 - node_;
    const int rail = (bootstrap_.rank() + settings_.ranks_per_node) % case_.ranks;
    const std::int64_t x_bytes = case_.hidden * 2;
    const plan::RecordFormat record({.x_bytes = x_bytes}, settings_.ranks_per_node);
    const plan::SumFormat sum(std::int64_t{4} * case_.topk, x_bytes);
    const std::int64_t out =
        tokens_for(routings_[static_cast<std::size_t>(bootstrap_.rank())], case_, other);
    const std::int64_t home = tokens_for(routings_[static_cast<std::size_t>(rail)], case_, node_);
    nlohmann::json json;
    json["dispatch"] =
        measure({out, out * record.bytes}, [&](int round) { return dispatch(round); });
    json["combine"] = measure({home, home * sum.bytes}, [&](int round) { return combine(round); });
    return json.dump();
  }

 private:
  /// Makes inputs, and what then is the call that is timed.
  struct Call {
    std::function<void()> go;
    std::function<void(verify::Checks&)> check;
  };
  using MakeCall = std::function<Call(int round)>;

  BufferOptions options(int ranks) const {
    // For the size hint, which cannot know it.
    setenv("DEEP_EP_RANKS_PER_NODE", std::to_string(settings_.ranks_per_node).c_str(), 1);
    BufferOptions options;
    options.num_rdma_bytes = Config{}.get_rdma_buffer_size_hint(case_.hidden * 4, ranks);
    options.num_threads = settings_.threads;
    return options;
  }

  Call dispatch(int round) {
    input_ = inputs_.x(round);
    dispatched_ = {};
    DispatchArgs args;
    args.x = input_;
    args.internode_handle = handle_;
    return {[this, args] { dispatched_ = buffer_.dispatch(args); },
            [this, round](verify::Checks& checks) { checks.payload(dispatched_, round); }};
  }

  // Lets go of the results before, as the calls of a loop do: memory that nobody has touched yet
  // would be part of the time.
  Call combine(int round) {
    dispatched_ = {};
    combined_ = {};
    input_ = inputs_.combine_x(round);
    weights_ = inputs_.combine_weights(round);
    CombineArgs args;
    args.x = input_;
    args.topk_weights = weights_;
    args.internode_handle = handle_;
    return {[this, args] { combined_ = buffer_.combine(args); },
            [this, round](verify::Checks& checks) { checks.combined(combined_, round); }};
  }

  nlohmann::json measure(const Planned& planned, const MakeCall& make) {
    std::vector<double> seconds;
    std::vector<std::int64_t> sent;
    std::int64_t miscounted = 0;
    verify::Checks checks(case_, expected_, inputs_);
    std::string trouble;
    for (int i = 0; i <= settings_.iterations; ++i) {  // the first one warms up
      const Call call = make(i + 1);
      bootstrap_.barrier();
      const NetworkCounts before = buffer_.network_counts();
      const std::int64_t device = nodes_.traffic(node_).sent;
      bootstrap_.barrier();
      const auto begin = std::chrono::steady_clock::now();
      call.go();
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
      bootstrap_.barrier();
      sent.push_back(nodes_.traffic(node_).sent - device);
      seconds.push_back(took.count());
      const std::string wrong = miscount(planned, before, buffer_.network_counts());
      if (!wrong.empty()) {
        ++miscounted;
        trouble = wrong;
      }
      call.check(checks);
      bootstrap_.barrier();
    }
    if (trouble.empty()) trouble = checks.result().first_mismatch;
    seconds.erase(seconds.begin());
    sent.erase(sent.begin());
    return {{"records", planned.records},
            {"bytes", planned.bytes},
            {"seconds", seconds},
            {"sent", sent},
            {"checked_elements", checks.result().checked_elements},
            {"wrong_elements", checks.result().wrong_elements},
            {"miscounted", miscounted},
            {"trouble", trouble}};
  }

  /// Beside the records a call puts one message to its rail peer.
  static std::string miscount(const Planned& planned, const NetworkCounts& before,
                              const NetworkCounts& after) {
    const std::int64_t records = after.rows - before.rows;
    const std::int64_t bytes = after.row_bytes - before.row_bytes;
    const std::int64_t put = after.put_bytes - before.put_bytes;
    const auto message = static_cast<std::int64_t>(sizeof(protocol::RailMessage));
    if (records == planned.records && bytes == planned.bytes && put == planned.bytes + message)
      return "";
    return fmt::format("{} records of {} bytes, {} put; planned {} of {}, {} put", records, bytes,
                       put, planned.records, planned.bytes, planned.bytes + message);
  }

  const Namespaces& nodes_;
  Bootstrap& bootstrap_;
  const ExchangeSettings& settings_;
  const verify::Case case_;
  const std::vector<verify::RankRouting> routings_;
  const verify::Expected expected_;
  const verify::CaseInputs inputs_;
  const int node_;
  Buffer buffer_;
  InternodeHandle handle_{};
  Tensor input_{}, weights_{};
  DispatchResult dispatched_{};
  CombineResult combined_{};
};

/// Of what the ranks say of one kind of call.
CallFigures put_together(const std::vector<nlohmann::json>& ranks, int ranks_per_node) {
  CallFigures figures;
  std::vector<std::vector<double>> seconds;
  for (std::size_t rank = 0; rank < ranks.size(); ++rank) {
    const nlohmann::json& part = ranks[rank];
    const std::size_t node = rank / static_cast<std::size_t>(ranks_per_node);
    figures.records[node] += part.at("records").get<std::int64_t>();
    figures.bytes[node] += part.at("bytes").get<std::int64_t>();
    seconds.push_back(part.at("seconds"));
    figures.checked_elements += part.at("checked_elements").get<std::int64_t>();
    figures.wrong_elements += part.at("wrong_elements").get<std::int64_t>();
    figures.miscounted += part.at("miscounted").get<std::int64_t>();
    const auto trouble = part.at("trouble").get<std::string>();
    if (figures.trouble.empty() && !trouble.empty())
      figures.trouble = fmt::format("rank {}: {}", rank, trouble);
  }
  figures.seconds = cli::slowest(seconds);
  for (std::size_t node = 0; node < 2; ++node) {
    const auto& first_rank = ranks[node * static_cast<std::size_t>(ranks_per_node)];
    for (const std::int64_t sent : first_rank.at("sent"))
      figures.veth_vs_plan.push_back(static_cast<double>(sent) /
                                     static_cast<double>(figures.bytes[node]));
  }
  return figures;
}

}  // namespace

std::vector<double> CallFigures::bandwidths() const {
  const auto fewer = static_cast<double>(std::min(bytes[0], bytes[1]));
  std::vector<double> list;
  for (const double time : seconds) list.push_back(fewer / time);
  return list;
}

void CallFigures::merge(const CallFigures& other) {
  records = other.records;
  bytes = other.bytes;
  seconds.insert(seconds.end(), other.seconds.begin(), other.seconds.end());
  veth_vs_plan.insert(veth_vs_plan.end(), other.veth_vs_plan.begin(), other.veth_vs_plan.end());
  checked_elements += other.checked_elements;
  wrong_elements += other.wrong_elements;
  miscounted += other.miscounted;
  if (trouble.empty()) trouble = other.trouble;
}

ExchangeFigures measure_exchange(const Namespaces& nodes, const ExchangeSettings& settings) {
  const std::string answer =
      on_nodes(nodes, settings.ranks_per_node, [&](const auto& bootstrap, Answer& out) {
        std::string own = Rank(nodes, bootstrap, settings).run();
        const auto parts = bootstrap->all_gather(own);
        if (bootstrap->rank() == 0) out.give(nlohmann::json(parts).dump());
      });
  std::vector<nlohmann::json> dispatches;
  std::vector<nlohmann::json> combines;
  for (const std::string part : nlohmann::json::parse(answer)) {
    const auto json = nlohmann::json::parse(part);
    dispatches.push_back(json.at("dispatch"));
    combines.push_back(json.at("combine"));
  }
  return {put_together(dispatches, settings.ranks_per_node),
          put_together(combines, settings.ranks_per_node)};
}

}  // namespace deep_ep::bench
