// The quantiser: its contract as a reference, and what is left of a row.
#pragma once

#include "kernels/dispatch.hpp"
#include "kernels/quantize_rows/row_rest.hpp"
#include "tests/test_products.hpp"

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
inline Quantised reference_quantised(const Product& p, bool has_groups, std::size_t num_planes) {
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
            if (num_planes == 3 && !is_zero && reference_is_wide(x, begin, end, m)) result.is_wide[t] = 1;
            const auto scaled = [&](float value) {
                if (num_planes == 1) return static_cast<double>(value * (levels / m));
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

// What rounding left over, in units of the scale; group g of token t.
inline void check_squared_rest(const char* name, const Product& p, const Quantised& x, std::size_t t,
                               std::size_t g, float got) {
    const float scale = x.scale[t * x.num_groups + g];
    if (!(scale > 0)) {
        EXPECT(same(got, scale), "%s: rest %g of scale %g", name, got, scale);
        return;
    }
    const std::size_t end = std::min((g + 1) * x.group_columns, p.num_columns);
    float largest = 0;
    for (std::size_t k = g * x.group_columns; k < end; ++k)
        largest = std::max(largest, std::abs(p.x[t * p.num_columns + k]));
    double expected = 0;
    for (std::size_t k = g * x.group_columns; k < end; ++k) {
        const double scaled = static_cast<double>(p.x[t * p.num_columns + k] * (127.0f / largest));
        const double rest = scaled - x.q[t * row_stride(p) + k];
        expected += rest * rest;
    }
    EXPECT(std::abs(got - expected) <= 1e-4 * expected + 1e-30, "%s: rest %g, not %g", name, got, expected);
}

inline void test_quantise(const KernelVariant<QuantizeRowsKernel>& variant) {
    std::size_t num_rows = 0, num_wide = 0;
    for (int round = 0; round < 800; ++round) {
        Product p = product_of_round(round);
        if (round % 5 == 0) {
            for (float& value : p.x)
                value *= 0x1p-100f;  // groups that count as zeros, and some that just do not
        }
        const std::size_t num_planes = round % 3 == 0 ? 1 : 3;
        const Quantised expected = reference_quantised(p, round % 2 == 0, num_planes);
        Quantised got = empty_quantised(p, round % 2 == 0, num_planes);
        const std::size_t split = random_below(p.num_tokens + 1);
        std::vector<float> rest(num_planes == 1 ? got.scale.size() : 0);
        const auto run = [&](std::size_t begin, std::size_t end) {
            variant.function({p.x.data(), got.q.data(), got.scale.data(), got.sum.data(),
                              rest.empty() ? nullptr : rest.data(),
                              got.is_wide.empty() ? nullptr : got.is_wide.data(), kRule, p.num_columns,
                              got.group_columns, num_planes, begin, end});
        };
        run(0, split);
        run(split, p.num_tokens);
        EXPECT(got.q == expected.q && got.sum == expected.sum, "%s: K %zu", variant.name, p.num_columns);
        EXPECT(got.is_wide == expected.is_wide, "%s: K %zu", variant.name, p.num_columns);
        num_rows += got.is_wide.size();
        num_wide += static_cast<std::size_t>(std::count(got.is_wide.begin(), got.is_wide.end(), 1));
        for (std::size_t i = 0; i < got.scale.size(); ++i)
            EXPECT(same(got.scale[i], expected.scale[i]), "%s: K %zu scale %zu", variant.name, p.num_columns,
                   i);
        for (std::size_t i = 0; i < rest.size(); ++i)
            check_squared_rest(variant.name, p, expected, i / got.num_groups, i % got.num_groups, rest[i]);
    }
    EXPECT(num_wide > num_rows / 5 && num_wide < num_rows - num_rows / 5, "%s: %zu wide of %zu", variant.name,
           num_wide, num_rows);
}

// Rows taken from x until nothing is left add up to x, whatever the sizes of its numbers.
inline void test_rests() {
    for (int round = 0; round < 300; ++round) {
        const std::size_t num_columns = 1 + random_below(300);
        Product p = random_product(1, 1, num_columns, false);
        for (float& value : p.x) {
            const auto exponent = static_cast<int>(random_below(round % 2 == 0 ? 250 : 30)) - 130;
            value = random_below(10) == 0 ? 0.0f : std::ldexp(value, exponent);
        }
        std::vector<float> rest = p.x;
        std::vector<double> taken(num_columns, 0.0);
        Quantised row = empty_quantised(p, round % 3 != 0, 3);
        int num_taken = 0;
        do {
            quantize_rows_scalar({rest.data(),
                                  row.q.data(),
                                  row.scale.data(),
                                  row.sum.data(),
                                  nullptr,
                                  nullptr,
                                  {},
                                  num_columns,
                                  row.group_columns,
                                  3,
                                  0,
                                  1});
            for (std::size_t k = 0; k < num_columns; ++k) {
                const std::int32_t value =
                    65536 * row.q[k] + 256 * row.q[row_stride(p) + k] + row.q[2 * row_stride(p) + k];
                taken[k] += value * static_cast<double>(row.scale[k / row.group_columns * 3 + 2]);
            }
            ++num_taken;
        } while (take_from_rest(p.x.data(), row.q.data(), row.scale.data(), num_columns, row.group_columns,
                                rest.data()) &&
                 num_taken < 20);
        EXPECT(num_taken <= 11, "round %d: %d rows", round, num_taken);
        for (std::size_t k = 0; k < num_columns; ++k) {
            const auto value = static_cast<double>(p.x[k]);
            EXPECT(std::abs(taken[k] - value) <= std::max(std::abs(value) * 0x1p-23, 0x1p-99), "%a, not %a",
                   taken[k], value);
        }
    }
}

}  // namespace trix_tests
