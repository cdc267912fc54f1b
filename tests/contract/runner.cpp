#include "contract/runner.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace deep_ep::test {
namespace {

/// Programs on the same Buffers before these are destroyed and built anew.
constexpr int kProgramsABuffer = 24;

/// "" if all outputs are right.
std::string run_step(Buffer& buffer, const Program& program, std::size_t i) {
  const Step& step = program.steps[i];
  const verify::CaseResult result = step.low_latency ? verify::run_case(buffer, *step.low_latency)
                                                     : verify::run_case(buffer, step.exchange);
  if (!result.passed())
    return fmt::format("{} of {} elements wrong, first: {}\n    step {} on buffer {}: {}",
                       result.wrong_elements, result.checked_elements, result.first_mismatch, i,
                       step.buffer, step.describe());
  const bool absent = step.low_latency && step.low_latency->masked == buffer.rank();
  if (result.checked_outputs == 0 && !absent) return fmt::format("step {} checked nothing", i);
  return "";
}

/// The first text that is not empty, so that all steps run: the other ranks need this one's part.
void keep_first(std::string& wrong, const std::string& text) {
  if (wrong.empty()) wrong = text;
}

bool has_masked(const Program& program) {
  return std::any_of(program.steps.begin(), program.steps.end(), [](const Step& step) {
    return step.low_latency && step.low_latency->masked != verify::LowLatencyCase::kNobody;
  });
}

/// Low-latency calls take all SMs of a GPU, so those of several Buffers come in one order.
bool may_be_concurrent(const Program& program, Device device) {
  return device.type == DeviceType::kHost ||
         std::none_of(program.steps.begin(), program.steps.end(),
                      [](const Step& step) { return step.low_latency.has_value(); });
}

std::int64_t needed_rdma_bytes(const Program& program, int buffer) {
  std::int64_t bytes = 0;
  for (const Step& step : program.steps)
    if (step.buffer == buffer && step.low_latency)
      bytes = std::max(bytes, step.low_latency->buffer_bytes());
  return bytes;
}

/// Sets a variable, unless to 0, for the Buffers that are made meanwhile.
class SetVariable {
 public:
  SetVariable(const char* name, std::int64_t value) : name_(name), set_(value > 0) {
    if (set_) setenv(name, std::to_string(value).c_str(), 1);
  }
  ~SetVariable() {
    if (set_) unsetenv(name_);
  }
  SetVariable(const SetVariable&) = delete;
  SetVariable& operator=(const SetVariable&) = delete;

