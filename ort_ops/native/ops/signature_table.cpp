#include "ops/signature_table.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/dispatch.hpp"
#include "kernels/signature_norms/signature_norms.hpp"
#include "kernels/signature_route/signature_route.hpp"

namespace trix {
namespace {

constexpr std::size_t kTokensPerUnit = 64;

std::vector<float> inverse_norms(const TensorView& signatures) {
    if (signatures.size(2) != kBlockBytes) return {};  // check will say so
    std::vector<float> norms(signatures.size(0) * kPanelRows);
    kernels().signature_norms(
        {signatures.as<std::uint8_t>(), norms.data(), norms.size(), signatures.size(1) * kBlockColumns});
    return norms;
}

// Calls body(begin, end) for the tokens in units, on the session's threads. `body` must not throw.
template <typename Body>
void for_token_units(const KernelContext& context, std::size_t num_tokens, const Body& body) {
    context.parallel_for(ceil_div(num_tokens, kTokensPerUnit), [&](std::size_t unit) noexcept {
        const std::size_t begin = unit * kTokensPerUnit;
        body(begin, std::min(begin + kTokensPerUnit, num_tokens));
    });
}

}  // namespace

SignatureTable::SignatureTable(const KernelInfo& info, std::size_t index, const TensorSpec& spec)
    : packed_(info, index, spec) {
    // Without columns a table of any number of rows takes no bytes: its norms wait for the check of the
    // sizes.
    if (packed_.is_constant() && packed_.constant().size(1) > 0)
        constant_norms_ = inverse_norms(packed_.constant());
}

void SignatureTable::check(const TensorView& signatures, std::int64_t num_tiles,
                           std::int64_t num_columns) const {
    packed_.check(signatures, num_tiles, num_columns);
    check_columns("x", num_columns);
}

TileMatrices SignatureTable::matrix(const TensorView& signatures, std::int64_t num_tiles,
                                    std::int64_t num_columns, std::vector<float>& run_norms) const {
    const bool is_known = !constant_norms_.empty();
    if (!is_known) run_norms = inverse_norms(signatures);
    const std::vector<float>& norms = is_known ? constant_norms_ : run_norms;
    return {signatures.as<std::uint8_t>(), norms.data(), static_cast<std::size_t>(num_tiles),
            static_cast<std::size_t>(num_columns)};
}

void score_tiles(const KernelContext& context, const TileMatrices& table, const float* x,
                 std::size_t num_tokens, float* score) {
    TokenGroups all_tokens{std::vector<std::int64_t>(num_tokens), {0, num_tokens}};
    std::iota(all_tokens.order.begin(), all_tokens.order.end(), std::int64_t{0});
    const QuantisedRows rows = quantise(context, Activations(), x, num_tokens, table.num_columns);
    multiply_tiles(context, rows, table, all_tokens, all_tokens.order.data(), all_tokens.order.data(), score);
}

std::size_t score_block_bytes(std::size_t num_tiles, std::size_t num_columns) {
    return plane_bytes(kScoreBlock, num_columns, kGroupColumns) +
           rest_bytes(num_columns, kGroupColumns, num_tiles);
}

void score_block(const TileMatrices& table, const float* x, std::size_t num_tokens, std::uint8_t* scratch,
                 float* score) noexcept {
    static constexpr std::int64_t kPlaces[kScoreBlock] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11,
                                                          12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23};
    std::uint8_t is_wide[kScoreBlock];
    QuantizeRowsJob quantise = plane_job(scratch, num_tokens, table.num_columns, kGroupColumns);
    quantise.x = x;
    quantise.is_wide = is_wide;
    quantise.wide_rule = kWideForScores;
    kernels().quantize_rows(quantise);

    TernaryMatMulJob multiply = product_job(table, quantise);
    multiply.token_idx = kPlaces;
    multiply.y_idx = kPlaces;
    multiply.y = score;
    multiply.num_tokens = num_tokens;
    kernels().ternary_matmul(multiply);

    const std::size_t stride = ceil_div(table.num_columns, kBlockColumns) * kBlockColumns;
    const std::size_t row_scales = ceil_div(stride, kGroupColumns) * kFinePlanes;
    std::uint8_t* rest = scratch + plane_bytes(num_tokens, table.num_columns, kGroupColumns);
    for (std::size_t t = 0; t < num_tokens; ++t) {
        if (is_wide[t] == 0) continue;
        add_rest(table, x + t * table.num_columns, quantise.q + t * kFinePlanes * stride,
                 quantise.scale + t * row_scales, kGroupColumns, rest, score + t * table.num_rows);
    }
}

void choose_tiles(const KernelContext& context, std::size_t num_tokens, std::size_t num_tiles,
                  std::size_t top_k, const float* score, const float* bias, std::int64_t* tile_idx) {
    const SignatureRouteKernel kernel = kernels().signature_route;
    for_token_units(context, num_tokens, [&](std::size_t begin, std::size_t end) {
        SignatureRouteJob job{};
        job.score = score;
        job.bias = bias;
        job.tile_idx = tile_idx;
        job.num_tiles = num_tiles;
        job.top_k = top_k;
        job.token_begin = begin;
        job.token_end = end;
        kernel(job);
    });
}

void weigh_tiles(const KernelContext& context, const SignatureGateJob& of_all, std::size_t num_tokens) {
    const SignatureGateKernel kernel = kernels().signature_gate;
    const auto scale = static_cast<float>(std::sqrt(static_cast<double>(of_all.num_tiles)));
    for_token_units(context, num_tokens, [&](std::size_t begin, std::size_t end) {
        SignatureGateJob job = of_all;
        job.scale = scale;
        job.token_begin = begin;
        job.token_end = end;
        kernel(job);
    });
}

void route_groups(const KernelContext& context, const SignatureGateJob& of_first, std::int64_t* tile_idx,
                  std::size_t num_groups, std::size_t stride, std::size_t num_tokens) {
    const SignatureRouteKernel choose = kernels().signature_route;
    const SignatureGateKernel weigh = kernels().signature_gate;
    const std::size_t num_tiles = of_first.num_tiles, top_k = of_first.top_k;
    const auto scale = static_cast<float>(std::sqrt(static_cast<double>(num_tiles)));
    for_token_units(context, num_tokens * num_groups, [&](std::size_t begin, std::size_t end) {
        for (std::size_t row = begin; row < end; ++row) {
            const std::size_t first_tile = row % num_groups * num_tiles;
            SignatureGateJob job = of_first;
            job.score += row * stride;
            job.bias += first_tile;
            job.log_mass += first_tile;
            job.tile_idx += row * top_k;
            job.weight += row * top_k;
            job.scale = scale;
            job.token_end = 1;
            choose({job.score, job.bias, tile_idx + row * top_k, num_tiles, top_k, 0, 1});
            weigh(job);
        }
    });
}

}  // namespace trix
