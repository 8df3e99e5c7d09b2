#include "kernels/work_plan.hpp"

#include <algorithm>

#include "kernels/ternary_panels.hpp"

namespace trix {
namespace {

constexpr std::size_t kTokensPerUnit = 64;
constexpr std::size_t kProductsPerUnit = std::size_t{1} << 21;

std::size_t panels_per_unit(std::size_t num_rows, std::size_t num_columns) {
    const std::size_t products_per_panel = kPanelRows * std::max<std::size_t>(num_rows * num_columns, 1);
    return std::max(kProductsPerUnit / products_per_panel, std::size_t{1});
}

}  // namespace

TokenGroups group_tokens(const std::int64_t* tile_idx, std::size_t num_tokens, std::size_t num_tiles) {
    TokenGroups groups{std::vector<std::int64_t>(num_tokens), std::vector<std::size_t>(num_tiles + 1, 0)};
    for (std::size_t t = 0; t < num_tokens; ++t) ++groups.begin[static_cast<std::size_t>(tile_idx[t]) + 1];
    for (std::size_t e = 0; e < num_tiles; ++e) groups.begin[e + 1] += groups.begin[e];
    std::vector<std::size_t> next = groups.begin;
    for (std::size_t t = 0; t < num_tokens; ++t) {
        groups.order[next[static_cast<std::size_t>(tile_idx[t])]++] = static_cast<std::int64_t>(t);
    }
    return groups;
}

std::vector<WorkUnit> plan_units(const TokenGroups& groups, std::size_t num_rows, std::size_t num_columns,
                                 std::size_t num_planes) {
    const std::size_t num_panels = ceil_div(num_rows, kPanelRows);
    std::vector<WorkUnit> units;
    for (std::size_t tile = 0; tile + 1 < groups.begin.size(); ++tile) {
        for (std::size_t token = groups.begin[tile]; token < groups.begin[tile + 1];
             token += kTokensPerUnit) {
            const std::size_t token_end = std::min(token + kTokensPerUnit, groups.begin[tile + 1]);
            const std::size_t step = panels_per_unit((token_end - token) * num_planes, num_columns);
            for (std::size_t panel = 0; panel < num_panels; panel += step) {
                units.push_back({tile, token, token_end, panel, std::min(panel + step, num_panels)});
            }
        }
    }
    return units;
}

}  // namespace trix
