// Contract of the kernel: y[t, d] *= weight[t] in float32, in place; a row of weight 0 becomes zeros,
// whatever it held.
//
// y [T, D], weight [T]. Only rows [token_begin, token_end) are read and written; thread-safe on disjoint
// ones. No alignment asked; nothing outside the arrays is read.
#pragma once

#include <cstddef>

#include "kernels/kernel_list.hpp"

namespace trix {

struct ScaleRowsJob {
    const float* weight;
    float* y;
    std::size_t width;  // D
    std::size_t token_begin;
    std::size_t token_end;
};

}  // namespace trix
