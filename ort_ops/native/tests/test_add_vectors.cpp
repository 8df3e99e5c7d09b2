#include "kernels/add_vectors/add_vectors.hpp"
#include "tests/kernel_test.hpp"

namespace trix_tests {

void test_add_vectors(const KernelVariant<AddVectorsKernel>& variant) {
    for (std::size_t size = 0; size < 100; ++size) {
        std::vector<float> x = random_values(size), y = random_values(size);
        if (size > 2) x[size - 1] = kNan, x[size / 2] = kInfinity;
        std::vector<float> got = y;
        variant.function({x.data(), got.data(), size});
        for (std::size_t i = 0; i < size; ++i)
            EXPECT(same(got[i], y[i] + x[i]), "%s: size %zu place %zu", variant.name, size, i);
    }
}

}  // namespace trix_tests
