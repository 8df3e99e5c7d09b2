#include "kernels/scale_rows/scale_rows.hpp"
#include "tests/kernel_test.hpp"

namespace trix_tests {

void test_scale_rows(const KernelVariant<ScaleRowsKernel>& variant) {
    for (int round = 0; round < 300; ++round) {
        const std::size_t num_tokens = random_below(6), width = random_below(70);
        std::vector<float> y = random_values(num_tokens * width), weight = random_values(num_tokens);
        for (float& value : y)
            if (random_below(20) == 0) value = random_below(2) == 0 ? kNan : -kInfinity;
        for (float& value : weight)
            if (random_below(3) == 0) value = random_below(2) == 0 ? 0.0f : -0.0f;
        const std::size_t begin = random_below(num_tokens + 1);
        std::vector<float> got = y;
        variant.function({weight.data(), got.data(), width, begin, num_tokens});
        for (std::size_t i = 0; i < y.size(); ++i) {
            const std::size_t t = i / width;
            const float scaled = weight[t] == 0.0f ? 0.0f : y[i] * weight[t];
            EXPECT(same(got[i], t < begin ? y[i] : scaled), "%s: round %d place %zu", variant.name, round, i);
        }
    }
}

}  // namespace trix_tests
