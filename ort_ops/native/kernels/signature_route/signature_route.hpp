// Contract of the kernel: choose the top_k tiles of each token, exactly.
//
//   key[t, e] = score[t, e] + bias[e]   (one float32 addition)
//   tile_idx[t, :] = the top_k tiles by key, best first; equal keys in order of tile index
//
// A NaN key ranks below every number (minus infinity too), and NaN keys rank among themselves by tile index:
// a tile with a NaN key is chosen only when no tile with a number is left. If all keys are NaN the choice is
// tiles 0, 1, ...
//
// The scores themselves are a ternary product: score = ternary_tile_matmul(x, signatures) with
// row_scale[e] = 1 / sqrt(max(nnz(s_e), 1)). That kernel computes them, in its fixed order of summation.
//
// Layout: score [T, E] and bias [E] float32, tile_idx [T, top_k] int64, row-major; 1 <= top_k <= E. Only
// tokens [token_begin, token_end) are read and written; thread-safe on disjoint ones. No alignment asked; no
// byte outside the arrays is read.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernel_list.hpp"

namespace trix {

struct SignatureRouteJob {
    const float* score;
    const float* bias;
    std::int64_t* tile_idx;
    std::size_t num_tiles;  // E
    std::size_t top_k;
    std::size_t token_begin;
    std::size_t token_end;
};

/// True if a tile with key `a` ranks before a tile of lower index with key `b`.
static inline bool ranks_before_earlier(float a, float b) {
    return a > b || (b != b && a == a);
}

/// The best tiles seen so far for one token, best first, kept in the token's own row of tile_idx.
struct ChosenTiles {
    const float* score;
    const float* bias;
    std::int64_t* tile_idx;
    std::size_t top_k;
    std::size_t count;
};

static inline float key_of(const ChosenTiles& chosen, std::size_t tile) {
    return chosen.score[tile] + chosen.bias[tile];
}

/// Take `tile` into the list if it ranks before the worst of them. Tiles must be offered in order of index.
static inline void offer_tile(ChosenTiles& chosen, std::size_t tile) {
    const float key = key_of(chosen, tile);
    std::size_t place = chosen.count;
    while (place > 0 &&
           ranks_before_earlier(key, key_of(chosen, static_cast<std::size_t>(chosen.tile_idx[place - 1])))) {
        --place;
    }
    if (place == chosen.top_k) return;
    if (chosen.count < chosen.top_k) ++chosen.count;
    for (std::size_t i = chosen.count - 1; i > place; --i) chosen.tile_idx[i] = chosen.tile_idx[i - 1];
    chosen.tile_idx[place] = static_cast<std::int64_t>(tile);
}

}  // namespace trix
