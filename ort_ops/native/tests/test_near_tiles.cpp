#include "kernels/near_tiles/near_tiles.hpp"
#include "tests/kernel_test.hpp"

namespace trix_tests {

void test_near_tiles(const KernelVariant<NearTilesKernel>& variant) {
    for (int round = 0; round < 2000; ++round) {
        const std::size_t num_tiles = 1 + random_below(300), last = random_below(num_tiles);
        std::vector<float> score = random_values(num_tiles), bias = random_values(num_tiles);
        const float specials[] = {kNan, kInfinity, -kInfinity, 3e38f, -3e38f};
        for (float& value : score)
            if (round % 4 == 0 && random_below(10) == 0) value = specials[random_below(5)];
        for (float& value : bias)
            if (round % 3 == 0 && random_below(10) == 0) value = -kInfinity;
        const double bounds[] = {0.0, 0.1, 1.0, HUGE_VAL, std::nan("")};
        const double bound = bounds[random_below(5)];
        std::vector<std::int64_t> got(num_tiles, -7);
        std::size_t num_found = 0;
        variant.function({score.data(), bias.data(), got.data(), &num_found, bound, last, num_tiles});
        // Let in: whatever is not clearly worse. Left out: whatever is worse by a little more than the bound.
        const auto key = [&](std::size_t e) { return static_cast<double>(score[e] + bias[e]); };
        const bool lets_all_in = !(std::abs(key(last)) < 0x1p120) || !std::isfinite(bound);
        const double slack = 2 * bound + std::abs(key(last)) * 0x1p-19;
        std::vector<bool> is_in(num_tiles, false);
        for (std::size_t i = 0; i < num_found; ++i) {
            EXPECT(got[i] >= 0 && (i == 0 || got[i] > got[i - 1]), "%s: place %zu", variant.name, i);
            is_in[static_cast<std::size_t>(got[i])] = true;
        }
        for (std::size_t e = 0; e < num_tiles; ++e) {
            if (lets_all_in || !(key(e) < key(last) - slack))
                EXPECT(is_in[e], "%s: round %d tile %zu is missing", variant.name, round, e);
            else if (key(e) < key(last) - slack - std::abs(key(last)) * 0x1p-22 - 1e-6)
                EXPECT(!is_in[e], "%s: round %d tile %zu is too many", variant.name, round, e);
        }
    }
}

}  // namespace trix_tests
