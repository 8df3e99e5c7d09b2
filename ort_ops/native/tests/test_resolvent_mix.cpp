#include <complex>

#include "kernels/resolvent_mix/resolvent_mix.hpp"
#include "tests/kernel_test.hpp"

namespace trix_tests {

namespace {

using Complex = std::complex<double>;

struct MixCase {
    std::size_t num_tokens = random_below(12), num_channels = random_below(45), width = random_below(6);
    bool is_shared = random_below(3) == 0;  // one query and key for all tokens
    std::size_t num_queries = is_shared ? 1 : num_tokens;
    std::vector<float> G_re = random_values(num_tokens), G_im = random_values(num_tokens),
                       c_re = random_values(num_tokens), c_im = random_values(num_tokens),
                       u = random_values(num_tokens * num_channels), q = random_values(num_queries * width),
                       k = random_values(num_queries * width), first_re = random_values(width * num_channels),
                       first_im = random_values(width * num_channels);
};

struct MixResult {
    std::vector<float> y_re, y_im, state_re, state_im;
};

MixResult run_mix(ResolventMixKernel kernel, const MixCase& mix) {
    const std::vector<float> y(mix.u.size(), kUntouched);
    MixResult result{y, y, mix.first_re, mix.first_im};
    const std::size_t stride = mix.is_shared ? 0 : mix.width;
    kernel({mix.G_re.data(), mix.G_im.data(), mix.c_re.data(), mix.c_im.data(), mix.u.data(), mix.q.data(),
            mix.k.data(), result.y_re.data(), result.y_im.data(), result.state_re.data(),
            result.state_im.data(), mix.num_tokens, mix.num_channels, mix.width, stride, stride});
    return result;
}

void expect_near(const char* name, float re, float im, const Complex& exact, double size) {
    const double error = std::abs(Complex(re, im) - exact);
    EXPECT(error <= 1e-5 * size, "%s: error %g of %g", name, error, size);
}

}  // namespace

void test_resolvent_mix(const KernelVariant<ResolventMixKernel>& variant) {
    for (int round = 0; round < 200; ++round) {
        MixCase mix;
        const bool is_special = round % 5 == 0 && !mix.u.empty();
        if (is_special) mix.u[random_below(mix.u.size())] = round % 2 == 0 ? kNan : kInfinity;
        const MixResult got = run_mix(variant.function, mix), expected = run_mix(resolvent_mix_scalar, mix);
        for (std::size_t i = 0; i < got.y_re.size(); ++i)
            EXPECT(same(got.y_re[i], expected.y_re[i]) && same(got.y_im[i], expected.y_im[i]),
                   "%s: y, round %d", variant.name, round);
        for (std::size_t i = 0; i < got.state_re.size(); ++i)
            EXPECT(same(got.state_re[i], expected.state_re[i]) && same(got.state_im[i], expected.state_im[i]),
                   "%s: state, round %d", variant.name, round);
        if (is_special) continue;
        for (std::size_t p = 0; p < mix.num_channels; ++p) {
            std::vector<Complex> state(mix.width);
            double size = 10;  // of what has been summed, which may cancel
            for (std::size_t n = 0; n < mix.width; ++n)
                state[n] = {mix.first_re[n * mix.num_channels + p], mix.first_im[n * mix.num_channels + p]};
            for (std::size_t t = 0; t < mix.num_tokens; ++t) {
                const std::size_t i = t * mix.num_channels + p, query = mix.is_shared ? 0 : t * mix.width;
                const Complex G(mix.G_re[t], mix.G_im[t]), c(mix.c_re[t], mix.c_im[t]);
                Complex y = 0;
                for (std::size_t n = 0; n < mix.width; ++n) {
                    const double drive =
                        static_cast<double>(mix.k[query + n]) * static_cast<double>(mix.u[i]);
                    state[n] = G * (drive - c * state[n]);
                    y += static_cast<double>(mix.q[query + n]) * state[n];
                    size = std::max(size, 10 * std::abs(state[n]));
                }
                expect_near(variant.name, got.y_re[i], got.y_im[i], y, size);
            }
            for (std::size_t n = 0; n < mix.width; ++n) {
                const std::size_t i = n * mix.num_channels + p;
                expect_near(variant.name, got.state_re[i], got.state_im[i], state[n], size);
            }
        }
    }
}

}  // namespace trix_tests
