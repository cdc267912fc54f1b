#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <system_error>

#include "base/error.hpp"
#include "fabric/available_memory.hpp"
#include "fabric/huge_pages.hpp"
#include "fabric/memory.hpp"
#include "fabric/socket.hpp"

namespace deep_ep::fabric {
namespace {

constexpr std::int64_t kMiB = 1 << 20;

/// Memory is taken in steps of this size and the rest that is available looked at before each,
/// since several ranks may be allocating at once.
constexpr std::int64_t kStep = 64 * kMiB;

/// What a Descriptor's bytes hold.
struct Name {
  char id[16];  // random, so unique among all processes
  std::int64_t bytes;
};

/// The mappings of this process, so that ranks which are its threads share them.
struct Registry {
  std::mutex mutex;
  std::map<std::string, std::weak_ptr<Mapping>> mappings;

  static Registry& instance() {
    // Never destroyed: results that outlive main() still unmap.
    static auto* registry = new Registry;
    return *registry;
  }
};

class MemfdMapping final : public Mapping {
 public:
  MemfdMapping(std::string id, int fd, std::int64_t bytes) : id_(std::move(id)), bytes_(bytes) {
    base_ = map_aligned(bytes, MAP_SHARED, fd);
    if (base_ == nullptr) throw_errno(fmt::format("mmap of {} bytes of shared memory", bytes));
    use_huge_pages(base_, bytes);
  }
  ~MemfdMapping() override {
    munmap(base_, static_cast<std::size_t>(bytes_));
    Registry& registry = Registry::instance();
    const std::lock_guard lock(registry.mutex);
    const auto entry = registry.mappings.find(id_);
    if (entry != registry.mappings.end() && entry->second.expired()) registry.mappings.erase(entry);
  }

  std::byte* base() const override { return base_; }
  std::int64_t bytes() const override { return bytes_; }
  const std::string& id() const { return id_; }

  /// Only the rank that allocated the memory keeps its file: it has to hand it on.
  void own(Fd fd) { fd_ = std::move(fd); }
  int fd() const { return fd_.get(); }

 private:
  std::string id_;
  Fd fd_;
  std::int64_t bytes_;
  std::byte* base_ = nullptr;
};

void take_memory(int fd, std::int64_t bytes) {
  for (std::int64_t offset = 0; offset < bytes; offset += kStep) {
    require_available(bytes, bytes - offset);
    int status = 0;
    do {
      status = fallocate(fd, 0, offset, std::min(kStep, bytes - offset));
    } while (status != 0 && errno == EINTR);
    if (status != 0)
      throw_shortage(bytes, fmt::format("fallocate at {}: {}", offset,
                                        std::error_code(errno, std::generic_category()).message()));
  }
}

class MemfdMemory final : public Memory {
 public:
  std::shared_ptr<Mapping> allocate(std::int64_t bytes) override {
    require(bytes > 0, "bytes: {} is not allowed, must be positive", bytes);
    const std::int64_t page = sysconf(_SC_PAGESIZE);
    bytes = (bytes + page - 1) / page * page;
    Fd fd(memfd_create("deep_ep", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    if (!fd) throw_errno("memfd_create");
    take_memory(fd.get(), bytes);
    // A peer that shrank it would turn our next access into SIGBUS.
    if (fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
      throw_errno("fcntl(F_ADD_SEALS)");
    auto mapping = std::make_shared<MemfdMapping>(random_bytes(sizeof(Name::id)), fd.get(), bytes);
    mapping->own(std::move(fd));
    return keep(mapping);
  }

  Descriptor describe(const Mapping& own) override {
    const auto* mapping = dynamic_cast<const MemfdMapping*>(&own);
    require(mapping != nullptr, "own: not memory of this kind");
    Name name{};
    std::memcpy(name.id, mapping->id().data(), sizeof(name.id));
    name.bytes = mapping->bytes();
    Descriptor descriptor;
    descriptor.bytes.assign(reinterpret_cast<const char*>(&name), sizeof(name));
    descriptor.fd = fcntl(mapping->fd(), F_DUPFD_CLOEXEC, 0);
    if (descriptor.fd < 0) throw_errno("fcntl(F_DUPFD_CLOEXEC)");
    return descriptor;
  }

  std::shared_ptr<Mapping> map(const Descriptor& descriptor) override {
    Name name{};
    require(descriptor.bytes.size() == sizeof(name), "descriptor: {} bytes, must be {}",
            descriptor.bytes.size(), sizeof(name));
    std::memcpy(&name, descriptor.bytes.data(), sizeof(name));
    const std::string id(name.id, sizeof(name.id));
    if (std::shared_ptr<Mapping> known = find(id)) return known;
    require(descriptor.fd >= 0, "descriptor: without a file descriptor (the limit of open files?)");
    check_file(descriptor.fd, name.bytes);
    return keep(std::make_shared<MemfdMapping>(id, descriptor.fd, name.bytes));
  }

 private:
  static std::shared_ptr<Mapping> find(const std::string& id) {
    Registry& registry = Registry::instance();
    const std::lock_guard lock(registry.mutex);
    const auto entry = registry.mappings.find(id);
    return entry == registry.mappings.end() ? nullptr : entry->second.lock();
  }

  /// Another thread may have mapped the same memory meanwhile: the first one stays.
  static std::shared_ptr<Mapping> keep(const std::shared_ptr<MemfdMapping>& fresh) {
    Registry& registry = Registry::instance();
    std::shared_ptr<Mapping> first;
    {
      const std::lock_guard lock(registry.mutex);
      std::weak_ptr<Mapping>& entry = registry.mappings[fresh->id()];
      first = entry.lock();
      if (!first) entry = first = fresh;
    }
    return first;
  }

  static void check_file(int fd, std::int64_t bytes) {
    struct stat status {};
    if (fstat(fd, &status) != 0) throw_errno("fstat of a peer's segment");
    const int seals = fcntl(fd, F_GET_SEALS);
    require(bytes > 0 && status.st_size >= bytes, "descriptor: {} bytes, but the file has {}",
            bytes, static_cast<std::int64_t>(status.st_size));
    require(seals >= 0 && (seals & F_SEAL_SHRINK) != 0,
            "descriptor: the file is not sealed against shrinking");
  }
};

}  // namespace

std::unique_ptr<Memory> make_memfd_memory() { return std::make_unique<MemfdMemory>(); }

}  // namespace deep_ep::fabric
