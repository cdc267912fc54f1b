#include "base/env.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <set>
#include <string>

#include "deep_ep/error.hpp"

namespace deep_ep {
namespace {

using ::testing::HasSubstr;

/// Every variable of the list is unset while a test runs and as before afterwards.
class Env : public ::testing::Test {
 protected:
  void SetUp() override {
    for (const auto& variable : env::variables()) {
      if (const char* value = getenv(variable.name)) saved_.emplace_back(variable.name, value);
      unsetenv(variable.name);
    }
  }
  void TearDown() override {
    for (const auto& variable : env::variables()) unsetenv(variable.name);
    for (const auto& [name, value] : saved_) setenv(name.c_str(), value.c_str(), 1);
  }
  static void set(const char* name, const char* value) { setenv(name, value, 1); }

  template <class Read>
  static std::string refusal(Read&& read) {
    try {
      read();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      return error.what();
    }
    return "nothing was refused";
  }

 private:
  std::vector<std::pair<std::string, std::string>> saved_;
};

TEST_F(Env, DefaultsAreThoseOfTheList) {
  EXPECT_EQ(env::timeout_ms(), 100000);
  EXPECT_EQ(env::num_threads(), 0);
  EXPECT_EQ(env::ranks_per_node(), 0);
  EXPECT_EQ(env::inbox_bytes(), 4 << 20);
  EXPECT_EQ(env::combine_path(), env::CombinePath::kAuto);
  EXPECT_EQ(env::log_level(), "warn");
  EXPECT_EQ(env::log_file(), "");
  EXPECT_EQ(env::dump_directory(), "");
  EXPECT_EQ(env::rendezvous_secret(), "");
  EXPECT_FALSE(env::launch());
}

TEST_F(Env, ListHasEachNameOnceWithAMeaning) {
  std::set<std::string> names;
  for (const auto& variable : env::variables()) {
    EXPECT_TRUE(names.insert(variable.name).second) << variable.name;
    EXPECT_GT(std::string(variable.meaning).size(), 10u) << variable.name;
  }
}

TEST_F(Env, RefusalNamesVariableValueAndRange) {
  for (const char* bad : {"abc", "12x", "-1", "0", "99999999999999999999", " 5", "1e3"}) {
    set("DEEP_EP_TIMEOUT_MS", bad);
    const std::string text = refusal([] { env::timeout_ms(); });
    EXPECT_THAT(text, HasSubstr("DEEP_EP_TIMEOUT_MS"));
    EXPECT_THAT(text, HasSubstr(std::string("'") + bad + "'"));
    EXPECT_THAT(text, HasSubstr("from 1 to"));
  }
  set("DEEP_EP_LOG_LEVEL", "loud");
  EXPECT_THAT(refusal([] { env::log_level(); }), HasSubstr("'loud'"));
}

TEST_F(Env, CombinePathIsOneOfItsWords) {
  set("DEEP_EP_COMBINE", "pull");
  EXPECT_EQ(env::combine_path(), env::CombinePath::kPull);
  set("DEEP_EP_COMBINE", "ring");
  EXPECT_EQ(env::combine_path(), env::CombinePath::kRing);
  set("DEEP_EP_COMBINE", "push");
  EXPECT_THAT(refusal([] { env::combine_path(); }), HasSubstr("DEEP_EP_COMBINE: 'push'"));
}

TEST_F(Env, EmptyCountsAsNotSet) {
  set("DEEP_EP_TIMEOUT_MS", "");
  EXPECT_EQ(env::timeout_ms(), 100000);
  set("RANK", "");
  EXPECT_FALSE(env::launch());
}

TEST_F(Env, ValuesAreReadAtEachCall) {
  set("DEEP_EP_TIMEOUT_MS", "250");
  EXPECT_EQ(env::timeout_ms(), 250);
  set("DEEP_EP_TIMEOUT_MS", "500");
  EXPECT_EQ(env::timeout_ms(), 500);
}

TEST_F(Env, TorchrunVariablesComeFirst) {
  set("SLURM_PROCID", "5");
  set("SLURM_NTASKS", "8");
  set("OMPI_COMM_WORLD_RANK", "2");
  set("OMPI_COMM_WORLD_SIZE", "3");
  set("RANK", "1");
  set("WORLD_SIZE", "2");
  set("MASTER_ADDR", "node7");
  set("MASTER_PORT", "1234");
  const auto launch = env::launch();
  ASSERT_TRUE(launch);
  EXPECT_EQ(launch->rank, 1);
  EXPECT_EQ(launch->size, 2);
  EXPECT_EQ(launch->address, "node7");
  EXPECT_EQ(launch->port, 1234);
}

TEST_F(Env, OpenMpiPmixAndSlurmAreUnderstood) {
  set("SLURM_PROCID", "5");
  set("SLURM_NTASKS", "8");
  EXPECT_EQ(env::launch()->rank, 5);
  EXPECT_EQ(env::launch()->size, 8);
  EXPECT_EQ(env::launch()->port, 29477);
  set("PMIX_RANK", "6");
  EXPECT_EQ(env::launch()->rank, 6);
  EXPECT_EQ(env::launch()->size, 8);
  set("OMPI_COMM_WORLD_RANK", "2");
  set("OMPI_COMM_WORLD_SIZE", "3");
  EXPECT_EQ(env::launch()->rank, 2);
  EXPECT_EQ(env::launch()->size, 3);
}

TEST_F(Env, RanksOnSeveralMachinesNeedAnAddress) {
  set("SLURM_PROCID", "5");
  set("SLURM_NTASKS", "8");
  set("SLURM_STEP_NUM_NODES", "2");
  const char* const words = "so the ranks are on several machines: MASTER_ADDR must be set";
  EXPECT_THAT(refusal([] { env::launch(); }), HasSubstr("SLURM_STEP_NUM_NODES is 2"));
  set("PMIX_RANK", "5");
  EXPECT_THAT(refusal([] { env::launch(); }), HasSubstr(words));
  set("OMPI_COMM_WORLD_RANK", "2");
  set("OMPI_COMM_WORLD_SIZE", "3");
  EXPECT_EQ(env::launch()->rank, 2);  // of an mpirun inside of one of Slurm's machines
  set("OMPI_COMM_WORLD_LOCAL_SIZE", "3");
  EXPECT_EQ(env::launch()->rank, 2);
  set("OMPI_COMM_WORLD_LOCAL_SIZE", "2");
  EXPECT_THAT(refusal([] { env::launch(); }), HasSubstr("OMPI_COMM_WORLD_LOCAL_SIZE is 2"));
  set("MASTER_ADDR", "127.0.0.1");
  EXPECT_EQ(env::launch()->rank, 2);
}

TEST_F(Env, TorchrunsAgentKeepsItsPort) {
  set("RANK", "0");
  set("WORLD_SIZE", "2");
  set("MASTER_PORT", "29500");
  set("TORCHELASTIC_USE_AGENT_STORE", "True");
  EXPECT_EQ(env::launch()->port, 29501);
  set("MASTER_PORT", "32768");
  EXPECT_EQ(env::launch()->port, 12288);
  set("MASTER_PORT", "37955");
  EXPECT_EQ(env::launch()->port, 12288 + 37955 - 32768);
  set("MASTER_PORT", "65535");
  EXPECT_EQ(env::launch()->port, 28671);
  set("DEEP_EP_RENDEZVOUS_PORT", "4000");
  EXPECT_EQ(env::launch()->port, 4000);
}

TEST_F(Env, RankWithoutSizeAndRankOutsideSizeAreRefused) {
  set("RANK", "1");
  EXPECT_THAT(refusal([] { env::launch(); }), HasSubstr("WORLD_SIZE must be set"));
  set("WORLD_SIZE", "1");
  EXPECT_THAT(refusal([] { env::launch(); }), HasSubstr("RANK: '1' is not allowed"));
}

}  // namespace
}  // namespace deep_ep
