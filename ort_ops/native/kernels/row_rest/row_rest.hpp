// Contract of the kernel: what 24 bits leave of a row, to be quantised in its turn.
//
//   rest[k] -= v[k] * scale with v and the scale of three planes, as quantize_rows.hpp writes them
//
// in float64; then 0 where |rest[k]| is at most |x[k]| 2^-24, which float32 would round away, is below
// 2^-100, or is not a number. *has_rest: whether anything is left. rest starts as x; after a row of a finite
// x, |rest| <= m 2^-22.
//
// x and rest [K], q [3, ceil(K / 16) * 16], scale [num_groups, 3]. No alignment asked; nothing outside the
// arrays is read.
#pragma once

#include "kernels/kernel_list.hpp"
#include "kernels/ternary_panels.hpp"

namespace trix {

struct RowRestJob {
    const float* x;
    const std::int8_t* q;
    const float* scale;
    float* rest;
    bool* has_rest;
    std::size_t num_columns;  // K
    std::size_t group_columns;
};

}  // namespace trix
