// What the variants share: groups, scales, and the arithmetic as loops that a compiler vectorises, for files
// that differ in their flags alone. Everything is static: see the rules in kernels/README.md.
#pragma once

#include "kernels/quantize_rows/quantize_rows.hpp"

namespace trix {

static constexpr float kLevels8 = 127.0f;
static constexpr float kLevels24 = 8355711.0f;  // 127 (256^2 + 256 + 1)
static constexpr float kSmallest = 0x1p-100f;

/// The three loops over the columns of a group.
struct PlainLoops {
    // max |x|: the bits of |x| compare like the numbers, infinity and NaN above all others.
    static float largest_magnitude(const float* x, std::size_t count) {
        std::uint32_t largest = 0;
        for (std::size_t k = 0; k < count; ++k) {
            std::uint32_t bits;
            __builtin_memcpy(&bits, x + k, sizeof(bits));
            bits &= 0x7fffffffu;
            largest = bits > largest ? bits : largest;
        }
        float m;
        __builtin_memcpy(&m, &largest, sizeof(m));
        return m;
    }

    // Adding and taking away 1.5 * 2^23 rounds a float of less than 2^22 to a whole number, ties to even.
    static std::int32_t quantize_8(const float* x, std::size_t count, float factor, std::int8_t* q) {
        constexpr float kShift = 12582912.0f;
        std::int32_t sum = 0;
        for (std::size_t k = 0; k < count; ++k) {
            const auto value = static_cast<std::int32_t>((x[k] * factor + kShift) - kShift);
            q[k] = static_cast<std::int8_t>(value);
            sum += value;
        }
        return sum;
    }

    // The same in double; then the digits of base 256, the lowest first, each nearest to 0.
    static void quantize_24(const float* x, std::size_t count, double factor, std::int8_t* q,
                            std::size_t stride, std::int32_t* sum) {
        constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52
        std::int32_t sums[3] = {0, 0, 0};
        for (std::size_t k = 0; k < count; ++k) {
            const double scaled = static_cast<double>(x[k]) * factor;
            const auto value = static_cast<std::int32_t>((scaled + kShift) - kShift);
            const std::int32_t low = ((value + 128) & 255) - 128;
            const std::int32_t rest = (value - low) >> 8;
            const std::int32_t middle = ((rest + 128) & 255) - 128;
            const std::int32_t high = (rest - middle) >> 8;
            q[k] = static_cast<std::int8_t>(high);
            q[stride + k] = static_cast<std::int8_t>(middle);
            q[2 * stride + k] = static_cast<std::int8_t>(low);
            sums[0] += high;
            sums[1] += middle;
            sums[2] += low;
        }
        for (int p = 0; p < 3; ++p) sum[p] = sums[p];
    }
};

// Sums of 16 places each, for the compiler to use vectors.
static inline float sum_squared_rest(const float* x, std::size_t count, float factor, const std::int8_t* q) {
    constexpr std::size_t kLanes = 16;
    float lanes[kLanes] = {};
    std::size_t k = 0;
    for (; k + kLanes <= count; k += kLanes) {
        for (std::size_t j = 0; j < kLanes; ++j) {
            const float rest = x[k + j] * factor - static_cast<float>(q[k + j]);
            lanes[j] += rest * rest;
        }
    }
    for (; k < count; ++k) {
        const float rest = x[k] * factor - static_cast<float>(q[k]);
        lanes[0] += rest * rest;
    }
    float sum = 0;
    for (const float lane : lanes) sum += lane;
    return sum;
}

static inline std::int32_t bits_of(float value) {
    std::int32_t bits;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    return bits;
}

// How many |x| have bits below `limit`. Magnitudes compare like their bits, whatever the CPU makes of
// denormal numbers.
static inline std::int64_t count_below(const float* x, std::size_t count, std::int32_t limit) {
    std::int32_t below = 0;
    for (std::size_t k = 0; k < count; ++k) below += (bits_of(x[k]) & 0x7fffffff) < limit;
    return below;
}

static inline bool is_wide_group(const float* x, std::size_t count, float m, const WideRule& rule) {
    const auto all = static_cast<std::int64_t>(count);
    for (const WideLevel& level : rule.levels) {
        const std::int64_t below = count_below(x, count, bits_of(m * level.fraction));
        if (below == 0) return false;              // and so at the levels that follow
        if (below * level.share <= all) continue;  // however many of them are zeros
        const std::int64_t zeros = count_below(x, count, bits_of(kSmallest));
        if ((below - zeros) * level.share > all - zeros) return true;
    }
    return false;
}

template <typename Loops>
static inline void quantize_group(const float* x, std::size_t count, std::size_t num_planes, std::int8_t* q,
                                  std::size_t stride, float* scale, std::int32_t* sum, float* squared_rest,
                                  std::uint8_t* is_wide, const WideRule& wide_rule, float min_magnitude) {
    const float levels = num_planes == 1 ? kLevels8 : kLevels24;
    const float largest = Loops::largest_magnitude(x, count);
    const bool is_finite = largest <= 3.40282347e+38f;
    if (!is_finite || largest < kSmallest) {
        for (std::size_t p = 0; p < num_planes; ++p) {
            for (std::size_t k = 0; k < count; ++k) q[p * stride + k] = 0;
            scale[p] = is_finite ? 0.0f : __builtin_nanf("");
            sum[p] = 0;
        }
        if (squared_rest != nullptr) *squared_rest = scale[0];
        return;
    }
    const float m = largest < min_magnitude ? min_magnitude : largest;
    if (num_planes == 1) {
        // torch divides a number by a tensor so, and BitLinear's integers are those of torch.
        const float factor = min_magnitude > 0.0f ? levels * (1.0f / m) : levels / m;
        scale[0] = m / levels;
        sum[0] = Loops::quantize_8(x, count, factor, q);
        if (squared_rest != nullptr) *squared_rest = sum_squared_rest(x, count, factor, q);
        return;
    }
    if (is_wide != nullptr && is_wide_group(x, count, m, wide_rule)) *is_wide = 1;
    scale[2] = m / levels;
    scale[1] = scale[2] * 256.0f;
    scale[0] = scale[2] * 65536.0f;
    Loops::quantize_24(x, count, static_cast<double>(levels) / static_cast<double>(m), q, stride, sum);
}

template <typename Loops>
static inline void quantize_rows(const QuantizeRowsJob& job) {
    const std::size_t stride = ceil_div(job.num_columns, kBlockColumns) * kBlockColumns;
    const std::size_t num_groups = ceil_div(stride, job.group_columns);
    for (std::size_t row = job.row_begin; row < job.row_end; ++row) {
        const float* x = job.x + row * job.num_columns;
        std::int8_t* q = job.q + row * job.num_planes * stride;
        for (std::size_t p = 0; p < job.num_planes; ++p) {
            for (std::size_t k = job.num_columns; k < stride; ++k) q[p * stride + k] = 0;
        }
        std::uint8_t* is_wide = job.is_wide == nullptr ? nullptr : job.is_wide + row;
        if (is_wide != nullptr) *is_wide = 0;
        for (std::size_t g = 0; g < num_groups; ++g) {
            const std::size_t begin = g * job.group_columns, left = job.num_columns - begin;
            const std::size_t place = (row * num_groups + g) * job.num_planes;
            quantize_group<Loops>(
                x + begin, left < job.group_columns ? left : job.group_columns, job.num_planes, q + begin,
                stride, job.scale + place, job.sum + place,
                job.squared_rest == nullptr ? nullptr : job.squared_rest + row * num_groups + g, is_wide,
                job.wide_rule, job.min_magnitude);
        }
    }
}

}  // namespace trix
