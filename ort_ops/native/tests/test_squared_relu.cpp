#include "kernels/squared_relu/squared_relu.hpp"
#include "tests/kernel_test.hpp"

namespace trix_tests {

void test_squared_relu(const KernelVariant<SquaredReluKernel>& variant) {
    for (std::size_t size = 0; size < 100; ++size) {
        std::vector<float> x = random_values(size);
        const float specials[] = {kNan, -kNan, kInfinity, -kInfinity, 0.0f, -0.0f, 3e38f, 1e-40f, -1e-40f};
        for (float& value : x)
            if (random_below(3) == 0) value = specials[random_below(9)];
        const std::size_t begin = random_below(size + 1), end = begin + random_below(size - begin + 1);
        std::vector<float> got = x;
        variant.function({got.data(), begin, end});
        for (std::size_t i = 0; i < size; ++i) {
            const float squared = std::isnan(x[i]) ? kNan : x[i] > 0.0f ? x[i] * x[i] : 0.0f;
            EXPECT(same(got[i], i < begin || i >= end ? x[i] : squared), "%s: size %zu place %zu: %a of %a",
                   variant.name, size, i, static_cast<double>(got[i]), static_cast<double>(x[i]));
        }
    }
}

}  // namespace trix_tests
