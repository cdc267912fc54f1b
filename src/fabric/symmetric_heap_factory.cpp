#include "fabric/symmetric_heap_factory.hpp"

#include <signal.h>

#include <array>

#include "base/error.hpp"
#include "base/plugin.hpp"
#include "fabric/agree.hpp"

namespace deep_ep::fabric {
namespace {

using MakeHeap = SymmetricHeap* (*)(Bootstrap&, const SymmetricHeapOptions&);

/// UCX takes over SIGSEGV and its like as soon as it is loaded; how a process dies is its owner's
/// business.
class KeptSignals {
 public:
  KeptSignals() {
    for (std::size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], nullptr, &before_[i]);
  }
  ~KeptSignals() {
    for (std::size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &before_[i], nullptr);
  }
  KeptSignals(const KeptSignals&) = delete;
  KeptSignals& operator=(const KeptSignals&) = delete;

 private:
  static constexpr std::array kSignals{SIGILL, SIGABRT, SIGBUS, SIGFPE, SIGSEGV};
  std::array<struct sigaction, kSignals.size()> before_{};
};

MakeHeap load() {
  const KeptSignals kept;
  return reinterpret_cast<MakeHeap>(
      load_plugin({.file = "libdeep_ep_ucx.so",
                   .symbol = "deep_ep_ucx_heap",
                   .wanted = "symmetric heap over a network",
                   .remedy = "build with UCX (Debian: libucx-dev) and run where it is installed "
                             "(libucx0)"}));
}

MakeHeap loaded() {
  static const MakeHeap make = load();
  return make;
}

}  // namespace

std::string why_no_symmetric_heap() {
  try {
    (void)loaded();
    return {};
  } catch (const Error& error) {
    return error.what();
  }
}

std::unique_ptr<SymmetricHeap> make_symmetric_heap(Bootstrap& bootstrap,
                                                   const SymmetricHeapOptions& options) {
  MakeHeap make = nullptr;
  together(bootstrap, [&] {
    require(options.bytes > 0, "bytes of a symmetric heap: {} is not allowed, must be positive",
            options.bytes);
    make = loaded();
  });
  return std::unique_ptr<SymmetricHeap>(make(bootstrap, options));
}

}  // namespace deep_ep::fabric
