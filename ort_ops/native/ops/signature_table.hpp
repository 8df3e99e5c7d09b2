// The routing by signatures, for every op that routes: scores of all tiles, and the choice of the best.
#pragma once

#include <cstdint>

#include "kernels/signature_gate/signature_gate.hpp"
#include "ops/packed_input.hpp"
#include "ops/tile_product.hpp"

namespace trix {

/// Signatures [E, D] as an input in panels, and one over the square roots of their numbers of active
/// dimensions. Norms of a constant input are computed once, when the session is created.
class SignatureTable {
  public:
    SignatureTable(const KernelInfo& info, std::size_t index, const TensorSpec& spec);

    /// `signatures` is the input of this run: it must hold num_tiles rows and num_columns columns.
    void check(const TensorView& signatures, std::int64_t num_tiles, std::int64_t num_columns) const;

    /// The signatures of this run, checked, as a matrix with one row per tile, whose row scales are the
    /// norms. `run_norms` is filled unless they are constant, and must outlive the matrix.
    TileMatrices matrix(const TensorView& signatures, std::int64_t num_tiles, std::int64_t num_columns,
                        std::vector<float>& run_norms) const;

  private:
    PackedInput packed_;
    std::vector<float> constant_norms_;
};

/// score [num_tokens, tiles] of x [num_tokens, columns].
void score_tiles(const KernelContext& context, const TileMatrices& table, const float* x,
                 std::size_t num_tokens, float* score);

/// Tokens that score_block takes at most, and the bytes it needs for them.
inline constexpr std::size_t kScoreBlock = 24;
std::size_t score_block_bytes(std::size_t num_tiles, std::size_t num_columns);

/// score [num_tokens, tiles] of x [num_tokens, columns] on the calling thread, which shares nothing out and
/// allocates nothing: for one token both take longer than the product. `scratch` is aligned to 8 bytes.
void score_block(const TileMatrices& table, const float* x, std::size_t num_tokens, std::uint8_t* scratch,
                 float* score) noexcept;

/// tile_idx [T, top_k] = the best tiles of each token by score [T, num_tiles] + bias [num_tiles], as
/// signature_route.hpp says.
void choose_tiles(const KernelContext& context, std::size_t num_tokens, std::size_t num_tiles,
                  std::size_t top_k, const float* score, const float* bias, std::int64_t* tile_idx);

/// How much the chosen tiles of each token count, as signature_gate.hpp says of the job, in which scale and
/// the tokens are not set.
void weigh_tiles(const KernelContext& context, const SignatureGateJob& of_all, std::size_t num_tokens);

/// choose_tiles and weigh_tiles for each of several groups of tiles, as if it were alone. The job is that of
/// weigh_tiles for the first group of the first token: score holds [T, num_groups, stride], bias and
/// log_mass [num_groups, num_tiles], tile_idx and weight [T, num_groups, top_k]. tile_idx is written where
/// the job reads it.
void route_groups(const KernelContext& context, const SignatureGateJob& of_first, std::int64_t* tile_idx,
                  std::size_t num_groups, std::size_t stride, std::size_t num_tokens);

}  // namespace trix
