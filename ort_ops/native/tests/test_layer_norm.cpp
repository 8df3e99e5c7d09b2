#include "kernels/layer_norm/layer_norm.hpp"
#include "tests/kernel_test.hpp"

namespace trix_tests {

void test_layer_norm(const KernelVariant<LayerNormKernel>& variant) {
    for (int round = 0; round < 200; ++round) {
        const std::size_t num_tokens = random_below(5), width = random_below(round % 10 == 0 ? 600 : 70);
        std::vector<float> x = random_values(num_tokens * width);
        const auto weight = random_values(width), bias = random_values(width);
        if (round % 7 == 0 && !x.empty()) x[random_below(x.size())] = round % 2 == 0 ? kNan : kInfinity;
        const std::size_t begin = random_below(num_tokens + 1);
        const auto run = [&](LayerNormKernel kernel, std::size_t first) {
            std::vector<float> y(x.size(), kUntouched);
            kernel({x.data(), weight.data(), bias.data(), y.data(), 0.01f, width, first, num_tokens});
            return y;
        };
        const std::vector<float> got = run(variant.function, begin), all = run(layer_norm_scalar, 0);
        for (std::size_t t = 0; t < num_tokens; ++t) {
            double mean = 0, variance = 0;
            for (std::size_t d = 0; d < width; ++d)
                mean += static_cast<double>(x[t * width + d]) / static_cast<double>(width);
            for (std::size_t d = 0; d < width; ++d)
                variance +=
                    std::pow(static_cast<double>(x[t * width + d]) - mean, 2) / static_cast<double>(width);
            for (std::size_t d = 0; d < width; ++d) {
                const std::size_t i = t * width + d;
                const double unit = (static_cast<double>(x[i]) - mean) / std::sqrt(variance + 0.01);
                const double exact = unit * static_cast<double>(weight[d]) + static_cast<double>(bias[d]);
                const double error = std::abs(static_cast<double>(all[i]) - exact);
                EXPECT(std::isnan(exact) ? std::isnan(all[i]) : error <= 2e-5, "%s: error %g", variant.name,
                       error);
                EXPECT(same(got[i], t < begin ? kUntouched : all[i]), "%s: round %d", variant.name, round);
            }
        }
    }
}

}  // namespace trix_tests
