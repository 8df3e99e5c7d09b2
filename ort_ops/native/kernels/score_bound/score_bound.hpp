// Contract of the kernel: how far a score of 8 bits may be from the exact one, for each token.
//
//   bound[t] = |x_t - x'_t| + |x'_t|_most (2^-16 + num_groups 2^-21)
//   |x_t - x'_t|^2 = sum_g squared_rest[t, g] scale[t, g]^2
//   |x'_t|_most^2 = sum_g group_columns 127^2 scale[t, g]^2
//
// in float64, where x' is x as quantize_rows.hpp quantises it with one plane. A signature times its norm has
// length at most 1, so by Cauchy and Schwarz the first summand bounds the error of the quantiser; the second
// bounds what float32 may round away on the way to a score, and 24 bits with it. bound is infinite where x is
// so large that a sum may leave float32, NaN unless x is finite.
//
// scale and squared_rest [T, num_groups], bound [T]. Only tokens [token_begin, token_end) are read and
// written; thread-safe on disjoint ones. No alignment asked; nothing outside the arrays is read.
#pragma once

#include <cstddef>

#include "kernels/kernel_list.hpp"

namespace trix {

/// Sums and keys up to this size are far from where float32 ends.
inline constexpr double kLargestScore = 0x1p120;

struct ScoreBoundJob {
    const float* scale;
    const float* squared_rest;
    double* bound;
    std::size_t num_groups;
    std::size_t group_columns;
    std::size_t token_begin;
    std::size_t token_end;
};

}  // namespace trix
