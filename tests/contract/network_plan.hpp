#pragma once

#include <cstdint>

#include "contract/program.hpp"

namespace deep_ep::test {

/// Bytes of rows that the program's calls send from node to node, all ranks together, as its
/// routing says: what any transport has to carry at least. Rows of a masked rank's program are not
/// counted.
std::int64_t bytes_between_nodes(const Program& program);

}  // namespace deep_ep::test
