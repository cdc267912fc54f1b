#pragma once

#include <cstdint>
#include <string>

#include <nlohmann/json.hpp>

#include "base/env.hpp"

namespace deep_ep::cli {

/// What a figure must be read beside.
struct Machine {
  std::string host;
  std::string system;  // kernel name and release
  std::string cpu;
  int cores = 0;  // that this process may use
  std::int64_t memory_bytes = 0;
  std::int64_t available_bytes = 0;
  std::string shared_huge_pages;  // the kernel's mode for memfd and tmpfs
  std::string host_id;            // the same for all processes since the last boot
};
Machine read_machine();

/// The variable's value now, or its default; "(set)" for secrets.
std::string shown_value(const env::Variable& variable);

/// UTC, ISO 8601.
std::string now();

/// Machine, date, library version and every DEEP_EP_* variable that is set.
nlohmann::ordered_json environment_json();

}  // namespace deep_ep::cli
