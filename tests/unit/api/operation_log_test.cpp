#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include <nlohmann/json.hpp>

#include "deep_ep/deep_ep.hpp"

// The ring of the last operations, by call and as the dump of a fault.

namespace deep_ep {
namespace {

using nlohmann::json;

struct Rows {
  std::vector<float> x = std::vector<float>(3 * 8, 1.0F);
  std::vector<std::int64_t> ids{0, 1, 1, -1, 1, 0};

  DispatchArgs args() const {
    DispatchArgs args;
    args.x = {x.data(), DType::kFloat32, {3, 8}};
    args.topk_idx = {ids.data(), DType::kInt64, {3, 2}};
    args.num_experts = 2;
    return args;
  }
};

TEST(OperationLog, TellsWhatRanWithItsShapeAndTimes) {
  Buffer buffer(bootstrap_threads(1)[0]);
  EXPECT_EQ(json::parse(buffer.operations_json()), json::array());
  const Rows rows;
  const DispatchResult got = buffer.dispatch(rows.args());
  CombineArgs back;
  back.x = got.recv_x;
  back.handle = got.handle;
  back.options.async_finish = true;
  buffer.combine(back).event.host_wait();
  const json list = json::parse(buffer.operations_json());
  ASSERT_EQ(list.size(), 2U);
  EXPECT_EQ(list[0]["operation"], "intranode_dispatch");
  EXPECT_EQ(list[1]["operation"], "intranode_combine");
  for (const json& one : list) {
    EXPECT_EQ(one["state"], "done");
    EXPECT_EQ(one["num_tokens"], 3);
    EXPECT_EQ(one["hidden"], 8);
    EXPECT_EQ(one["x_dtype"], "float32");
    EXPECT_GT(one["begin_ns"], 0);
    EXPECT_GE(one["end_ns"], one["begin_ns"]);
  }
  EXPECT_EQ(list[0]["num_topk"], 2);
  EXPECT_EQ(list[0]["num_experts"], 2);
  EXPECT_EQ(list[1]["epoch"], list[0]["epoch"].get<int>() + 1);
}

TEST(OperationLog, KeepsTheLast256OldestFirst) {
  Buffer buffer(bootstrap_threads(1)[0]);
  for (int i = 0; i < 300; ++i) buffer.barrier();
  const json list = json::parse(buffer.operations_json());
  ASSERT_EQ(list.size(), 256U);
  for (std::size_t i = 0; i < list.size(); ++i) {
    EXPECT_EQ(list[i]["epoch"], i + 300 - 256 + 1);
    EXPECT_EQ(list[i]["operation"], "barrier");
  }
}

TEST(OperationLog, AFaultLeavesADumpWhereTheEnvironmentSays) {
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() / ("deep_ep_dump_" + std::to_string(getpid()));
  std::filesystem::create_directory(folder);
  ASSERT_EQ(setenv("DEEP_EP_DUMP_DIR", folder.c_str(), 1), 0);
  {
    Buffer buffer(bootstrap_threads(1)[0]);
    buffer.barrier();
    EXPECT_TRUE(std::filesystem::is_empty(folder)) << "a dump without a fault";
    Rows rows;
    rows.ids[2] = 7;
    EXPECT_THROW(buffer.dispatch(rows.args()), Error);
    EXPECT_THROW(buffer.barrier(), Error);
  }
  unsetenv("DEEP_EP_DUMP_DIR");
  const auto file = folder / ("deep_ep_rank0_" + std::to_string(getpid()) + ".json");
  std::ifstream in(file);
  ASSERT_TRUE(in) << file << " is missing";
  const json list = json::parse(in);
  ASSERT_EQ(list.size(), 2U);
  EXPECT_EQ(list[0]["state"], "done");
  EXPECT_EQ(list[1]["operation"], "intranode_dispatch");
  EXPECT_EQ(list[1]["state"], "failed");
  in.close();
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace deep_ep
