#include "ops/fine_choice.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>
#include <numeric>

#include "kernels/dispatch.hpp"

namespace trix {
namespace {

constexpr std::size_t kTokensAtOnce = 64;   // so many rows of coarse scores are held
constexpr std::uint8_t kZeroCodes = 0x55;   // 01 01 01 01
constexpr std::size_t kWorthGathering = 4;  // the share of the tiles, one of so many
constexpr double kLargest = 0x1p120;        // far from where float32 ends
constexpr std::size_t kRowBytes = kBlockBytes / kPanelRows;

// The share of a sum over groups that float32 may round away, and 24 bits with it.
double rounding(std::size_t num_groups) {
    return 0x1p-16 + static_cast<double>(num_groups) * 0x1p-21;
}

// |x - x'| of row `token` of `coarse`, and what float32 may round away on the way to a score: infinity where
// x is so large that a sum may leave float32, NaN unless it is finite.
double error_bound(const QuantisedRows& coarse, std::size_t token, std::size_t num_groups) {
    constexpr double kLargestQ = 127;
    double error = 0, length = 0;
    for (std::size_t g = 0; g < num_groups; ++g) {
        const auto scale = static_cast<double>(coarse.scale[token * num_groups + g]);
        error += static_cast<double>(coarse.squared_rest[token * num_groups + g]) * scale * scale;
        length += static_cast<double>(coarse.group_columns) * kLargestQ * kLargestQ * scale * scale;
    }
    const auto num_columns = static_cast<double>(num_groups * coarse.group_columns);
    if (std::sqrt(length * num_columns) > kLargest) return HUGE_VAL;
    return std::sqrt(error) + std::sqrt(length) * rounding(num_groups);
}

// Rows `tiles` of the panels, in panels of their own.
void gather_rows(const TileMatrices& table, const std::vector<std::int64_t>& tiles, std::uint8_t* panels) {
    const std::size_t stride = panel_bytes(table.num_columns);
    for (std::size_t i = 0; i < tiles.size(); ++i) {
        const auto tile = static_cast<std::size_t>(tiles[i]);
        const std::uint8_t* from = table.panels + tile / kPanelRows * stride + tile % kPanelRows * kRowBytes;
        std::uint8_t* to = panels + i / kPanelRows * stride + i % kPanelRows * kRowBytes;
        for (std::size_t place = 0; place < stride; place += kBlockBytes)
            std::memcpy(to + place, from + place, kRowBytes);
    }
}

// The tiles whose key may be among the top_k, in order of index; all of them where they are many.
std::vector<std::int64_t> candidates(const float* coarse_score, const float* bias, std::size_t num_tiles,
                                     std::size_t top_k, double bound) {
    std::vector<std::int64_t> best(top_k), found;
    SignatureRouteJob job{};
    job.score = coarse_score;
    job.bias = bias;
    job.tile_idx = best.data();
    job.num_tiles = num_tiles;
    job.top_k = top_k;
    job.token_end = 1;
    kernels().signature_route(job);
    const auto last = static_cast<std::size_t>(best.back());
    const auto key = static_cast<double>(coarse_score[last] + bias[last]);
    // Rounded down. NaN, and a key that may have left float32, let every tile in.
    const double lowest = std::abs(key) < kLargest ? key - 2 * (bound + std::abs(key) * 0x1p-20) : -HUGE_VAL;
    const float floor = std::nextafter(static_cast<float>(lowest), -HUGE_VALF);
    for (std::size_t tile = 0; tile < num_tiles; ++tile) {
        if (!(coarse_score[tile] + bias[tile] < floor)) found.push_back(static_cast<std::int64_t>(tile));
    }
    if (found.size() < num_tiles / kWorthGathering) return found;
    found.resize(num_tiles);
    std::iota(found.begin(), found.end(), std::int64_t{0});
    return found;
}

// One token's choice among the candidates, by their exact scores.
void choose_among(const TileMatrices& table, const std::vector<std::int64_t>& tiles,
                  const QuantisedRows& fine, std::int64_t token, const float* bias, std::size_t top_k,
                  std::int64_t* tile_idx, float* score) {
    const std::size_t count = tiles.size(), num_panels = ceil_div(count, kPanelRows);
    std::vector<std::uint8_t> gathered;
    if (count < table.num_rows) {
        gathered.assign(num_panels * panel_bytes(table.num_columns), kZeroCodes);
        gather_rows(table, tiles, gathered.data());
    }
    std::vector<float> norm(count), own_bias(count), exact(count);
    for (std::size_t i = 0; i < count; ++i) {
        norm[i] = table.row_scale[tiles[i]];
        own_bias[i] = bias[tiles[i]];
    }
    const std::int64_t first_row = 0;
    TernaryMatMulJob product{};
    product.q = fine.q.data();
    product.scale = fine.scale.data();
    product.sum = fine.sum.data();
    product.panels = gathered.empty() ? table.panels : gathered.data();
    product.row_scale = norm.data();
    product.token_idx = &token;
    product.y_idx = &first_row;
    product.y = exact.data();
    product.num_tokens = 1;
    product.num_columns = table.num_columns;
    product.group_columns = fine.group_columns;
    product.num_planes = fine.num_planes;
    product.num_rows = count;
    product.panel_end = num_panels;
    kernels().ternary_matmul(product);
    if (fine.is_wide[static_cast<std::size_t>(token)] != 0) {
        std::vector<std::uint8_t> scratch(rest_bytes(table.num_columns, fine.group_columns, count));
        add_rest({product.panels, norm.data(), count, table.num_columns}, fine,
                 static_cast<std::size_t>(token), scratch.data(), exact.data());
    }

    SignatureRouteJob choice{};
    choice.score = exact.data();
    choice.bias = own_bias.data();
    choice.tile_idx = tile_idx;
    choice.num_tiles = count;
    choice.top_k = top_k;
    choice.token_end = 1;
    kernels().signature_route(choice);
    for (std::size_t k = 0; k < top_k; ++k) {
        const auto place = static_cast<std::size_t>(tile_idx[k]);
        score[k] = exact[place];
        tile_idx[k] = tiles[place];
    }
}

}  // namespace

void choose_fine(const KernelContext& context, const TileMatrices& table, const float* x,
                 std::size_t num_tokens, const float* bias, std::size_t top_k, std::int64_t* tile_idx,
                 float* score) {
    const std::size_t num_tiles = table.num_rows, num_columns = table.num_columns;
    std::vector<float> coarse_score(std::min(num_tokens, kTokensAtOnce) * num_tiles);
    for (std::size_t begin = 0; begin < num_tokens; begin += kTokensAtOnce) {
        const std::size_t count = std::min(kTokensAtOnce, num_tokens - begin);
        const float* rows = x + begin * num_columns;
        const QuantisedRows coarse = quantise(context, Activations(8), rows, count, num_columns, true);
        const QuantisedRows fine = quantise(context, Activations(), rows, count, num_columns);
        const std::size_t num_groups = coarse.scale.size() / count;
        TokenGroups all{std::vector<std::int64_t>(count), {0, count}};
        std::iota(all.order.begin(), all.order.end(), std::int64_t{0});
        multiply_tiles(context, coarse, table, all, all.order.data(), all.order.data(), coarse_score.data());
        std::atomic<bool> is_out_of_memory{false};
        context.parallel_for(count, [&](std::size_t t) noexcept {
            try {
                const double bound = error_bound(coarse, t, num_groups);
                const std::vector<std::int64_t> tiles =
                    candidates(coarse_score.data() + t * num_tiles, bias, num_tiles, top_k, bound);
                const std::size_t place = (begin + t) * top_k;
                choose_among(table, tiles, fine, static_cast<std::int64_t>(t), bias, top_k, tile_idx + place,
                             score + place);
            } catch (const std::bad_alloc&) {
                is_out_of_memory = true;
            }
        });
        if (is_out_of_memory) throw std::bad_alloc();
    }
}

}  // namespace trix
