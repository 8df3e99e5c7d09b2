#include "kernels/row_rest/row_rest.hpp"
#include "tests/quantised.hpp"

namespace trix_tests {

// Rows taken from x until nothing is left add up to x, whatever the sizes of its numbers.
void test_row_rest(const KernelVariant<RowRestKernel>& variant) {
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
        bool has_rest = false;
        do {
            quantize_rows_scalar({rest.data(),
                                  row.q.data(),
                                  row.scale.data(),
                                  row.sum.data(),
                                  nullptr,
                                  nullptr,
                                  {},
                                  0.0f,
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
            variant.function({p.x.data(), row.q.data(), row.scale.data(), rest.data(), &has_rest, num_columns,
                              row.group_columns});
        } while (has_rest && num_taken < 20);
        EXPECT(num_taken <= 11, "round %d: %d rows", round, num_taken);
        for (std::size_t k = 0; k < num_columns; ++k) {
            const auto value = static_cast<double>(p.x[k]);
            EXPECT(std::abs(taken[k] - value) <= std::max(std::abs(value) * 0x1p-23, 0x1p-99), "%a, not %a",
                   taken[k], value);
        }
    }
}

}  // namespace trix_tests
