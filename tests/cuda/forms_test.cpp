#include "backend/cuda/internode_ll/forms.hpp"

#include <cstdio>
#include <set>

// Every call of low latency finds a kernel: the form that it chooses is one that its kernels are
// compiled for, whether messages are put or not.
namespace deep_ep::cuda::internode_ll {
namespace {

struct Putting : StepArgs {
  static constexpr bool kPuts = true;
};

int failures = 0;
void expect(bool holds, const char* what, Form form) {
  if (holds) return;
  std::printf("form %d: %s\n", static_cast<int>(form), what);
  ++failures;
}

template <class Args>
std::set<Form> compiled_forms() {
  std::set<Form> forms;
  const cudaError_t status = with_all_forms<Args>([&](auto form) {
    forms.insert(form.value);
    return cudaSuccess;
  });
  expect(status == cudaSuccess, "not all are visited", Form::kCount);
  return forms;
}

template <class Args>
void try_call(const Args& args, unsigned blocks, bool packeted, std::set<Form>& chosen) {
  const Form form = form_of(args, blocks, packeted);
  Form called = Form::kCount;
  const cudaError_t status = with_form<Args>(form, [&](auto one) {
    called = one.value;
    return cudaSuccess;
  });
  expect(status == cudaSuccess && called == form, "has no kernel", form);
  if (is_of_few_tokens(form))
    expect(packeted && args.num_tokens <= kFewTokens &&
               args.num_tokens << args.slice_shift <= std::int64_t{blocks},
           "is for fewer tokens", form);
  chosen.insert(form);
}

template <class Args>
void try_calls() {
  std::set<Form> chosen;
  Args args;
  for (const int topk : {1, 8, 31, 32})
    for (const int ranks : {1, 32, 33})
      for (const int tokens : {0, 1, 64, 65, 512})
        for (const int shift : {0, 2})
          for (const unsigned blocks : {1u, 132u, 264u})
            for (const bool rank_major : {false, true})
              for (const bool packeted : {false, true}) {
                args.shape.num_topk = topk;
                args.shape.num_ranks = ranks;
                args.num_tokens = tokens;
                args.slice_shift = shift;
                args.rank_major = rank_major;
                try_call(args, blocks, packeted, chosen);
              }
  expect(chosen == compiled_forms<Args>(), "others are compiled than chosen", Form::kCount);
}

}  // namespace
}  // namespace deep_ep::cuda::internode_ll

int main() {
  using namespace deep_ep::cuda::internode_ll;
  try_calls<StepArgs>();
  try_calls<Putting>();
  return failures == 0 ? 0 : 1;
}
