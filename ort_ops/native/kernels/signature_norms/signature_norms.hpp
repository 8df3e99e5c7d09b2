// Contract of the kernel: one over the length of each row of a ternary matrix.
//
//   inverse_norm[n] = 1 / sqrt(max(nnz of row n, 1)), float32 operations in that order
//
// panels: see ternary_panels.hpp, valid codes, N rows and K columns; inverse_norm [N]. No alignment asked;
// nothing outside the arrays is read.
#pragma once

#include "kernels/kernel_list.hpp"
#include "kernels/ternary_panels.hpp"

namespace trix {

struct SignatureNormsJob {
    const std::uint8_t* panels;
    float* inverse_norm;
    std::size_t num_rows;     // N
    std::size_t num_columns;  // K
};

}  // namespace trix
