#include <complex>

#include "kernels/resolvent_sweep/resolvent_sweep.hpp"
#include "tests/kernel_test.hpp"

namespace trix_tests {

void test_resolvent_sweep(const KernelVariant<ResolventSweepKernel>& variant) {
    for (int round = 0; round < 200; ++round) {
        const std::size_t num_rows = random_below(20), num_tokens = random_below(40);
        std::vector<float> re = random_values(num_rows * num_tokens), im = random_values(re.size()),
                           w = random_values(re.size());
        const auto first_re = random_values(num_rows), first_im = random_values(num_rows);
        for (float& value : im) value = -0.1f - std::abs(value);  // eta > 0
        for (float& value : w) value = random_below(9) == 0 ? 0.0f : std::abs(value);
        const bool is_special = round % 5 == 0 && !re.empty();
        if (is_special) re[random_below(re.size())] = round % 2 == 0 ? kNan : kInfinity;
        const std::size_t begin = random_below(num_rows + 1);
        std::vector<float> all_re(re.size(), kUntouched), all_im = all_re, got_re = all_re, got_im = all_re;
        const auto run = [&](ResolventSweepKernel kernel, std::size_t row, std::vector<float>& G_re,
                             std::vector<float>& G_im) {
            kernel({re.data(), im.data(), w.data(), first_re.data(), first_im.data(), G_re.data(),
                    G_im.data(), num_tokens, row, num_rows});
        };
        run(resolvent_sweep_scalar, 0, all_re, all_im);
        run(variant.function, begin, got_re, got_im);
        for (std::size_t row = 0; row < num_rows; ++row) {
            std::complex<double> G(first_re[row], first_im[row]);
            for (std::size_t t = 0; t < num_tokens; ++t) {
                const std::size_t i = row * num_tokens + t;
                G = 1.0 / (std::complex<double>(re[i], im[i]) - static_cast<double>(w[i]) * G);
                const double error = std::abs(std::complex<double>(all_re[i], all_im[i]) - G);
                EXPECT(is_special || error <= 1e-3 * std::max(1.0, std::abs(G)), "%s: error %g", variant.name,
                       error);
                EXPECT(same(got_re[i], row < begin ? kUntouched : all_re[i]), "%s: round %d", variant.name,
                       round);
                EXPECT(same(got_im[i], row < begin ? kUntouched : all_im[i]), "%s: round %d", variant.name,
                       round);
                G = {all_re[i], all_im[i]};  // each pivot against that of float32 before: one step's rounding
            }
        }
    }
}

}  // namespace trix_tests
