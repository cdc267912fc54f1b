#include "topk_file.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "deep_ep/error.hpp"

namespace deep_ep::cli {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

template <class T>
std::string bytes_of(const std::vector<T>& values) {
  std::string bytes(values.size() * sizeof(T), '\0');
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

std::string npy(const std::string& header, const std::string& data) {
  std::string padded = header;
  padded.resize((10 + padded.size()) / 64 * 64 + 64 - 10, ' ');
  padded.back() = '\n';
  std::string bytes = "\x93NUMPY";
  bytes += {1, 0, static_cast<char>(padded.size() & 0xff), static_cast<char>(padded.size() >> 8)};
  return bytes + padded + data;
}

std::string header(const std::string& dtype, const std::string& order, const std::string& shape) {
  return "{'descr': '" + dtype + "', 'fortran_order': " + order + ", 'shape': " + shape + ", }";
}

template <class Parse>
std::string refusal(const Parse& parse) {
  try {
    parse();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
    return error.what();
  }
  return "was not refused";
}

std::string npy_refusal(const std::string& bytes) {
  return refusal([&] { parse_npy(bytes, "ids.npy"); });
}

TEST(Npy, Int64RowsAreReadInOrder) {
  const auto table = parse_npy(
      npy(header("<i8", "False", "(2, 3)"), bytes_of<std::int64_t>({1, -1, 255, 7, 8, 1LL << 40})),
      "ids.npy");
  EXPECT_EQ(table.rows, 2);
  EXPECT_EQ(table.topk, 3);
  EXPECT_THAT(table.ids, ElementsAre(1, -1, 255, 7, 8, 1LL << 40));
}

TEST(Npy, Int32IsWidenedWithItsSign) {
  const auto table = parse_npy(
      npy(header("<i4", "False", "(3, 1)"), bytes_of<std::int32_t>({5, -1, 6})), "ids.npy");
  EXPECT_THAT(table.ids, ElementsAre(5, -1, 6));
}

TEST(Npy, Version2HeadersHaveALongerLength) {
  const std::string dictionary = header("<i4", "False", "(1, 2)");
  std::string bytes = "\x93NUMPY";
  bytes += {2, 0, static_cast<char>(dictionary.size()), 0, 0, 0};
  const auto table = parse_npy(bytes + dictionary + bytes_of<std::int32_t>({3, 4}), "ids.npy");
  EXPECT_THAT(table.ids, ElementsAre(3, 4));
}

TEST(Npy, RefusalsNameTheFileAndWhatIsWrong) {
  const std::string ids = bytes_of<std::int64_t>({1, 2});
  EXPECT_THAT(npy_refusal("no magic"), HasSubstr("ids.npy: does not start with the magic"));
  EXPECT_THAT(npy_refusal(npy(header("<f8", "False", "(1, 2)"), ids)), HasSubstr("'<f8'"));
  EXPECT_THAT(npy_refusal(npy(header(">i8", "False", "(1, 2)"), ids)), HasSubstr("'>i8'"));
  EXPECT_THAT(npy_refusal(npy(header("<i8", "True", "(1, 2)"), ids)), HasSubstr("fortran_order"));
  EXPECT_THAT(npy_refusal(npy(header("<i8", "False", "(2,)"), ids)), HasSubstr("(2,)"));
  EXPECT_THAT(npy_refusal(npy(header("<i8", "False", "(0, 2)"), "")), HasSubstr("(0, 2)"));
  EXPECT_THAT(npy_refusal(npy(header("<i8", "False", "(-1, 2)"), ids)), HasSubstr("(-1, 2)"));
  EXPECT_THAT(npy_refusal(npy(header("<i8", "False", "(1, x)"), ids)), HasSubstr("(1, x)"));
  EXPECT_THAT(npy_refusal(npy("{'descr': '<i8', 'shape': (1, 2)}", ids)),
              HasSubstr("no 'fortran_order'"));
}

TEST(Npy, DataShorterOrLongerThanItsShapeIsRefusedWithBothSizes) {
  const std::string ids = bytes_of<std::int64_t>({1, 2, 3});
  const std::string refused = npy_refusal(npy(header("<i8", "False", "(2, 2)"), ids));
  EXPECT_THAT(refused, HasSubstr("24 bytes"));
  EXPECT_THAT(refused, HasSubstr("needs 32"));
  EXPECT_THAT(npy_refusal(npy(header("<i8", "False", "(1, 2)"), ids)), HasSubstr("needs 16"));
}

TEST(Npy, AProductThatOverflowsIsRefused) {
  EXPECT_THAT(npy_refusal(npy(header("<i8", "False", "(4611686018427387904, 4)"),
                              bytes_of<std::int64_t>({1, 2}))),
              HasSubstr("16 bytes of data"));
}

TEST(Npy, EveryPrefixOfAFileIsRefused) {
  const std::string bytes = npy(header("<i4", "False", "(1, 2)"), bytes_of<std::int32_t>({3, 4}));
  for (std::size_t size = 0; size < bytes.size(); ++size)
    EXPECT_THROW(parse_npy(std::string_view(bytes).substr(0, size), "ids.npy"), Error) << size;
}

TEST(TopkText, SpacesTabsCommasAndCommentsAreUnderstood) {
  const auto table = parse_topk_text("# layer 3\n1 2\t3\n4,-1, 6\r\n\n7 8 9", "ids.txt");
  EXPECT_EQ(table.rows, 3);
  EXPECT_THAT(table.ids, ElementsAre(1, 2, 3, 4, -1, 6, 7, 8, 9));
}

TEST(TopkText, RefusalsNameTheLine) {
  const auto refused = [](const char* text) {
    return refusal([&] { parse_topk_text(text, "ids.txt"); });
  };
  EXPECT_THAT(refused("1 2\n3 x\n"), HasSubstr("ids.txt, line 2: 'x'"));
  EXPECT_THAT(refused("1 2\n3 4.5\n"), HasSubstr("line 2: '4.5'"));
  EXPECT_THAT(refused("1 2\n\n3\n"), HasSubstr("line 3: has 1 ids"));
  EXPECT_THAT(refused("# nothing\n"), HasSubstr("has no tokens"));
}

TEST(TopkFile, AMissingFileIsNamed) {
  EXPECT_THAT(refusal([] { read_topk_file("/nowhere/ids.npy"); }), HasSubstr("/nowhere/ids.npy"));
}

TEST(TopkFile, RanksTakeConsecutiveRowsAndStartOver) {
  const TopkTable table{3, 1, {10, 11, 12}};
  EXPECT_THAT(take_rows(table, 0, 2), ElementsAre(10, 11));
  EXPECT_THAT(take_rows(table, 1, 2), ElementsAre(12, 10));
}

}  // namespace
}  // namespace deep_ep::cli
