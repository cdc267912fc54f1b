#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace deep_ep::cli {

/// Recorded expert ids, a row per token.
struct TopkTable {
  std::int64_t rows = 0;
  int topk = 0;
  std::vector<std::int64_t> ids;  // [rows, topk]
};

/// A NumPy .npy file (2-D, little-endian int32 or int64, C order) or text: a token a line, ids
/// separated by spaces, tabs or commas, lines that start with '#' skipped. Throws
/// Error(kInvalidArgument) that names the file and what is wrong with it.
TopkTable read_topk_file(const std::string& path);

/// The same from memory; `name` is used in messages.
TopkTable parse_npy(std::string_view bytes, const std::string& name);
TopkTable parse_topk_text(std::string_view text, const std::string& name);

/// Tokens of one rank: rows rank * tokens onwards, starting over behind the last one.
std::vector<std::int64_t> take_rows(const TopkTable& table, int rank, std::int64_t tokens);

}  // namespace deep_ep::cli