 private:
  const char* name_;
  bool set_;
};

std::string run_concurrently(const Program& program, const std::map<int, Buffer*>& buffers) {
  std::mutex mutex;
  std::string wrong;
  std::vector<std::thread> threads;
  for (const auto& [number, buffer] : buffers) {
    threads.emplace_back([&, number = number, buffer = buffer] {
      std::string text;
      try {
        for (std::size_t i = 0; i < program.steps.size(); ++i) {
          if (program.steps[i].buffer == number) keep_first(text, run_step(*buffer, program, i));
        }
      } catch (const std::exception& error) {
        text = error.what();
      }
      const std::lock_guard lock(mutex);
      keep_first(wrong, text);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return wrong;
}

}  // namespace

std::string Runner::run(Worker& worker, const Program& program, std::int64_t generation) {
  if (generation != generation_) {
    generation_ = generation;
    keepsakes_ = {};
    buffers_.clear();
    programs_since_renewal_.clear();
  }
  Buffers own;
  const bool own_buffers = program.own_buffers || program.first_ticket > 0;
  Buffers& buffers = own_buffers ? own : buffers_;
  std::string wrong;
  try {
    wrong = run_steps(worker, program, buffers);
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kUnsupported) return kSkipped + std::string(error.what());
    wrong = fmt::format("{}: {}", to_string(error.code()), error.what());
  }
  drop(own, program.ranks);
  if (wrong.empty()) wrong = keepsakes_.check();
  if (!own_buffers && ++programs_since_renewal_[program.ranks] >= kProgramsABuffer) {
    drop(buffers_, program.ranks);
    programs_since_renewal_[program.ranks] = 0;
    if (wrong.empty()) wrong = keepsakes_.check();
  }
  return wrong.empty() ? kPassed : wrong;
}

std::string Runner::run_steps(Worker& worker, const Program& program, Buffers& buffers) {
  std::map<int, Buffer*> used;
  for (const Step& step : program.steps) used[step.buffer] = nullptr;
  if (program.ranks_per_node > 0) enter_node(worker.rank() / program.ranks_per_node);
  for (auto& [number, pointer] : used) pointer = &buffer(worker, buffers, program, number);

  std::string wrong;
  if (program.concurrent && may_be_concurrent(program, target_.device)) {
    wrong = run_concurrently(program, used);
  } else {
    for (std::size_t i = 0; i < program.steps.size(); ++i)
      keep_first(wrong, run_step(*used[program.steps[i].buffer], program, i));
  }
  if (has_masked(program)) return wrong;  // which goes its own way from here on
  Buffer& first = *used.begin()->second;
  keep_first(wrong, keepsakes_.combine_oldest(first));
  keepsakes_.take(first);
  return wrong;
}

// Buffers of programs over other nodes stay where they were made.
void Runner::enter_node(int node) {
  if (!target_.enter_node || node == node_) return;
  target_.enter_node(node);
  node_ = node;
}

Buffer& Runner::buffer(Worker& worker, Buffers& buffers, const Program& program, int number) {
  Made& made = buffers[{worker.num_ranks(), program.ranks_per_node, number}];
  const std::int64_t rdma_bytes = needed_rdma_bytes(program, number);
  if (made.buffer != nullptr && made.rdma_bytes < rdma_bytes) {
    keepsakes_.forget_buffer(*made.buffer);
    made = {};
  }
  if (made.buffer == nullptr) {
    BufferOptions options;
    options.device = target_.device;
    // Ranks share GPUs when there are fewer.
    options.device.index = worker.rank() % std::max(1, num_devices(target_.device.type));
    options.timeout = target_.timeout;
    // Odd ones start with nothing, so that their first results make them grow. So do those of low
    // latency, whose callers pass no num_nvl_bytes.
    options.num_nvl_bytes = number % 2 == 0 && rdma_bytes == 0
                                ? Config{}.get_nvl_buffer_size_hint(7168 * 2, worker.num_ranks())
                                : 0;
    options.num_rdma_bytes = rdma_bytes;
    options.low_latency_mode = rdma_bytes > 0;
    options.enable_shrink = has_masked(program);
    // Several threads for odd ones: several lanes between nodes.
    if (program.ranks_per_node > 0) options.num_threads = number % 2 == 0 ? 1 : 3;
    const SetVariable first_ticket("DEEP_EP_FIRST_TICKET", program.first_ticket);
    const SetVariable ranks_per_node("DEEP_EP_RANKS_PER_NODE",
                                     target_.enter_node ? 0 : program.ranks_per_node);
    made = {std::make_unique<Buffer>(worker.bootstrap(), options), rdma_bytes};
    const int found = made.buffer->num_ranks_per_node();
    if (program.ranks_per_node > 0 && found != program.ranks_per_node)
      throw std::runtime_error(
          fmt::format("the Buffer finds {} ranks a node, not {}", found, program.ranks_per_node));
  }
  return *made.buffer;
}

void Runner::drop(Buffers& buffers, int num_ranks) {
  for (auto it = buffers.begin(); it != buffers.end();) {
    if (std::get<0>(it->first) != num_ranks) {
      ++it;
      continue;
    }
    keepsakes_.forget_buffer(*it->second.buffer);
    it = buffers.erase(it);
  }
}

}  // namespace deep_ep::test
