#include "tests/quantised.hpp"

namespace trix_tests {
namespace {

// What rounding left over, in units of the scale; group g of token t.
void check_squared_rest(const char* name, const Product& p, const Quantised& x, std::size_t t, std::size_t g,
                        float min_magnitude, float got) {
    const float scale = x.scale[t * x.num_groups + g];
    if (!(scale > 0)) {
        EXPECT(same(got, scale), "%s: rest %g of scale %g", name, got, scale);
        return;
    }
    const std::size_t end = std::min((g + 1) * x.group_columns, p.num_columns);
    float largest = min_magnitude;
    for (std::size_t k = g * x.group_columns; k < end; ++k)
        largest = std::max(largest, std::abs(p.x[t * p.num_columns + k]));
    const float factor = min_magnitude > 0 ? 127.0f * (1.0f / largest) : 127.0f / largest;
    double expected = 0;
    for (std::size_t k = g * x.group_columns; k < end; ++k) {
        const double scaled = static_cast<double>(p.x[t * p.num_columns + k] * factor);
        const double rest = scaled - x.q[t * row_stride(p) + k];
        expected += rest * rest;
    }
    EXPECT(std::abs(got - expected) <= 1e-4 * expected + 1e-30, "%s: rest %g, not %g", name, got, expected);
}

}  // namespace

void test_quantize_rows(const KernelVariant<QuantizeRowsKernel>& variant) {
    std::size_t num_rows = 0, num_wide = 0;
    for (int round = 0; round < 800; ++round) {
        Product p = product_of_round(round);
        if (round % 5 == 0) {
            for (float& value : p.x)
                value *= 0x1p-100f;  // groups that count as zeros, and some that just do not
        }
        const std::size_t num_planes = round % 3 == 0 ? 1 : 3;
        const float min_magnitude = round % 9 == 3 ? 2.0f : 0.0f;  // some groups reach it, some do not
        const Quantised expected = reference_quantised(p, round % 2 == 0, num_planes, min_magnitude);
        Quantised got = empty_quantised(p, round % 2 == 0, num_planes);
        const std::size_t split = random_below(p.num_tokens + 1);
        std::vector<float> rest(num_planes == 1 ? got.scale.size() : 0);
        const auto run = [&](std::size_t begin, std::size_t end) {
            variant.function({p.x.data(), got.q.data(), got.scale.data(), got.sum.data(),
                              rest.empty() ? nullptr : rest.data(),
                              got.is_wide.empty() ? nullptr : got.is_wide.data(), kRule, min_magnitude,
                              p.num_columns, got.group_columns, num_planes, begin, end});
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
            check_squared_rest(variant.name, p, expected, i / got.num_groups, i % got.num_groups,
                               min_magnitude, rest[i]);
    }
    EXPECT(num_wide > num_rows / 5 && num_wide < num_rows - num_rows / 5, "%s: %zu wide of %zu", variant.name,
           num_wide, num_rows);
}

}  // namespace trix_tests
