#pragma once

#include <string>

namespace deep_ep {

/// A part of this project that is a library of its own.
struct Plugin {
  const char* file;    ///< name of the library
  const char* symbol;  ///< the one function that it exports
  std::string wanted;  ///< what an Error begins with: "device cuda"
  std::string remedy;  ///< what an Error ends with: how to get it, or do without
};

/// Loads the library and gives the function's address. It is looked for beside the library or
/// program that this code is part of, in lib/ beside that folder, then where the system looks.
/// Stays loaded. Throws Error(kUnsupported) saying what is missing.
void* load_plugin(const Plugin& plugin);

}  // namespace deep_ep
