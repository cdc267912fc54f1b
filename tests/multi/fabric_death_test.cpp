#include <gmock/gmock.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include "deep_ep/error.hpp"
#include "fabric_ranks.hpp"

namespace deep_ep::fabric {
namespace {

namespace fs = std::filesystem;

std::string contents(const char* path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

std::vector<std::string> shm_names() {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator("/dev/shm")) {
    // Other programs of the machine may come and go.
    if (const auto name = entry.path().filename().string(); name.find("deep") != name.npos)
      names.push_back(name);
  }
  return names;
}

/// A note that ranks leave for the test, which outlives them.
class Note {
 public:
  Note()
      : text_(static_cast<char*>(
            mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0))) {}
  ~Note() { munmap(text_, kBytes); }
  void write(int rank, const std::string& text) { text.copy(text_ + rank * kEach, kEach - 1); }
  std::string read(int rank) const { return text_ + rank * kEach; }

 private:
  static constexpr std::size_t kBytes = 4096;
  static constexpr std::size_t kEach = 512;
  char* text_;
};

/// The socket's name in what a Fabric exports.
std::string socket_name(const std::string& exported) {
  const auto begin = exported.find("deep_ep.");
  return exported.substr(begin, exported.find(' ', begin) - begin);
}

TEST(FabricDeath, KilledPeerIsReportedAsNotOrderly) {
  const auto exits = exits_of_ranks(4, [](Bootstrap& bootstrap) {
    JoinedRank self(bootstrap);
    fill(self.fabric, 0, 1024);
    bootstrap.barrier();
    if (bootstrap.rank() == 2) raise(SIGKILL);
    EXPECT_EQ(self.reports.gone(2, milliseconds(10000)), false);
    // Its memory is still there, and adding more is no error.
    expect_filled(self.fabric, 2, 0, 1024);
    self.fabric.add_segment(4096);
  });
  for (const auto& exit : exits) EXPECT_EQ(exit.status, exit.rank == 2 ? 128 + SIGKILL : 0);
}

TEST(FabricDeath, KilledPeerIsNoticedThoughAChildOfItHoldsItsSockets) {
  int gate[2];
  ASSERT_EQ(pipe(gate), 0);
  const auto exits = exits_of_ranks(2, [&](Bootstrap& bootstrap) {
    JoinedRank self(bootstrap);
    bootstrap.barrier();
    if (bootstrap.rank() == 1) {
      if (fork() == 0) {
        // Outlives its parent, until the test lets go of the pipe.
        close(gate[1]);
        char byte = 0;
        (void)!read(gate[0], &byte, 1);
        _exit(0);
      }
      raise(SIGKILL);
    }
    EXPECT_EQ(self.reports.gone(1, milliseconds(10000)), false);
    _exit(::testing::Test::HasFailure() ? 1 : 0);
  });
  close(gate[0]);
  close(gate[1]);
  EXPECT_EQ(exits[0].status, 0);
  EXPECT_EQ(exits[1].status, 128 + SIGKILL);
}

/// Where in the life of a Fabric a rank is killed.
enum Step { kAfterSegment, kAfterExport, kAfterGather, kAfterOpen, kAfterGrowth, kNumSteps };
/// Far above what it takes to notice a death, so that a wait that runs out shows.
constexpr milliseconds kPatience{20000};

void live_until(Bootstrap& bootstrap, Step death, Note& note) {
  const bool dies = bootstrap.rank() == 1;
  const auto reached = [&](Step step) {
    if (dies && step == death) raise(SIGKILL);
  };
  Reports reports(bootstrap.size());
  Fabric fabric(bootstrap.rank(), bootstrap.size(), make_memfd_memory());
  fabric.add_segment(1 << 20);
  reached(kAfterSegment);
  const std::string exported = fabric.export_handles();
  note.write(bootstrap.rank(), socket_name(exported));
  reached(kAfterExport);
  const auto all = bootstrap.all_gather(exported);
  reached(kAfterGather);
  fabric.open_handles(all, kPatience, reports.callbacks());
  reached(kAfterOpen);
  fabric.add_segment(1 << 20);
  reached(kAfterGrowth);
  EXPECT_EQ(reports.gone(1, kPatience), false);
}

TEST(FabricDeath, KillAtAnyStepEndsTheOthersAndLeavesNothingBehind) {
  const auto shm_before = shm_names();
  for (int step = 0; step < kNumSteps; ++step) {
    SCOPED_TRACE(step);
    Note note;
    const auto begin = std::chrono::steady_clock::now();
    const auto exits = exits_of_ranks(3, [&](Bootstrap& bootstrap) {
      try {
        live_until(bootstrap, static_cast<Step>(step), note);
      } catch (const Error& error) {
        EXPECT_LE(step, kAfterOpen) << error.what();
        EXPECT_THAT(error.ranks(), ::testing::Contains(1)) << error.what();
      }
    });
    EXPECT_LT(std::chrono::steady_clock::now() - begin, kPatience / 2);
    for (const auto& exit : exits) EXPECT_EQ(exit.status, exit.rank == 1 ? 128 + SIGKILL : 0);
    const std::string sockets = contents("/proc/net/unix");
    for (int rank = 0; rank < 3; ++rank) {
      const std::string name = note.read(rank);
      EXPECT_TRUE(name.empty() || sockets.find(name) == std::string::npos) << name;
    }
  }
  EXPECT_EQ(shm_names(), shm_before);
}

}  // namespace
}  // namespace deep_ep::fabric
