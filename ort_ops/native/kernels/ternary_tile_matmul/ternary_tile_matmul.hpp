// Contract of the kernel: the product of some tokens with some panels of ONE packed ternary matrix (a tile),
// in float32.
//
//   y[t, n] = row_scale[n] * dot(x[t, :], w[n, :])       for the named tokens t and the rows n of the named
//   panels
//
// Layout: x [T, K] and y [T, N] float32, row-major, no alignment asked. panels: see ternary_panels.hpp;
// callers have checked the codes. Any K >= 0 and any number of rows and tokens. No byte outside the named
// arrays is read. Writes only y[t, n] of the named tokens and rows; thread-safe on disjoint ones.
//
// Order of summation, the same in every variant and for every blocking, so that all variants agree bit for
// bit: each group of 128 columns is summed from left to right, starting from +0, and the sums of the groups
// from left to right, starting from +0. Against the exact product the error is at most (128 + K / 128) *
// 2^-24 * sum_k |x[k] w[k]|, to first order. x[k] * w[k] is exact, so a fused multiply-add gives the same
// bits as a multiply and an add. NaN and infinity follow IEEE multiplication: 0 * inf is NaN, so an infinite
// x[k] makes every row of the token NaN or infinite. The payload and sign of a NaN are not specified.
#pragma once

#include "kernels/ternary_panels.hpp"

namespace trix {

struct TernaryTileMatMulJob {
    const float* x;
    const std::uint8_t* panels;
    const float* row_scale;
    const std::int64_t* token_idx;  // num_tokens indices of rows of x and y
    float* y;
    std::size_t num_tokens;
    std::size_t num_columns;  // K
    std::size_t num_rows;     // N, the row stride of y
    std::size_t panel_begin;  // panels [panel_begin, panel_end) of the ceil(N / 32) are computed
    std::size_t panel_end;
};

using TernaryTileMatMulKernel = void (*)(const TernaryTileMatMulJob& job);

#define TRIX_KERNEL(isa, function) void function(const TernaryTileMatMulJob& job);
#include "kernels/ternary_tile_matmul/ternary_tile_matmul.inc"
#undef TRIX_KERNEL

}  // namespace trix
