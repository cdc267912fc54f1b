#include "json_file.hpp"

#include <fstream>

#include "base/error.hpp"

namespace deep_ep::cli {

void check_writable(const std::string& path) {
  if (!std::ofstream(path, std::ios::app)) throw_errno(fmt::format("opening {} to write", path));
}

void write_json(const std::string& path, const nlohmann::ordered_json& json) {
  std::ofstream file(path);
  file << json.dump(2) << '\n';
  file.close();
  if (!file) throw_errno(fmt::format("writing {}", path));
}

}  // namespace deep_ep::cli
