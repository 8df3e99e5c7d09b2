// The gate kernel against the contract in double, and its variants bit for bit.
#include "kernels/signature_gate/signature_gate.hpp"
#include "tests/kernel_test.hpp"

namespace trix_tests {
namespace {

std::vector<double> reference_gate(const SignatureGateJob& job, std::size_t t) {
    const auto score = [&](std::size_t e) { return static_cast<double>(job.score[t * job.num_tiles + e]); };
    const auto is_free = [&](std::size_t e) { return std::isinf(job.bias[e]) && job.bias[e] < 0; };
    const auto tile = [&](std::size_t k) {
        return static_cast<std::size_t>(job.tile_idx[t * job.top_k + k]);
    };
    std::vector<double> weight(job.top_k);
    if (job.gate == Gate::kSigmoid) {
        for (std::size_t k = 0; k < job.top_k; ++k)
            weight[k] = (is_free(tile(k)) ? 0 : 1) / (1 + std::exp(-score(tile(k))));
        return weight;
    }
    double sum = 0, best = -std::numeric_limits<double>::infinity();
    for (std::size_t e = 0; e < job.num_tiles; ++e) {
        if (is_free(e)) continue;
        sum += std::exp(score(e) + static_cast<double>(job.log_mass[e]));
        best = std::max(best, score(e));
    }
    std::size_t num_used = job.top_k;
    if (job.gate == Gate::kAdaptive) {
        num_used = 0;
        for (std::size_t e = 0; e < job.num_tiles; ++e) {
            const auto close = static_cast<float>(best) - job.score[t * job.num_tiles + e];
            num_used += !is_free(e) && close <= job.confidence_threshold ? 1 : 0;
        }
        num_used = std::clamp<std::size_t>(num_used, 1, job.top_k);
        if (!std::isnan(sum)) sum = 0;
        for (std::size_t k = 0; k < num_used; ++k) sum += is_free(tile(k)) ? 0 : std::exp(score(tile(k)));
    }
    const double scale = job.gate == Gate::kSoftmax ? static_cast<double>(job.scale) : 1;
    for (std::size_t k = 0; k < job.top_k; ++k)
        weight[k] = (k < num_used && !is_free(tile(k)) ? std::exp(score(tile(k))) : 0) / sum * scale;
    return weight;
}

}  // namespace

void test_signature_gate(const KernelVariant<SignatureGateKernel>& variant) {
    for (int round = 0; round < 3000; ++round) {
        const auto draw = [] { return static_cast<float>(random_below(2001)) / 200 - 5; };
        SignatureGateJob job{};
        const std::size_t num_tokens = random_below(4);
        job.num_tiles = 1 + random_below(round % 5 == 0 ? 100 : 20);
        job.top_k = 1 + random_below(std::min<std::size_t>(job.num_tiles, 5));
        job.gate = static_cast<Gate>(round % 3);
        job.scale = std::sqrt(static_cast<float>(job.num_tiles));
        job.confidence_threshold = static_cast<float>(random_below(9)) / 8;
        std::vector<float> score(num_tokens * job.num_tiles), bias(job.num_tiles), log_mass(job.num_tiles);
        // Eighths are exact, so that the threshold is often met to the bit.
        for (float& value : score) value = round % 2 == 0 ? draw() : std::round(draw() * 8) / 8;
        if (round % 7 == 0 && !score.empty())
            score[random_below(score.size())] = std::numeric_limits<float>::quiet_NaN();
        const std::size_t share = round % 11 == 0 ? 1 : 4;  // 1: all tiles are free
        for (float& value : bias)
            value =
                round % 4 == 0 && random_below(share) == 0 ? -std::numeric_limits<float>::infinity() : draw();
        for (float& value : log_mass) value = round % 4 < 2 ? 0.0f : draw();
        std::vector<std::int64_t> tile_idx(num_tokens * job.top_k);
        for (auto& tile : tile_idx) tile = static_cast<std::int64_t>(random_below(job.num_tiles));
        job.score = score.data(), job.bias = bias.data(), job.log_mass = log_mass.data();
        job.tile_idx = tile_idx.data();
        const auto run = [&](SignatureGateKernel kernel, std::size_t begin) {
            std::vector<float> weight(tile_idx.size(), kUntouched);
            job.weight = weight.data(), job.token_begin = begin, job.token_end = num_tokens;
            kernel(job);
            return weight;
        };
        const std::size_t begin = random_below(num_tokens + 1);
        // The scores of the chosen tiles alone, where the weights go.
        const auto run_in_place = [&] {
            std::vector<float> weight(tile_idx.size(), kUntouched);
            for (std::size_t i = begin * job.top_k; i < weight.size(); ++i)
                weight[i] = score[i / job.top_k * job.num_tiles + static_cast<std::size_t>(tile_idx[i])];
            SignatureGateJob in_place = job;
            in_place.score = in_place.log_mass = nullptr;
            in_place.chosen_score = in_place.weight = weight.data();
            in_place.token_begin = begin, in_place.token_end = num_tokens;
            variant.function(in_place);
            return weight;
        };
        const std::vector<float> got = run(variant.function, begin), all = run(signature_gate_scalar, 0);
        if (job.gate == Gate::kSigmoid) {
            const std::vector<float> in_place = run_in_place();
            for (std::size_t i = 0; i < got.size(); ++i)
                EXPECT(same(in_place[i], got[i]), "%s: round %d", variant.name, round);
        }
        for (std::size_t t = 0; t < num_tokens; ++t) {
            const std::vector<double> exact = reference_gate(job, t);
            for (std::size_t k = 0; k < job.top_k; ++k) {
                const float value = all[t * job.top_k + k];
                EXPECT(same(got[t * job.top_k + k], t < begin ? kUntouched : value), "%s: round %d",
                       variant.name, round);
                EXPECT(std::isnan(value) ? std::isnan(exact[k])
                                         : std::abs(static_cast<double>(value) - exact[k]) <= 2e-6 * exact[k],
                       "%s: round %d token %zu: %g, not %g", variant.name, round, t,
                       static_cast<double>(value), exact[k]);
            }
        }
    }
}

}  // namespace trix_tests
