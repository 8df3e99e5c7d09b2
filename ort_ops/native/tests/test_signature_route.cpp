#include <numeric>

#include "kernels/signature_route/signature_route.hpp"
#include "tests/kernel_test.hpp"

namespace trix_tests {
namespace {

std::vector<std::int64_t> reference_choice(const float* score, const float* bias, std::size_t num_tiles) {
    std::vector<std::int64_t> order(num_tiles);
    std::iota(order.begin(), order.end(), std::int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
        const float key_a = score[a] + bias[a], key_b = score[b] + bias[b];
        if (std::isnan(key_a) || std::isnan(key_b)) return !std::isnan(key_a) && std::isnan(key_b);
        return key_a > key_b;
    });
    return order;
}

}  // namespace

void test_signature_route(const KernelVariant<SignatureRouteKernel>& variant) {
    for (int round = 0; round < 3000; ++round) {
        const std::size_t num_tokens = random_below(5);
        const std::size_t num_tiles = 1 + random_below(round % 5 == 0 ? 300 : 40);
        const std::size_t top_k =
            1 + random_below(round % 3 == 0 ? num_tiles : std::min<std::size_t>(num_tiles, 4));
        std::vector<float> score(num_tokens * num_tiles), bias(num_tiles);
        const float few[] = {0.0f, -0.0f, 1.0f, -1.0f, 2.0f, kNan, -kInfinity, kInfinity};
        const auto draw = [&] { return round % 2 == 0 ? few[random_below(8)] : random_value(); };
        for (float& value : score) value = draw();
        for (float& value : bias) value = round % 4 == 0 ? draw() : 0.0f;
        std::vector<std::int64_t> tile_idx(num_tokens * top_k, -7);
        const std::size_t token_begin = random_below(num_tokens + 1);
        variant.function(
            {score.data(), bias.data(), tile_idx.data(), num_tiles, top_k, token_begin, num_tokens});
        for (std::size_t t = 0; t < num_tokens; ++t) {
            const auto expected = reference_choice(score.data() + t * num_tiles, bias.data(), num_tiles);
            for (std::size_t i = 0; i < top_k; ++i) {
                const std::int64_t want = t < token_begin ? -7 : expected[i];
                EXPECT(tile_idx[t * top_k + i] == want, "%s: E %zu top_k %zu place %zu: %lld, not %lld",
                       variant.name, num_tiles, top_k, i, static_cast<long long>(tile_idx[t * top_k + i]),
                       static_cast<long long>(want));
            }
        }
    }
}

}  // namespace trix_tests
