#include "kernels/ternary_matmul/ternary_matmul.hpp"
#include "tests/quantised.hpp"

namespace trix_tests {
namespace {

// The contract of the product, written as directly as possible.
float contract_value(const Product& p, const Quantised& x, std::size_t t, std::size_t n) {
    float total = 0.0f;
    for (std::size_t g = 0; g < x.num_groups; ++g) {
        for (std::size_t plane = 0; plane < x.num_planes; ++plane) {
            std::int32_t dot = 0;
            for (std::size_t k = g * x.group_columns; k < std::min((g + 1) * x.group_columns, p.num_columns);
                 ++k)
                dot += x.q[(t * x.num_planes + plane) * row_stride(p) + k] * p.weight[n * p.num_columns + k];
            total += static_cast<float>(dot) * x.scale[(t * x.num_groups + g) * x.num_planes + plane];
        }
    }
    return p.row_scale[n] * total;
}

// As good as sums of float32: 3 roundings a group, and what the quantiser leaves out.
void check_exactness(const Product& p, const Quantised& x, std::size_t t, std::size_t n, float got) {
    double exact = 0, bound = 1e-30, magnitude = 0;
    for (std::size_t g = 0; g < x.num_groups; ++g) {
        double largest = 0, count = 0;
        for (std::size_t k = g * x.group_columns; k < std::min((g + 1) * x.group_columns, p.num_columns);
             ++k) {
            const auto value = static_cast<double>(p.x[t * p.num_columns + k]);
            const int w = p.weight[n * p.num_columns + k];
            exact += value * w;
            magnitude += std::abs(value * w);
            count += w != 0 ? 1 : 0;
            largest = std::max(largest, std::abs(value));
        }
        bound += count * largest * 0x1p-23;
    }
    bound += 2.0 * static_cast<double>(3 * x.num_groups + 2) * 0x1p-24 * magnitude;
    const auto scale = static_cast<double>(p.row_scale[n]);
    const double error = std::abs(static_cast<double>(got) - exact * scale);
    EXPECT(error <= bound * std::abs(scale), "K %zu: error %g, bound %g", p.num_columns, error,
           bound * std::abs(scale));
}

void check_products(const KernelVariant<TernaryMatMulKernel>& variant) {
    for (int round = 0; round < 1200; ++round) {
        const Product p = product_of_round(round);
        const std::size_t num_planes = round % 3 == 0 ? 1 : 3;
        Quantised x = reference_quantised(p, round % 2 == 0, num_planes);
        const bool is_extreme = round % 7 == 0;
        if (is_extreme) {  // the largest sums that there can be
            const auto value = static_cast<std::int8_t>(round % 2 == 0 ? 127 : -128);
            for (std::size_t row = 0; row < p.num_tokens * num_planes; ++row)
                std::fill_n(x.q.begin() + static_cast<std::ptrdiff_t>(row * row_stride(p)), p.num_columns,
                            value);
            for (std::size_t i = 0; i < x.sum.size(); ++i) {
                const std::size_t begin = i / num_planes % x.num_groups * x.group_columns;
                x.sum[i] =
                    value * static_cast<std::int32_t>(std::min(x.group_columns, p.num_columns - begin));
            }
        }
        const auto [panel_begin, panel_end] = random_panels(p);
        std::vector<float> y(p.num_tokens * p.num_rows, kUntouched);
        variant.function({x.q.data(), x.scale.data(), x.sum.data(), p.panels.data(), p.row_scale.data(),
                          p.token_idx.data(), p.token_idx.data(), y.data(), p.num_tokens, p.num_columns,
                          x.group_columns, num_planes, p.num_rows, panel_begin, panel_end});
        for (std::size_t t = 0; t < p.num_tokens; ++t) {
            for (std::size_t n = 0; n < p.num_rows; ++n) {
                const bool is_named = n / kPanelRows >= panel_begin && n / kPanelRows < panel_end;
                const float expected = is_named ? contract_value(p, x, t, n) : kUntouched;
                const float got = y[t * p.num_rows + n];
                EXPECT(same(got, expected), "%s: T %zu N %zu K %zu token %zu row %zu: %a, not %a",
                       variant.name, p.num_tokens, p.num_rows, p.num_columns, t, n, static_cast<double>(got),
                       static_cast<double>(expected));
                if (is_named && num_planes == 3 && !is_extreme && round % 4 != 3)
                    check_exactness(p, x, t, n, got);
            }
        }
    }
}

// The most columns that the contract allows, all products as large as can be.
void check_longest_sum(const KernelVariant<TernaryMatMulKernel>& variant) {
    for (const int value : {127, -128}) {
        const std::vector<std::int8_t> q(kMaxColumns, static_cast<std::int8_t>(value));
        const std::int32_t sum = value * static_cast<std::int32_t>(kMaxColumns);
        const std::vector<std::uint8_t> panels(panel_bytes(kMaxColumns), 0xaa);  // all +1
        const std::vector<float> row_scale(kPanelRows, 1.0f);
        const float scale = 1.0f;
        const std::int64_t token = 0;
        std::vector<float> y(kPanelRows);
        variant.function({q.data(), &scale, &sum, panels.data(), row_scale.data(), &token, &token, y.data(),
                          1, kMaxColumns, kMaxColumns, 1, kPanelRows, 0, 1});
        for (const float got : y)
            EXPECT(same(got, static_cast<float>(sum)), "%s: %a", variant.name, static_cast<double>(got));
    }
}

}  // namespace

void test_ternary_matmul(const KernelVariant<TernaryMatMulKernel>& variant) {
    check_products(variant);
    check_longest_sum(variant);
}

}  // namespace trix_tests
