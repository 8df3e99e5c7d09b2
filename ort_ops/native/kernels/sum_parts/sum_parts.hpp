// Contract of the kernel: the weighted sum of what a token's tiles computed.
//
//   y[t, d] = sum over k, in order and from +0, of weight[t, k] * part[p, d] with p = part_idx[t, k]
//
// in float32, each product rounded before it is added. A place k with part_idx[t, k] < 0 has no part and is
// left out, so that a sum without parts is +0.
//
// part [parts, D], part_idx and weight [T, top_k], y [T, D]. Only rows [token_begin, token_end) of y are
// written; thread-safe on disjoint ones. No alignment asked; nothing outside the arrays is read.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernel_list.hpp"

namespace trix {

struct SumPartsJob {
    const float* part;
    const std::int64_t* part_idx;
    const float* weight;
    float* y;
    std::size_t width;  // D
    std::size_t top_k;
    std::size_t token_begin;
    std::size_t token_end;
};

}  // namespace trix
