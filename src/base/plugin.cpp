#include "base/plugin.hpp"

#include <dlfcn.h>
#include <unistd.h>

#include "base/error.hpp"

namespace deep_ep {

namespace {

/// The reason of this thread's last failure.
std::string reason() {
  const char* text = dlerror();  // NOLINT(concurrency-mt-unsafe): glibc keeps it for each thread
  return text == nullptr ? "no reason given" : text;
}

/// The folder of the library or program that this code is part of, with a slash.
std::string own_folder() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&own_folder), &info) == 0) return "";
  const std::string path = info.dli_fname;
  return path.substr(0, path.rfind('/') + 1);
}

}  // namespace

void* load_plugin(const Plugin& plugin) {
  void* library = nullptr;
  std::string why;
  for (const std::string& folder : {own_folder(), own_folder() + "../lib/", std::string()}) {
    const std::string path = folder + plugin.file;
    library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) break;
    // Of a file that is there but cannot be loaded the reason counts.
    const std::string this_time = reason();
    if (why.empty() || access(path.c_str(), F_OK) == 0) why = this_time;
  }
  if (library == nullptr) {
    throw Error(ErrorCode::kUnsupported,
                fmt::format("{}: {}; {}", plugin.wanted, why, plugin.remedy));
  }
  void* symbol = dlsym(library, plugin.symbol);
  if (symbol == nullptr) {
    throw Error(ErrorCode::kUnsupported, fmt::format("{}: {} is not of this version ({})",
                                                     plugin.wanted, plugin.file, reason()));
  }
  return symbol;
}

}  // namespace deep_ep
