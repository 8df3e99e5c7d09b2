// Contract of the kernel: the product of some quantised tokens with some panels of ONE packed ternary matrix
// (a tile).
//
//   y[t, n] = row_scale[n] * sum_g sum_p float(dot[t, g, p]) * scale[t, g, p]
//   dot[t, g, p] = sum over the columns k of group g of q[t, p, k] w[n, k]
//
// for the named tokens t and the rows n of the named panels. dot is exact (int32); the float operations are
// rounded one by one and the sum runs over groups, and over planes within a group, from left to right,
// starting from +0: all variants and blockings agree bit for bit. The panels hold w + 1, so a kernel computes
// sum q (w + 1) and takes away sum[t, g, p], the sum of q.
//
// Layout: q, scale and sum as quantize_rows.hpp writes them, the same groups and planes (1 or 3); panels: see
// ternary_panels.hpp; row_scale [N] and y [T, N] float32. K <= kMaxColumns, so that no int32 overflows. No
// alignment asked; no byte outside the arrays is read. Writes only y[t, n] of the named tokens and rows;
// thread-safe on disjoint ones.
#pragma once

#include "kernels/kernel_list.hpp"
#include "kernels/ternary_panels.hpp"

namespace trix {

// A variant may sum 64 q (w + 1), 4 columns of a block at a time: 64 * 128 * 2 * 4 * K / 16 <= 2^31 - 1.
inline constexpr std::size_t kMaxColumns = (std::size_t{1} << 19) - kBlockColumns;

struct TernaryMatMulJob {
    const std::int8_t* q;
    const float* scale;
    const std::int32_t* sum;
    const std::uint8_t* panels;
    const float* row_scale;
    const std::int64_t* token_idx;  // num_tokens indices of tokens of q, scale and sum
    const std::int64_t* y_idx;      // num_tokens indices of rows of y
    float* y;
    std::size_t num_tokens;
    std::size_t num_columns;    // K
    std::size_t group_columns;  // a multiple of 16
    std::size_t num_planes;     // 1 or 3
    std::size_t num_rows;       // N, the row stride of y
    std::size_t panel_begin;    // panels [panel_begin, panel_end) of the ceil(N / 32) are computed
    std::size_t panel_end;
};

}  // namespace trix
