// The contract of the quantiser as a reference, for its own test and those of what reads its rows.
#pragma once

#include "kernels/quantize_rows/quantize_rows.hpp"
#include "tests/products.hpp"

namespace trix_tests {

struct Quantised {
    std::size_t group_columns, num_groups, num_planes;
    std::vector<std::int8_t> q;
    std::vector<float> scale;
    std::vector<std::int32_t> sum;
    std::vector<std::uint8_t> is_wide;
};

inline std::size_t row_stride(const Product& p) {
    return ceil_div(p.num_columns, kBlockColumns) * kBlockColumns;
}

inline Quantised empty_quantised(const Product& p, bool has_groups, std::size_t num_planes) {
    const std::size_t group_columns = has_groups ? kGroupColumns : std::max(row_stride(p), kBlockColumns);
    const std::size_t num_groups = ceil_div(row_stride(p), group_columns);
    const std::size_t num_scales = p.num_tokens * num_groups * num_planes;
    return {group_columns,
            num_groups,
            num_planes,
            std::vector<std::int8_t>(p.num_tokens * num_planes * row_stride(p), 99),
            std::vector<float>(num_scales, kUntouched),
            std::vector<std::int32_t>(num_scales),
            std::vector<std::uint8_t>(num_planes == 3 ? p.num_tokens : 0, 7)};
}

// Levels that about every third row of normal values reaches, each by itself.
inline constexpr WideRule kRule = {{{0x1p-4f, 5}, {0x1p-7f, 32}, {0x1p-10f, kMaxShare}}};

// Whether columns [begin, end) of a row with the largest magnitude m are wide.
inline bool reference_is_wide(const float* x, std::size_t begin, std::size_t end, float m) {
    for (const WideLevel& level : kRule.levels) {
        std::int64_t num_small = 0, num_others = 0;
        for (std::size_t k = begin; k < end; ++k) {
            const double size = std::abs(static_cast<double>(x[k]));
            num_others += size >= 0x1p-100 ? 1 : 0;
            num_small +=
                size >= 0x1p-100 && size < static_cast<double>(m) * static_cast<double>(level.fraction);
        }
        if (num_small * level.share > num_others) return true;
    }
    return false;
}

// The contract of the quantiser, written as directly as possible.
inline Quantised reference_quantised(const Product& p, bool has_groups, std::size_t num_planes,
                                     float min_magnitude = 0.0f) {
    Quantised result = empty_quantised(p, has_groups, num_planes);
    const float levels = num_planes == 1 ? 127.0f : 127.0f * (65536 + 256 + 1);
    std::fill(result.q.begin(), result.q.end(), std::int8_t{0});
    std::fill(result.is_wide.begin(), result.is_wide.end(), std::uint8_t{0});
    for (std::size_t t = 0; t < p.num_tokens; ++t) {
        for (std::size_t g = 0; g < result.num_groups; ++g) {
            const std::size_t begin = g * result.group_columns;
            const std::size_t end = std::min(begin + result.group_columns, p.num_columns);
            const float* x = p.x.data() + t * p.num_columns;
            float m = 0.0f;
            bool is_finite = true;
            for (std::size_t k = begin; k < end; ++k) {
                is_finite = is_finite && std::isfinite(x[k]);
                m = std::max(m, std::abs(x[k]));
            }
            const bool is_zero = !is_finite || m < 0x1p-100f;
            m = std::max(m, min_magnitude);
            if (num_planes == 3 && !is_zero && reference_is_wide(x, begin, end, m)) result.is_wide[t] = 1;
            const auto scaled = [&](float value) {
                if (num_planes == 1) {
                    const float factor = min_magnitude > 0 ? levels * (1.0f / m) : levels / m;
                    return static_cast<double>(value * factor);
                }
                return static_cast<double>(value) * (static_cast<double>(levels) / static_cast<double>(m));
            };
            const std::size_t place = (t * result.num_groups + g) * num_planes;
            for (std::size_t plane = 0; plane < num_planes; ++plane) {
                const float weight = std::pow(256.0f, static_cast<float>(num_planes - 1 - plane));
                result.scale[place + plane] = !is_finite ? kNan : is_zero ? 0.0f : m / levels * weight;
                result.sum[place + plane] = 0;
            }
            for (std::size_t k = begin; k < end && !is_zero; ++k) {
                auto rest = static_cast<std::int32_t>(std::nearbyint(scaled(x[k])));
                EXPECT(std::abs(static_cast<double>(rest) * static_cast<double>(m / levels) -
                                static_cast<double>(x[k])) <=
                           static_cast<double>(m) * (num_planes == 1 ? 0.5001 / 127 : 0x1p-23),
                       "K %zu: %a of %a", p.num_columns, static_cast<double>(x[k]), static_cast<double>(m));
                for (std::size_t plane = num_planes; plane-- > 0;) {
                    const std::int32_t digit = plane == 0 ? rest : ((rest % 256 + 384) % 256) - 128;
                    EXPECT(digit >= -128 && digit <= 127, "%d", digit);
                    result.q[(t * num_planes + plane) * row_stride(p) + k] = static_cast<std::int8_t>(digit);
                    result.sum[place + plane] += digit;
                    rest = (rest - digit) / 256;
                }
            }
        }
    }
    return result;
}

}  // namespace trix_tests
