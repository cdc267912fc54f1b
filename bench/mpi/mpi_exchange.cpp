#include "mpi/mpi_exchange.hpp"

#include <sys/mman.h>

#include <cstring>
#include <numeric>

#include "backend/host/rows.hpp"
#include "base/error.hpp"

namespace deep_ep::bench {
namespace {

constexpr auto kStreaming = host::Stores::kStreaming;

std::vector<int> offsets_of(const std::vector<int>& counts) {
  std::vector<int> offsets(counts.size(), 0);
  std::partial_sum(counts.begin(), counts.end() - 1, offsets.begin() + 1);
  return offsets;
}

void require_mpi(int result, const char* call) {
  require(result == MPI_SUCCESS, "{} failed with {}", call, result);
}

}  // namespace

HugeBuffer::HugeBuffer(std::int64_t bytes) : bytes_(static_cast<std::size_t>(bytes)) {
  constexpr std::size_t kHugePage = 2 << 20;
  bytes_ = (bytes_ / kHugePage + 1) * kHugePage;
  void* memory = std::aligned_alloc(kHugePage, bytes_);
  if (memory == nullptr) throw std::bad_alloc();
  madvise(memory, bytes_, MADV_HUGEPAGE);
  data_ = static_cast<std::byte*>(memory);
  std::memset(data_, 0x5a, bytes_);
}

HugeBuffer::~HugeBuffer() { std::free(data_); }

MpiExchange::MpiExchange(const verify::Expected& expected, std::int64_t row_bytes)
    : expected_(expected),
      row_bytes_(row_bytes),
      tokens_(static_cast<std::int64_t>(expected.is_token_in_rank.size() /
                                        expected.num_tokens_per_rank.size())),
      sent_rows_(std::accumulate(expected.num_tokens_per_rank.begin(),
                                 expected.num_tokens_per_rank.end(), std::int64_t{0})),
      packed_(sent_rows_ * row_bytes),
      received_(expected.received.num_rows * row_bytes),
      returned_(sent_rows_ * row_bytes),
      combined_(tokens_ * row_bytes) {
  const auto ranks = expected.num_tokens_per_rank.size();
  std::vector<int> sent(expected.num_tokens_per_rank.begin(), expected.num_tokens_per_rank.end());
  std::vector<int> got(ranks, 0);
  for (const verify::RowSource& row : expected.sources) ++got[static_cast<std::size_t>(row.rank)];
  for (const OwnRows own : {OwnRows::kThroughMpi, OwnRows::kDirect}) {
    Traffic out{sent, offsets_of(sent), got, offsets_of(got)};
    if (own == OwnRows::kDirect) {
      out.send_counts[static_cast<std::size_t>(expected.rank)] = 0;
      out.recv_counts[static_cast<std::size_t>(expected.rank)] = 0;
    }
    const Traffic back{out.recv_counts, out.recv_offsets, out.send_counts, out.send_offsets};
    out_[static_cast<int>(own)] = out;
    back_[static_cast<int>(own)] = back;
  }
  MPI_Type_contiguous(static_cast<int>(row_bytes), MPI_BYTE, &row_type_);
  MPI_Type_commit(&row_type_);
}

MpiExchange::~MpiExchange() { MPI_Type_free(&row_type_); }

void MpiExchange::exchange(const std::byte* from, std::byte* to, const Traffic& traffic) const {
  require_mpi(MPI_Alltoallv(from, traffic.send_counts.data(), traffic.send_offsets.data(),
                            row_type_, to, traffic.recv_counts.data(), traffic.recv_offsets.data(),
                            row_type_, MPI_COMM_WORLD),
              "MPI_Alltoallv");
}

void MpiExchange::pack(const std::byte* x, OwnRows own) {
  const Traffic& traffic = out_[static_cast<int>(own)];
  const std::size_t ranks = expected_.num_tokens_per_rank.size();
  const auto me = static_cast<std::size_t>(expected_.rank);
  for (std::int64_t token = 0; token < tokens_; ++token)
    for (std::size_t rank = 0; rank < ranks; ++rank) {
      const std::int32_t slot = expected_.send_head[static_cast<std::size_t>(token) * ranks + rank];
      if (slot < 0) continue;
      const bool direct = own == OwnRows::kDirect && rank == me;
      std::byte* block = direct ? received_.data() + traffic.recv_offsets[me] * row_bytes_
                                : packed_.data() + traffic.send_offsets[rank] * row_bytes_;
      host::copy_row(block + slot * row_bytes_, x + token * row_bytes_, row_bytes_, kStreaming);
    }
  host::finish_stores();
}

void MpiExchange::dispatch(const std::byte* x, OwnRows own) {
  pack(x, own);
  exchange(packed_.data(), received_.data(), out_[static_cast<int>(own)]);
}

void MpiExchange::reduce(const std::byte* y, OwnRows own) {
  const Traffic& traffic = back_[static_cast<int>(own)];
  const std::size_t ranks = expected_.num_tokens_per_rank.size();
  const auto me = static_cast<std::size_t>(expected_.rank);
  std::vector<const std::byte*> sources(ranks);
  for (std::int64_t token = 0; token < tokens_; ++token) {
    host::SumPiece piece;
    piece.dtype = DType::kBfloat16;
    piece.count = row_bytes_ / 2;
    piece.sources = sources.data();
    for (std::size_t rank = 0; rank < ranks; ++rank) {
      const std::int32_t slot = expected_.send_head[static_cast<std::size_t>(token) * ranks + rank];
      if (slot < 0) continue;
      const bool direct = own == OwnRows::kDirect && rank == me;
      const std::byte* block = direct ? y + traffic.send_offsets[me] * row_bytes_
                                      : returned_.data() + traffic.recv_offsets[rank] * row_bytes_;
      sources[static_cast<std::size_t>(piece.num_sources++)] = block + slot * row_bytes_;
    }
    piece.out = combined_.data() + token * row_bytes_;
    host::sum_piece(piece, kStreaming);
  }
  host::finish_stores();
}

void MpiExchange::combine(const std::byte* y, OwnRows own) {
  exchange(y, returned_.data(), back_[static_cast<int>(own)]);
  reduce(y, own);
}

}  // namespace deep_ep::bench
