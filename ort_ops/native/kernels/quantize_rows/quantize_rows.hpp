// Contract of the kernel: write float rows as int8, each group of columns with a scale of its own.
//
//   m = max |x[t, k]| over the group    scale = m / 127    q[t, k] = round(x[t, k] * (127 / m)), to even, in
//   [-127, 127] sum = sum of q over the group
//
// The three float operations are rounded to float32 one by one. A group counts as zeros (scale 0, all q 0) if
// 127 / m overflows, that is below about 3.7e-37; one with a NaN or an infinity gets scale NaN and all q 0,
// so that it makes every result of its token NaN. q [T, ceil(K / 16) * 16] int8, padded with zeros; scale and
// sum [T, num_groups]. Groups are of 128 columns, or there is one of all columns; the last may be short. Only
// rows [row_begin, row_end) are read and written; thread-safe on disjoint ones. No alignment asked; no byte
// outside the arrays is read.
#pragma once

#include "kernels/ternary_panels.hpp"

namespace trix {

struct QuantizeRowsJob {
    const float* x;
    std::int8_t* q;
    float* scale;
    std::int32_t* sum;
    std::size_t num_columns;    // K
    std::size_t group_columns;  // 128 or, for one group, K rounded up to whole blocks
    std::size_t row_begin;
    std::size_t row_end;
};

using QuantizeRowsKernel = void (*)(const QuantizeRowsJob& job);

#define TRIX_KERNEL(isa, function) void function(const QuantizeRowsJob& job);
#include "kernels/quantize_rows/quantize_rows.inc"
#undef TRIX_KERNEL

}  // namespace trix
