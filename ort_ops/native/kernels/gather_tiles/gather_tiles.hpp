// Contract of the kernel: some rows of a table of signatures as a table of their own, in the given order.
//
//   row i of to_panels = row tile_idx[i] of panels, and so for row_scale and bias
//
// The rows that fill the last panel hold 0 (code 01).
//
// panels and to_panels: see ternary_panels.hpp, K columns, to_panels for `count` rows; to_row_scale and
// to_bias [count]. No alignment asked; nothing outside the arrays is read.
#pragma once

#include "kernels/kernel_list.hpp"
#include "kernels/ternary_panels.hpp"

namespace trix {

struct GatherTilesJob {
    const std::uint8_t* panels;
    const float* row_scale;
    const float* bias;
    const std::int64_t* tile_idx;  // [count]
    std::uint8_t* to_panels;
    float* to_row_scale;
    float* to_bias;
    std::size_t count;
    std::size_t num_columns;  // K
};

}  // namespace trix
