// Contract of the kernel: how much each chosen tile of a token counts.
//
// A tile is free where bias[e] is minus infinity. With e = tile_idx[t, k], s = score[t, :], and f for the
// tiles that are not free:
//
//   kSigmoid    weight[t, k] = 1 / (1 + exp(-s_e))
//   kSoftmax    weight[t, k] = exp(s_e - m) / sum_f exp(s_f + log_mass_f - m) * scale
//               with m = max_f (s_f + log_mass_f)
//   kAdaptive   weight[t, k] = exp(s_e - m) / sum_j exp(s_j - m) over the first n of the chosen tiles, m the
//               largest score among them, and 0 for the rest; n, in [1, top_k], is the number of tiles f
//               with max_g s_g - s_f <= confidence_threshold
//
// A free tile that is chosen, where too few others are left, has weight 0. A score that is NaN, of a tile
// that is not free, makes all weights of its token NaN, and so do a softmax or an adaptive gate without such
// a tile: 0 / 0. Under kSigmoid only the weight of a tile whose score is NaN is NaN.
//
// float32: sums over tiles in 8 lanes (lane j holds tiles j, j + 8, ...), then in the order of lanes; over
// chosen tiles in their order. exp has a relative error of 3e-7; it is 0 below -87 and infinity above 88.
//
// chosen_score, if given and with kSigmoid, stands for the scores of the chosen tiles; score and log_mass are
// not read then. It may be weight itself.
//
// Layout: score [T, E], chosen_score [T, top_k], bias [E], log_mass [E], tile_idx [T, top_k], weight [T,
// top_k], row-major; every tile_idx lies in [0, E). Only tokens [token_begin, token_end) are read and
// written; thread-safe on disjoint ones. No alignment asked; no byte outside the arrays is read.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernel_list.hpp"

namespace trix {

/// The values are those of SignatureRoute's attribute `gate`.
enum class Gate : std::int64_t { kSigmoid = 0, kSoftmax = 1, kAdaptive = 2 };

struct SignatureGateJob {
    const float* score;
    const float* chosen_score;  // or null
    const float* bias;
    const float* log_mass;
    const std::int64_t* tile_idx;
    float* weight;
    std::size_t num_tiles;  // E
    std::size_t top_k;
    Gate gate;
    float scale;  // of kSoftmax: sqrt(E)
    float confidence_threshold;
    std::size_t token_begin;
    std::size_t token_end;
};

}  // namespace trix
