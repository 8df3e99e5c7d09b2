#include "ops/signature_table.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/dispatch.hpp"

namespace trix {
namespace {

constexpr std::size_t kTokensPerUnit = 64;
constexpr std::size_t kPlanes = 3;  // of activations of 24 bits

std::vector<float> inverse_norms(const TensorView& signatures) {
    if (signatures.size(2) != kBlockBytes) return {};  // check will say so
    std::vector<float> norms(signatures.size(0) * kPanelRows);
    inverse_row_norms(signatures.as<std::uint8_t>(), norms.size(), signatures.size(1) * kBlockColumns,
                      norms.data());
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
    const std::size_t stride = ceil_div(num_columns, kBlockColumns) * kBlockColumns;
    return kScoreBlock * kPlanes * (stride + ceil_div(stride, kGroupColumns) * 2 * sizeof(float)) +
           rest_bytes(num_columns, kGroupColumns, num_tiles);
}

void score_block(const TileMatrices& table, const float* x, std::size_t num_tokens, std::uint8_t* scratch,
                 float* score) noexcept {
    static constexpr std::int64_t kPlaces[kScoreBlock] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11,
                                                          12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23};
    const std::size_t stride = ceil_div(table.num_columns, kBlockColumns) * kBlockColumns;
    const std::size_t row_scales = ceil_div(stride, kGroupColumns) * kPlanes;
    const std::size_t num_scales = num_tokens * row_scales;
    QuantizeRowsJob quantise{};
    quantise.x = x;
    quantise.scale = reinterpret_cast<float*>(scratch);
    quantise.sum = reinterpret_cast<std::int32_t*>(quantise.scale + num_scales);
    quantise.q = reinterpret_cast<std::int8_t*>(quantise.sum + num_scales);
    std::uint8_t is_wide[kScoreBlock];
    quantise.is_wide = is_wide;
    quantise.wide_rule = kWideForScores;
    quantise.num_columns = table.num_columns;
    quantise.group_columns = kGroupColumns;
    quantise.num_planes = kPlanes;
    quantise.row_end = num_tokens;
    kernels().quantize_rows(quantise);

    TernaryMatMulJob multiply{};
    multiply.q = quantise.q;
    multiply.scale = quantise.scale;
    multiply.sum = quantise.sum;
    multiply.panels = table.panels;
    multiply.row_scale = table.row_scale;
    multiply.token_idx = kPlaces;
    multiply.y_idx = kPlaces;
    multiply.y = score;
    multiply.num_tokens = num_tokens;
    multiply.num_columns = table.num_columns;
    multiply.group_columns = kGroupColumns;
    multiply.num_planes = kPlanes;
    multiply.num_rows = table.num_rows;
    multiply.panel_end = ceil_div(table.num_rows, kPanelRows);
    kernels().ternary_matmul(multiply);

    // q ends on a multiple of 4 bytes, so floats may follow it.
    auto* rest = reinterpret_cast<std::uint8_t*>(quantise.q) + num_tokens * kPlanes * stride;
    for (std::size_t t = 0; t < num_tokens; ++t) {
        if (is_wide[t] == 0) continue;
        add_rest(table, x + t * table.num_columns, quantise.q + t * kPlanes * stride,
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

void weigh_tiles(const KernelContext& context, const GateRule& rule, std::size_t num_tokens,
                 std::size_t num_tiles, std::size_t top_k, const float* score, const float* bias,
                 const float* log_mass, const std::int64_t* tile_idx, float* weight) {
    const SignatureGateKernel kernel = kernels().signature_gate;
    const auto scale = static_cast<float>(std::sqrt(static_cast<double>(num_tiles)));
    for_token_units(context, num_tokens, [&](std::size_t begin, std::size_t end) {
        SignatureGateJob job{};
        job.score = score;
        job.bias = bias;
        job.log_mass = log_mass;
        job.tile_idx = tile_idx;
        job.weight = weight;
        job.num_tiles = num_tiles;
        job.top_k = top_k;
        job.gate = rule.gate;
        job.scale = scale;
        job.confidence_threshold = rule.confidence_threshold;
        job.token_begin = begin;
        job.token_end = end;
        kernel(job);
    });
}

}  // namespace trix
