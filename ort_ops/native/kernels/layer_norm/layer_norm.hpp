// Contract of the kernel: rows of floats brought to mean 0 and variance 1, then scaled and shifted.
//
//   mean[t] = sum_d x[t, d] / D    variance[t] = sum_d (x[t, d] - mean[t])^2 / D
//   y[t, d] = (x[t, d] - mean[t]) * (1 / sqrt(variance[t] + epsilon)) * weight[d] + bias[d]
//
// in float32, the operations in that order. Sums run in 16 lanes (lane j holds j, j + 16, ..., from 0), which
// are then added up by halves (j and j + 8, then j and j + 4, ...). A row with a NaN or an infinity becomes
// NaN.
//
// x and y [T, D], weight and bias [D]. Only rows [token_begin, token_end) are read and written; thread-safe
// on disjoint ones. No alignment asked; nothing outside the arrays is read.
#pragma once

#include <cstddef>

#include "kernels/kernel_list.hpp"

namespace trix {

struct LayerNormJob {
    const float* x;
    const float* weight;
    const float* bias;
    float* y;
    float epsilon;
    std::size_t width;  // D
    std::size_t token_begin;
    std::size_t token_end;
};

}  // namespace trix
