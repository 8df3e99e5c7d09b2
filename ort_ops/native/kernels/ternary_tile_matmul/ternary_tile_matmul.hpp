// Contract of the kernel: the product of some tokens with some rows of ONE packed ternary matrix (a tile).
//
//   y[t, n] = row_scale[n] * dot(x[t, :], code[n, :])       for the named tokens t and rows n
//
// Layout: x [T, K] and y [T, N] float32, row-major, no alignment asked. packed [N, P] with P = ceil(K / 4):
// the code of column 4p + i lies at bits 2i of byte p; 00 = 0, 01 = +1, 10 = -1. Callers have checked that 11
// does not occur and that the padding bits past column K are 0. Any K >= 0 and any number of rows and tokens.
// No byte outside the named arrays is read. Writes only y[t, n] of the named tokens and rows; thread-safe on
// disjoint ones.
//
// Order of summation, the same in every variant and for every blocking, so that all variants agree bit for
// bit:
//   lane[j] = sum over k = j, j + 16, j + 32, ... of x[k] * code[k], added in that order, starting from +0
//   (16 lanes) dot     = tree of halves: lane[j] += lane[j + 8]; then + 4; then + 2; then + 1
// x[k] * code[k] is exact, so a fused multiply-add gives the same bits as a multiply and an add. Lanes past
// the end of a row add +0, which changes nothing (a sum that starts at +0 is never -0). NaN and infinity
// follow IEEE multiplication: 0 * inf is NaN, so an infinite x[k] makes every row of the token NaN or
// infinite. The payload and sign of a NaN are not specified.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trix {

struct TernaryTileMatMulJob {
    const float* x;
    const std::uint8_t* packed;
    const float* row_scale;
    const std::int64_t* token_idx;  // num_tokens indices of rows of x and y
    float* y;
    std::size_t num_tokens;
    std::size_t num_columns;  // K
    std::size_t num_rows;     // N, the row stride of y
    std::size_t row_begin;    // rows [row_begin, row_end) of the N are computed
    std::size_t row_end;
};

using TernaryTileMatMulKernel = void (*)(const TernaryTileMatMulJob& job);

#define TRIX_KERNEL(isa, function) void function(const TernaryTileMatMulJob& job);
#include "kernels/ternary_tile_matmul/ternary_tile_matmul.inc"
#undef TRIX_KERNEL

}  // namespace trix
