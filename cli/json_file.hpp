#pragma once

#include <string>

#include <nlohmann/json.hpp>

namespace deep_ep::cli {

// Both throw Error(kSystem) naming the file.
void check_writable(const std::string& path);
void write_json(const std::string& path, const nlohmann::ordered_json& json);

}  // namespace deep_ep::cli
