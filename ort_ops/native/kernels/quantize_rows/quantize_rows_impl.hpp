// The kernel as loops that a compiler vectorises, for files that differ in their flags alone. Everything is
// static: see the rules in kernels/README.md.
#pragma once

#include "kernels/quantize_rows/quantize_rows.hpp"

namespace trix {

// Adding and taking away 1.5 * 2^23 rounds a small float to a whole number, ties to even.
static inline float round_small(float value) {
    constexpr float kShift = 12582912.0f;
    return (value + kShift) - kShift;
}

static inline void quantize_group(const float* x, std::size_t count, std::int8_t* q, float* scale,
                                  std::int32_t* sum) {
    // Bits of |x| compare like the numbers, infinity and NaN above all others.
    std::uint32_t largest = 0;
    for (std::size_t k = 0; k < count; ++k) {
        std::uint32_t bits;
        __builtin_memcpy(&bits, x + k, sizeof(bits));
        bits &= 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    }
    float m;
    __builtin_memcpy(&m, &largest, sizeof(m));
    const float inverse = 127.0f / m;
    const bool is_finite = largest < 0x7f800000u;
    std::int32_t total = 0;
    if (is_finite && inverse <= 3.40282347e+38f) {
        for (std::size_t k = 0; k < count; ++k) {
            const auto value =
                static_cast<std::int32_t>(round_small(x[k] * inverse));  // |x * inverse| <= 127.00002
            q[k] = static_cast<std::int8_t>(value);
            total += value;
        }
        *scale = m / 127.0f;
    } else {
        for (std::size_t k = 0; k < count; ++k) q[k] = 0;
        *scale = is_finite ? 0.0f : __builtin_nanf("");
    }
    *sum = total;
}

static inline void quantize_rows(const QuantizeRowsJob& job) {
    const std::size_t stride = ceil_div(job.num_columns, kBlockColumns) * kBlockColumns;
    const std::size_t num_groups = ceil_div(stride, job.group_columns);
    for (std::size_t row = job.row_begin; row < job.row_end; ++row) {
        const float* x = job.x + row * job.num_columns;
        std::int8_t* q = job.q + row * stride;
        for (std::size_t k = job.num_columns; k < stride; ++k) q[k] = 0;
        for (std::size_t g = 0; g < num_groups; ++g) {
            const std::size_t begin = g * job.group_columns, left = job.num_columns - begin;
            quantize_group(x + begin, left < job.group_columns ? left : job.group_columns, q + begin,
                           job.scale + row * num_groups + g, job.sum + row * num_groups + g);
        }
    }
}

}  // namespace trix
