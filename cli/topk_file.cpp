#include "topk_file.hpp"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <fstream>
#include <iterator>

#include "base/error.hpp"
#include "base/saturate.hpp"

namespace deep_ep::cli {
namespace {

constexpr std::string_view kMagic = "\x93NUMPY";

std::uint32_t little_endian(std::string_view bytes) {
  std::uint32_t value = 0;
  for (std::size_t i = bytes.size(); i-- > 0;)
    value = value << 8 | static_cast<unsigned char>(bytes[i]);
  return value;
}

/// The value of `key` in the header's Python dictionary, up to the comma or brace that ends it.
std::string_view header_value(std::string_view header, std::string_view key,
                              const std::string& name) {
  const std::string quoted = fmt::format("'{}':", key);
  const std::size_t at = header.find(quoted);
  require(at != header.npos, "{}: the .npy header has no '{}'", name, key);
  std::string_view rest = header.substr(at + quoted.size());
  rest.remove_prefix(std::min(rest.find_first_not_of(' '), rest.size()));
  const bool tuple = !rest.empty() && rest.front() == '(';
  const std::size_t end = tuple ? rest.find(')') : rest.find_first_of(",}");
  require(end != rest.npos, "{}: '{}' in the .npy header does not end", name, key);
  rest = rest.substr(0, end + (tuple ? 1 : 0));
  return rest.substr(0, rest.find_last_not_of(' ') + 1);
}

std::vector<std::int64_t> parse_shape(std::string_view text, const std::string& name) {
  std::vector<std::int64_t> shape;
  std::string_view rest = text.substr(text.starts_with('(') ? 1 : 0);
  while (true) {
    rest.remove_prefix(std::min(rest.find_first_not_of(" ,"), rest.size()));
    if (rest.empty() || rest.front() == ')') return shape;
    std::int64_t extent = 0;
    const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), extent);
    require(error == std::errc() && extent >= 0, "{}: shape {} in the .npy header is no shape",
            name, text);
    shape.push_back(extent);
    rest.remove_prefix(static_cast<std::size_t>(end - rest.data()));
  }
}

struct NpyHeader {
  std::string_view dictionary;
  std::string_view data;
};

NpyHeader split_npy(std::string_view bytes, const std::string& name) {
  require(bytes.starts_with(kMagic), "{}: does not start with the magic bytes of a .npy file",
          name);
  require(bytes.size() >= 12, "{}: ends within the .npy header", name);
  const int major = static_cast<unsigned char>(bytes[6]);
  require(major >= 1 && major <= 3, "{}: .npy version {} is unknown; allowed: 1, 2, 3", name,
          major);
  const std::size_t length_bytes = major == 1 ? 2 : 4;
  const std::size_t length = little_endian(bytes.substr(8, length_bytes));
  const std::size_t begin = 8 + length_bytes;
  require(bytes.size() - begin >= length, "{}: ends within the .npy header", name);
  return {bytes.substr(begin, length), bytes.substr(begin + length)};
}

template <class T>
void append_ids(std::string_view data, std::vector<std::int64_t>& ids) {
  for (std::size_t at = 0; at < data.size(); at += sizeof(T)) {
    T id;
    std::memcpy(&id, data.data() + at, sizeof id);
    ids.push_back(id);
  }
}

std::vector<std::int64_t> parse_line(std::string_view line, const std::string& place) {
  constexpr std::string_view kSeparators = " \t,\r";
  std::vector<std::int64_t> ids;
  while (true) {
    line.remove_prefix(std::min(line.find_first_not_of(kSeparators), line.size()));
    if (line.empty()) return ids;
    const std::string_view word = line.substr(0, line.find_first_of(kSeparators));
    std::int64_t id = 0;
    const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), id);
    require(error == std::errc() && end == word.data() + word.size(),
            "{}: '{}' is no expert id (an integer)", place, word);
    ids.push_back(id);
    line.remove_prefix(word.size());
  }
}

}  // namespace

TopkTable parse_npy(std::string_view bytes, const std::string& name) {
  const NpyHeader header = split_npy(bytes, name);
  const std::string_view dtype = header_value(header.dictionary, "descr", name);
  require(dtype == "'<i4'" || dtype == "'<i8'",
          "{}: dtype {} is not allowed; allowed: '<i4' (int32), '<i8' (int64)", name, dtype);
  const std::string_view order = header_value(header.dictionary, "fortran_order", name);
  require(order == "False", "{}: fortran_order is {}; allowed: False (C order)", name, order);
  const std::string_view shape_text = header_value(header.dictionary, "shape", name);
  const std::vector<std::int64_t> shape = parse_shape(shape_text, name);
  require(shape.size() == 2 && shape[0] >= 1 && shape[1] >= 1 && shape[1] <= 65536,
          "{}: shape {} is not allowed; needed: (tokens, topk), both at least 1", name, shape_text);
  const std::int64_t size = dtype == "'<i4'" ? 4 : 8;
  require(shape[0] <= static_cast<std::int64_t>(header.data.size()) &&
              shape[0] * shape[1] * size == static_cast<std::int64_t>(header.data.size()),
          "{}: has {} bytes of data, shape {} of {} needs {}", name, header.data.size(), shape_text,
          dtype, saturated_product(shape[0], shape[1] * size));
  TopkTable table{shape[0], static_cast<int>(shape[1]), {}};
  if (size == 4)
    append_ids<std::int32_t>(header.data, table.ids);
  else
    append_ids<std::int64_t>(header.data, table.ids);
  return table;
}

TopkTable parse_topk_text(std::string_view text, const std::string& name) {
  TopkTable table;
  for (std::int64_t number = 1; !text.empty(); ++number) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    const std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    if (line.starts_with('#')) continue;
    const auto ids = parse_line(line, fmt::format("{}, line {}", name, number));
    if (ids.empty()) continue;
    if (table.rows == 0) table.topk = static_cast<int>(ids.size());
    require(static_cast<int>(ids.size()) == table.topk,
            "{}, line {}: has {} ids, the lines before have {}", name, number, ids.size(),
            table.topk);
    table.ids.insert(table.ids.end(), ids.begin(), ids.end());
    ++table.rows;
  }
  require(table.rows > 0, "{}: has no tokens", name);
  return table;
}

TopkTable read_topk_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  require(file.good(), "routing file {} cannot be opened: {}", path, std::strerror(errno));
  const std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (bytes.starts_with(kMagic) || path.ends_with(".npy")) return parse_npy(bytes, path);
  return parse_topk_text(bytes, path);
}

std::vector<std::int64_t> take_rows(const TopkTable& table, int rank, std::int64_t tokens) {
  std::vector<std::int64_t> ids;
  ids.reserve(static_cast<std::size_t>(tokens * table.topk));
  for (std::int64_t token = 0; token < tokens; ++token) {
    const auto row = table.ids.begin() + (rank * tokens + token) % table.rows * table.topk;
    ids.insert(ids.end(), row, row + table.topk);
  }
  return ids;
}

}  // namespace deep_ep::cli
