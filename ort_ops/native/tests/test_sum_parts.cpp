#include "kernels/sum_parts/sum_parts.hpp"
#include "tests/kernel_test.hpp"

namespace trix_tests {

void test_sum_parts(const KernelVariant<SumPartsKernel>& variant) {
    for (int round = 0; round < 300; ++round) {
        const std::size_t num_tokens = random_below(6), top_k = random_below(5), width = random_below(70);
        const std::size_t num_parts = 1 + random_below(9);
        std::vector<float> part = random_values(num_parts * width),
                           weight = random_values(num_tokens * top_k);
        for (float& value : part)
            if (random_below(40) == 0) value = random_below(2) == 0 ? kNan : kInfinity;
        std::vector<std::int64_t> part_idx(num_tokens * top_k);
        for (auto& idx : part_idx) idx = static_cast<std::int64_t>(random_below(num_parts + 1)) - 1;
        const std::size_t begin = random_below(num_tokens + 1);
        std::vector<float> got(num_tokens * width, kUntouched);
        variant.function(
            {part.data(), part_idx.data(), weight.data(), got.data(), width, top_k, begin, num_tokens});
        for (std::size_t i = 0; i < got.size(); ++i) {
            const std::size_t t = i / width;
            float sum = 0.0f;
            for (std::size_t k = t * top_k; k < (t + 1) * top_k; ++k) {
                if (part_idx[k] < 0) continue;
                const float product =
                    weight[k] * part[static_cast<std::size_t>(part_idx[k]) * width + i % width];
                sum += product;
            }
            EXPECT(same(got[i], t < begin ? kUntouched : sum), "%s: round %d place %zu", variant.name, round,
                   i);
        }
    }
}

}  // namespace trix_tests
