// How a routed product is cut into independent pieces: tokens grouped by tile, then blocks of tokens x rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace trix {

/// Token indices sorted by tile (stable: order of index within a tile). Tile e owns order[begin[e] .. begin[e
/// + 1]).
struct TokenGroups {
    std::vector<std::int64_t> order;
    std::vector<std::size_t> begin;
};

/// Counting sort of tokens by tile, O(T + E). Every tile_idx must lie in [0, num_tiles).
TokenGroups group_tokens(const std::int64_t* tile_idx, std::size_t num_tokens, std::size_t num_tiles);

/// Panels [panel_begin, panel_end) of one tile for the tokens order[token_begin .. token_end).
struct WorkUnit {
    std::size_t tile;
    std::size_t token_begin;
    std::size_t token_end;
    std::size_t panel_begin;
    std::size_t panel_end;
};

/// Units that together cover every (token, panel) once, each of at most
/// 64 tokens and about 2 million multiply-adds of int8. Every sum is
/// computed inside one unit, so results do not depend on how the units are spread over threads.
std::vector<WorkUnit> plan_units(const TokenGroups& groups, std::size_t num_rows, std::size_t num_columns,
                                 std::size_t num_planes);

}  // namespace trix
