// Contract of the kernel: the tiles of one token whose exact key may be as large as that of a given tile.
//
//   key[e] = score[e] + bias[e] in float32, each within `bound` of the exact one
//   floor = key[last] - 2 (bound + |key[last]| 2^-20), rounded down to float32
//   tile_idx = the tiles with !(key[e] < floor), in order of index; *num_found = how many
//
// A NaN key lets its own tile in. A key[last] that may have left float32, or is NaN, lets every tile in, and
// so does a bound that is infinite or NaN.
//
// score and bias [E]; tile_idx has room for all E. No alignment asked; nothing outside the arrays is read.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernel_list.hpp"

namespace trix {

struct NearTilesJob {
    const float* score;
    const float* bias;
    std::int64_t* tile_idx;
    std::size_t* num_found;
    double bound;
    std::size_t last;       // in [0, E)
    std::size_t num_tiles;  // E
};

}  // namespace trix
