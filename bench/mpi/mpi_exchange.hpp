#pragma once

#include <mpi.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "verify/expected.hpp"

namespace deep_ep::bench {

/// Page-aligned memory in huge pages where the kernel gives them, touched before use.
class HugeBuffer {
 public:
  explicit HugeBuffer(std::int64_t bytes);
  ~HugeBuffer();
  HugeBuffer(const HugeBuffer&) = delete;
  HugeBuffer& operator=(const HugeBuffer&) = delete;

  std::byte* data() const { return data_; }

 private:
  std::byte* data_;
  std::size_t bytes_;
};

/// The same exchange over MPI_Alltoallv. All memory is allocated once. A row is one MPI datatype,
/// so counts stay far below 2^31.
class MpiExchange {
 public:
  /// How the rows that a rank sends to itself go.
  enum class OwnRows {
    kThroughMpi,  ///< like all others, as a plain MPI_Alltoallv does
    kDirect,      ///< past MPI: copied to, or summed at, their place
  };

  MpiExchange(const verify::Expected& expected, std::int64_t row_bytes);
  ~MpiExchange();
  MpiExchange(const MpiExchange&) = delete;
  MpiExchange& operator=(const MpiExchange&) = delete;

  /// Packs with streaming stores and exchanges. received() is in (source rank, token) order then.
  void dispatch(const std::byte* x, OwnRows own);
  /// `y` is in the order of received(), so it needs no packing. Sums in fp32 in rank order, as
  /// plan/numerics.hpp says, with the library's own kernel.
  void combine(const std::byte* y, OwnRows own);

  const std::byte* received() const { return received_.data(); }
  const std::byte* combined() const { return combined_.data(); }

 private:
  struct Traffic {
    std::vector<int> send_counts, send_offsets, recv_counts, recv_offsets;
  };
  void exchange(const std::byte* from, std::byte* to, const Traffic& traffic) const;
  void pack(const std::byte* x, OwnRows own);
  void reduce(const std::byte* y, OwnRows own);

  const verify::Expected& expected_;
  std::int64_t row_bytes_;
  std::int64_t tokens_;
  Traffic out_[2];   // of dispatch, by OwnRows
  Traffic back_[2];  // of combine
  std::int64_t sent_rows_;
  HugeBuffer packed_, received_, returned_, combined_;
  MPI_Datatype row_type_{};
};

}  // namespace deep_ep::bench
