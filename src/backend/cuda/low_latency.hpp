#pragma once

#include <cstdint>
#include <memory>

#include "backend/cuda/context.hpp"
#include "backend/cuda/internode.hpp"
#include "backend/cuda/internode_ll/steps.hpp"
#include "backend/params.hpp"

namespace deep_ep::cuda {

/// The low-latency steps of a rank: from their params to their kernels.
class LowLatency {
 public:
  LowLatency(Context& context, const Internode& internode, const BackendOptions& options);

  void dispatch(const deep_ep::internode_ll::DispatchParams& params);
  void combine(const deep_ep::internode_ll::CombineParams& params);
  void update_mask(int rank, bool masked, Stream stream);
  void query_mask(std::int32_t* masks, Stream stream);
  void clean_mask(Stream stream);

 private:
  void start_tickets();
  void fill(const deep_ep::internode_ll::Step& step, plan::LowLatencyKind kind,
            internode_ll::StepArgs& args);
  bool over_nodes() const { return context_.topology().num_nodes() > 1; }
  /// Nodes::told, of several nodes.
  std::uint64_t* told_words();
  /// The kernel of a step, by `alone` unless the Buffer is over several nodes.
  template <class Args>
  cudaError_t launch(const Args& args, const deep_ep::internode_ll::Step& step,
                     cudaError_t (*alone)(const Args&, int, cudaStream_t));

  Context& context_;
  const Internode& internode_;
  std::int64_t bytes_;
  int num_ranks_;
  bool may_shrink_;
  std::uint64_t last_ticket_;  // tickets begin behind it
  ZeroedWords mask_words_;
  ZeroedWords told_words_;
};

}  // namespace deep_ep::cuda
