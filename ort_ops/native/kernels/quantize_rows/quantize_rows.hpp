// Contract of the kernel: write float rows as whole numbers of 8 or 24 bits, each group of columns with a
// scale of its own.
//
//   m = max |x[t, k]| over the group, min_magnitude where that is more
//   v[k] = round(x[t, k] * (L / m)), to even    x[t, k] ~ v[k] * (m / L)
//   8 bits, one plane:      L = 127, q[0] = v, x * (L / m) in float32; with a min_magnitude L / m is
//                           L * (1 / m), rounded twice
//   24 bits, three planes:  L = 127 (256^2 + 256 + 1), v = 256^2 q[0] + 256 q[1] + q[2] with q in
//                           [-128, 127], x * (L / m) in float64
//   scale[t, g, p] = m / L times 256^2, 256 and 1 (or 1), in float32
//   sum[t, g, p] = sum of q[t, p, k] over the group
//
// A group whose max |x| is below 2^-100 counts as zeros (scale 0, all q 0); one with a NaN or an infinity
// gets scale NaN and all q 0, so that it makes every result of its token NaN. With 24 bits v * (m / L)
// differs from x by at most m * 2^-23.
//
// is_wide [T], if given and with three planes: 1 where a group of the row is wide, else 0. A group is wide
// if, for any level of the rule, |x| < m level.fraction holds for more than 1 / level.share of its |x| >=
// 2^-100. A group of zeros, or one that is not finite, is not.
//
// squared_rest [T, num_groups], if given and with one plane: the sum of (x[t, k] * (L / m) - v[k])^2 over the
// group, in any order of summation; 0 for a group of zeros, NaN for one that is not finite.
//
// q [T, planes, ceil(K / 16) * 16] int8, padded with zeros; scale and sum [T, num_groups, planes]. Groups are
// of group_columns, a multiple of 16; the last may be short. Only rows [row_begin, row_end) are read and
// written; thread-safe on disjoint ones. No alignment asked; no byte outside the arrays is read.
#pragma once

#include "kernels/kernel_list.hpp"
#include "kernels/ternary_panels.hpp"

namespace trix {

struct WideLevel {
    float fraction;
    std::int64_t share;  // at most kMaxShare
};

/// So large a share that one x below the fraction is enough.
inline constexpr std::int64_t kMaxShare = std::int64_t{1} << 32;

/// Which groups keep too few bits of their small x: see is_wide. Fractions fall; the empty rule calls none
/// wide.
struct WideRule {
    WideLevel levels[3];
};

struct QuantizeRowsJob {
    const float* x;
    std::int8_t* q;
    float* scale;
    std::int32_t* sum;
    float* squared_rest;    // or null
    std::uint8_t* is_wide;  // or null
    WideRule wide_rule;
    float min_magnitude;      // 0 with three planes
    std::size_t num_columns;  // K
    std::size_t group_columns;
    std::size_t num_planes;  // 1 or 3
    std::size_t row_begin;
    std::size_t row_end;
};

}  // namespace trix
