#include "multi/fault_situations.hpp"

#include "base/event_state.hpp"

namespace deep_ep::test {
namespace {

// Memory for arguments that differ from the others'; longer than any of them needs.
std::vector<float>& spare() {
  static std::vector<float> memory(1 << 16, 1.0F);
  return memory;
}
std::vector<std::int64_t>& spare_ids() {
  static std::vector<std::int64_t> memory(1 << 16, 0);
  return memory;
}

constexpr std::int64_t kTokens = Exchange::kTokens;
constexpr std::int64_t kHidden = Exchange::kHidden;

std::function<void(const Scene&)> dispatch_with(
    std::function<void(const Scene&, DispatchArgs&)> change) {
  return [change](const Scene& scene) {
    DispatchArgs args = scene.exchange.dispatch_args(scene.buffer);
    if (scene.victim) change(scene, args);
    scene.buffer.dispatch(args);
  };
}

std::function<void(const Scene&)> combine_with(
    std::function<void(const Scene&, CombineArgs&)> change) {
  return [change](const Scene& scene) {
    CombineArgs args = Exchange::combine_args(scene.dispatched);
    if (scene.victim) change(scene, args);
    scene.buffer.combine(args);
  };
}

void give_scales(DispatchArgs& args, DType dtype, std::int64_t count) {
  args.x_scales = {spare().data(), dtype, {kTokens, count}};
}

std::vector<Situation> dispatch_disagreements() {
  return {
      {"hidden", dispatch_with([](const Scene&, DispatchArgs& args) {
         args.x = {spare().data(), DType::kFloat32, {kTokens, kHidden * 2}};
       }),
       "hidden"},
      {"dtype", dispatch_with([](const Scene&, DispatchArgs& args) {
         args.x = {spare().data(), DType::kBfloat16, {kTokens, kHidden}};
       }),
       "dtype of x"},
      {"topk", dispatch_with([](const Scene& scene, DispatchArgs& args) {
         args.topk_idx = {spare_ids().data(), DType::kInt64, {kTokens, 2}};
         args.topk_weights = {spare().data(), DType::kFloat32, {kTokens, 2}};
         args.layout = scene.buffer.get_dispatch_layout(args.topk_idx, kRanks);
       }),
       "topk"},
      {"topk_dtype", dispatch_with([](const Scene& scene, DispatchArgs& args) {
         args.topk_idx = {spare_ids().data(), DType::kInt32, {kTokens, kRanks}};
         args.layout = scene.buffer.get_dispatch_layout(args.topk_idx, kRanks);
       }),
       "dtype of topk_idx"},
      {"experts", dispatch_with([](const Scene& scene, DispatchArgs& args) {
         args.layout = scene.buffer.get_dispatch_layout(args.topk_idx, kRanks * 2);
       }),
       "num_experts"},
      {"weights", dispatch_with([](const Scene&, DispatchArgs& args) { args.topk_weights = {}; }),
       "topk_weights"},
      {"scales", dispatch_with([](const Scene&, DispatchArgs& args) {
         give_scales(args, DType::kFloat32, 2);
       }),
       "x_scales"},
      {"num_scales",
       [](const Scene& scene) {
         DispatchArgs args = scene.exchange.dispatch_args(scene.buffer);
         give_scales(args, DType::kFloat32, scene.victim ? 3 : 2);
         scene.buffer.dispatch(args);
       },
       "x_scales"},
      {"scale_dtype",
       [](const Scene& scene) {
         DispatchArgs args = scene.exchange.dispatch_args(scene.buffer);
         give_scales(args, scene.victim ? DType::kInt32 : DType::kFloat32, 2);
         scene.buffer.dispatch(args);
       },
       "x_scales"}};
}

std::vector<Situation> other_disagreements() {
  return {
      {"combine_hidden", combine_with([](const Scene& scene, CombineArgs& args) {
         args.x = {spare().data(), DType::kFloat32, {scene.dispatched.num_recv_tokens, 4}};
       }),
       "hidden"},
      {"combine_dtype", combine_with([](const Scene& scene, CombineArgs& args) {
         args.x = {spare().data(), DType::kFloat16, {scene.dispatched.num_recv_tokens, kHidden}};
       }),
       "dtype of x"},
      {"combine_weights", combine_with([](const Scene& scene, CombineArgs& args) {
         args.topk_weights = {
             spare().data(), DType::kFloat32, {scene.dispatched.num_recv_tokens, kRanks}};
       }),
       "topk"},
      {"dispatch_and_combine",
       [](const Scene& scene) {
         scene.exchange.run(scene.buffer, scene.victim ? Op::kCombine : Op::kDispatch,
                            scene.dispatched);
       },
       "operation"},
      {"barrier_and_dispatch",
       [](const Scene& scene) {
         scene.exchange.run(scene.buffer, scene.victim ? Op::kBarrier : Op::kDispatch,
                            scene.dispatched);
       },
       "operation"},
      {"combine_and_barrier",
       [](const Scene& scene) {
         scene.exchange.run(scene.buffer, scene.victim ? Op::kCombine : Op::kBarrier,
                            scene.dispatched);
       },
       "operation"},
      {"prepared_and_not",
       [](const Scene& scene) {
         DispatchArgs args = scene.exchange.dispatch_args(scene.buffer);
         const PreparedDispatch prepared = scene.buffer.prepare_dispatch(args);
         if (scene.victim) args.prepared = prepared;
         scene.buffer.dispatch(args);
       },
       "operation"},
      {"cached_and_not",
       [](const Scene& scene) {
         scene.exchange.run(scene.buffer, scene.victim ? Op::kCachedDispatch : Op::kDispatch,
                            scene.dispatched);
       },
       "operation"}};
}

std::vector<Situation> dispatch_refusals() {
  return {
      {"expert_id", dispatch_with([](const Scene& scene, DispatchArgs& args) {
         static std::vector<std::int64_t> ids;
         ids = scene.exchange.topk_idx;
         ids[7] = kRanks;
         args.topk_idx = {ids.data(), DType::kInt64, {kTokens, kRanks}};
       }),
       "topk_idx"},
      {"x_rows", dispatch_with([](const Scene&, DispatchArgs& args) {
         args.x = {spare().data(), DType::kFloat32, {kTokens + 1, kHidden}};
       }),
       "is_token_in_rank"},
      {"row_bytes", dispatch_with([](const Scene&, DispatchArgs& args) {
         args.x = {spare().data(), DType::kFloat32, {kTokens, kHidden + 1}};
       }),
       "multiple of 16"},
      {"weights_shape", dispatch_with([](const Scene&, DispatchArgs& args) {
         args.topk_weights = {spare().data(), DType::kFloat32, {kTokens, kRanks + 1}};
       }),
       "topk_weights"},
      {"scales_shape", dispatch_with([](const Scene&, DispatchArgs& args) {
         args.x_scales = {spare().data(), DType::kFloat32, {kTokens - 1, 2}};
       }),
       "x_scales"},
      {"alignment",
       dispatch_with([](const Scene&, DispatchArgs& args) { args.expert_alignment = 0; }),
       "expert_alignment"},
      {"config", dispatch_with([](const Scene&, DispatchArgs& args) { args.config.num_sms = 0; }),
       "num_sms"},
      {"experts_and_layout",
       dispatch_with([](const Scene&, DispatchArgs& args) { args.num_experts = kRanks; }),
       "num_experts"},
      {"experts_not_of_ranks", dispatch_with([](const Scene&, DispatchArgs& args) {
         args.layout = {};
         args.num_experts = kRanks + 1;
       }),
       "num_experts"},
      {"no_layout",
       dispatch_with([](const Scene&, DispatchArgs& args) { args.layout.is_token_in_rank = {}; }),
       "is_token_in_rank"}};
}

/// Outputs, counts and groups that do not fit.
std::vector<Situation> grouped_refusals() {
  return {{"output_rows", dispatch_with([](const Scene&, DispatchArgs& args) {
             args.recv_x = {spare().data(), DType::kFloat32, {1, kHidden}};
           }),
           "recv_x"},
          {"output_dtype", dispatch_with([](const Scene&, DispatchArgs& args) {
             args.recv_topk_idx = {spare_ids().data(), DType::kInt32, {1024, kRanks}};
           }),
           "recv_topk_idx"},
          {"groups_without_topk", dispatch_with([](const Scene&, DispatchArgs& args) {
             args.group_rows = true;
             args.topk_idx = args.topk_weights = {};
           }),
           "group_rows"},
          {"prepared_ids",
           [](const Scene& scene) {
             DispatchArgs args = scene.exchange.dispatch_args(scene.buffer);
             args.prepared = scene.buffer.prepare_dispatch(args);
             static std::vector<std::int64_t> ids;
             ids = scene.exchange.topk_idx;
             ids[7] = kRanks;
             if (scene.victim) args.topk_idx = {ids.data(), DType::kInt64, {kTokens, kRanks}};
             scene.buffer.dispatch(args);
           },
           "topk_idx"},
          {"grouped_rows",
           [](const Scene& scene) {
             DispatchArgs args = scene.exchange.dispatch_args(scene.buffer);
             args.group_rows = true;
             const DispatchResult got = scene.buffer.dispatch(args);
             CombineArgs back = Exchange::combine_args(got);
             back.x = got.grouped_x;
             back.groups = got.groups;
             if (scene.victim)
               got.groups.grouped_rows.as<std::int32_t>()[0] =
                   static_cast<std::int32_t>(got.grouped_x.shape[0]);
             scene.buffer.combine(back);
           },
           "grouped_rows"}};
}

/// The event of a call that failed, of another Buffer say.
class FailedCall final : public EventState {
 public:
  void stream_wait(Stream) override { host_wait(); }
  void host_wait() override {
    throw Error(ErrorCode::kInvalidArgument, "the call of previous_event failed");
  }
  bool query() override { return true; }
};

std::vector<Situation> other_refusals() {
  return {
      {"previous_event", combine_with([](const Scene&, CombineArgs& args) {
         args.options.previous_event = EventHandle(std::make_shared<FailedCall>());
       }),
       "previous_event"},
      {"previous_event_async",
       [](const Scene& scene) {
         CombineArgs args = Exchange::combine_args(scene.dispatched);
         args.options.async_finish = true;
         if (scene.victim)
           args.options.previous_event = EventHandle(std::make_shared<FailedCall>());
         scene.buffer.combine(args).event.host_wait();
       },
       "previous_event"},
      {"handle_and_topk",
       [](const Scene& scene) {
         DispatchArgs args = Exchange::cached_args(scene.exchange, scene.dispatched);
         if (scene.victim) args.topk_idx = {spare_ids().data(), DType::kInt64, {kTokens, kRanks}};
         scene.buffer.dispatch(args);
       },
       "topk_idx"},
      {"combine_fp8", combine_with([](const Scene& scene, CombineArgs& args) {
         args.x = {spare().data(), DType::kFloat8E4m3, {scene.dispatched.num_recv_tokens, kHidden}};
       }),
       "float8_e4m3"},
      {"combine_rows", combine_with([](const Scene&, CombineArgs& args) {
         args.x = {spare().data(), DType::kFloat32, {1, kHidden}};
       }),
       "x"},
      {"bias_shape", combine_with([](const Scene&, CombineArgs& args) {
         args.bias[1] = {spare().data(), DType::kFloat32, {kTokens, kHidden / 2}};
       }),
       "bias"},
      {"comm_stream_alone", combine_with([](const Scene&, CombineArgs& args) {
         args.options.allocate_on_comm_stream = true;
       }),
       "allocate_on_comm_stream"}};
}

std::vector<Situation> join(std::vector<Situation> first, const std::vector<Situation>& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

}  // namespace

const std::vector<Situation>& disagreements() {
  static const std::vector<Situation> situations =
      join(dispatch_disagreements(), other_disagreements());
  return situations;
}

const std::vector<Situation>& refusals() {
  static const std::vector<Situation> situations =
      join(join(dispatch_refusals(), grouped_refusals()), other_refusals());
  return situations;
}

}  // namespace deep_ep::test
