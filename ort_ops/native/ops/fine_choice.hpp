// The exact choice among many tiles from scores in 8 bits: the few tiles that may be chosen are scored again.
#pragma once

#include <cstdint>

#include "ops/tile_product.hpp"

namespace trix {

/// From so many tiles on it takes less time than to score all of them exactly.
inline constexpr std::size_t kManyTiles = 256;

/// tile_idx [T, top_k] and score [T, top_k]: what choose_tiles finds from the exact scores of all tiles, bit
/// for bit, and those of the chosen ones.
///
/// A signature times its norm has length at most 1, so by Cauchy and Schwarz a score of x differs from that
/// of the quantised x' by at most r = |x - x'|. A tile whose key (score + bias) is more than 2 r below the
/// top_k-th best is not among the top_k. Only the others are scored with 24 bits, and those of wide tokens
/// with their rest, which brings them nearer to the score of x: the bound holds all the more.
///
/// table: [E, D] with its norms as row scales; x [T, D]; bias [E]; 1 <= top_k <= E.
void choose_fine(const KernelContext& context, const TileMatrices& table, const float* x,
                 std::size_t num_tokens, const float* bias, std::size_t top_k, std::int64_t* tile_idx,
                 float* score);

}  // namespace trix
