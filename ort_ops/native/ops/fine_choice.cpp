#include "ops/fine_choice.hpp"

#include <algorithm>
#include <atomic>
#include <new>
#include <numeric>

#include "kernels/dispatch.hpp"
#include "kernels/gather_tiles/gather_tiles.hpp"
#include "kernels/near_tiles/near_tiles.hpp"
#include "kernels/score_bound/score_bound.hpp"
#include "kernels/signature_route/signature_route.hpp"
#include "ops/thread_scratch.hpp"

namespace trix {
namespace {

constexpr std::size_t kTokensAtOnce = 64;   // rows of coarse scores held at a time
constexpr std::size_t kWorthGathering = 4;  // gather if fewer than 1/4 of the tiles remain

// Finds the tiles whose key may be among the top_k, in order of index, and returns how many. `found` has room
// for all.
std::size_t candidates(const float* coarse_score, const float* bias, std::size_t num_tiles, std::size_t top_k,
                       double bound, std::int64_t* found) {
    kernels().signature_route({coarse_score, bias, found, num_tiles, top_k, 0, 1});
    const auto last = static_cast<std::size_t>(found[top_k - 1]);
    std::size_t num_found = 0;
    kernels().near_tiles({coarse_score, bias, found, &num_found, bound, last, num_tiles});
    return num_found;
}

// One token's choice among all tiles of the table, by their exact scores.
void choose_among(const TileMatrices& table, const QuantisedRows& fine, std::int64_t token, const float* bias,
                  std::size_t top_k, std::int64_t* tile_idx, float* score) {
    const std::int64_t first_row = 0;
    std::vector<float> exact(table.num_rows);
    TernaryMatMulJob product = product_job(table, fine);
    product.token_idx = &token;
    product.y_idx = &first_row;
    product.y = exact.data();
    product.num_tokens = 1;
    kernels().ternary_matmul(product);
    if (fine.is_wide[static_cast<std::size_t>(token)] != 0) {
        std::vector<std::uint8_t> scratch(rest_bytes(table.num_columns, fine.group_columns, table.num_rows));
        add_rest(table, fine, static_cast<std::size_t>(token), scratch.data(), exact.data());
    }
    kernels().signature_route({exact.data(), bias, tile_idx, table.num_rows, top_k, 0, 1});
    for (std::size_t k = 0; k < top_k; ++k) score[k] = exact[static_cast<std::size_t>(tile_idx[k])];
}

// The same among some of the tiles.
void choose_among(const TileMatrices& table, const std::int64_t* tiles, std::size_t num_tiles,
                  const QuantisedRows& fine, std::int64_t token, const float* bias, std::size_t top_k,
                  std::int64_t* tile_idx, float* score) {
    std::vector<std::uint8_t> panels(ceil_div(num_tiles, kPanelRows) * panel_bytes(table.num_columns));
    std::vector<float> norm(num_tiles), own_bias(num_tiles);
    kernels().gather_tiles({table.panels, table.row_scale, bias, tiles, panels.data(), norm.data(),
                            own_bias.data(), num_tiles, table.num_columns});
    choose_among({panels.data(), norm.data(), num_tiles, table.num_columns}, fine, token, own_bias.data(),
                 top_k, tile_idx, score);
    for (std::size_t k = 0; k < top_k; ++k) tile_idx[k] = tiles[tile_idx[k]];
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
                double bound = 0;
                kernels().score_bound({coarse.scale.data() + t * num_groups,
                                       coarse.squared_rest.data() + t * num_groups, &bound, num_groups,
                                       coarse.group_columns, 0, 1});
                auto* tiles =
                    reinterpret_cast<std::int64_t*>(thread_scratch(num_tiles * sizeof(std::int64_t)));
                if (tiles == nullptr) throw std::bad_alloc();
                const std::size_t num_left =
                    candidates(coarse_score.data() + t * num_tiles, bias, num_tiles, top_k, bound, tiles);
                const auto token = static_cast<std::int64_t>(t);
                const std::size_t place = (begin + t) * top_k;
                if (num_left < num_tiles / kWorthGathering) {
                    choose_among(table, tiles, num_left, fine, token, bias, top_k, tile_idx + place,
                                 score + place);
                } else {
                    choose_among(table, fine, token, bias, top_k, tile_idx + place, score + place);
                }
            } catch (const std::bad_alloc&) {
                is_out_of_memory = true;
            }
        });
        if (is_out_of_memory) throw std::bad_alloc();
    }
}

}  // namespace trix
