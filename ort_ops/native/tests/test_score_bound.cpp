#include "kernels/score_bound/score_bound.hpp"
#include "tests/kernel_test.hpp"

namespace trix_tests {

void test_score_bound(const KernelVariant<ScoreBoundKernel>& variant) {
    for (int round = 0; round < 300; ++round) {
        const std::size_t num_tokens = random_below(5), num_groups = random_below(20), group_columns = 128;
        std::vector<float> scale(num_tokens * num_groups), squared_rest(scale.size());
        for (float& value : scale) value = std::abs(random_value()) * 0.01f;
        for (float& value : squared_rest) value = std::abs(random_value()) * 10.0f;
        const bool is_special = round % 3 == 0 && !scale.empty();
        const std::size_t place = is_special ? random_below(scale.size()) : 0;
        const float special = round % 2 == 0 ? kNan : 0x1p115f;
        if (is_special) scale[place] = special;
        std::vector<double> got(num_tokens, -1.0);
        const std::size_t begin = random_below(num_tokens + 1);
        variant.function(
            {scale.data(), squared_rest.data(), got.data(), num_groups, group_columns, begin, num_tokens});
        for (std::size_t t = 0; t < num_tokens; ++t) {
            if (t < begin) {
                EXPECT(got[t] < 0, "%s: token %zu was written", variant.name, t);
                continue;
            }
            if (is_special && place / num_groups == t) {
                EXPECT(std::isnan(special) ? std::isnan(got[t]) : std::isinf(got[t]), "%s: %g", variant.name,
                       got[t]);
                continue;
            }
            long double error = 0, length = 0;
            for (std::size_t g = t * num_groups; g < (t + 1) * num_groups; ++g) {
                const auto square = static_cast<long double>(scale[g]) * static_cast<long double>(scale[g]);
                error += static_cast<long double>(squared_rest[g]) * square;
                length += 128.0L * 127 * 127 * square;
            }
            const long double share = 0x1p-16L + static_cast<long double>(num_groups) * 0x1p-21L;
            const long double expected = std::sqrt(error) + std::sqrt(length) * share;
            EXPECT(std::abs(static_cast<long double>(got[t]) - expected) <= 1e-12L * expected,
                   "%s: %g, not %Lg", variant.name, got[t], expected);
        }
    }
}

}  // namespace trix_tests
