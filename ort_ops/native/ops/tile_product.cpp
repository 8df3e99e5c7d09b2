#include "ops/tile_product.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>

#include "kernels/dispatch.hpp"
#include "kernels/quantize_rows/row_rest.hpp"
#include "ops/thread_scratch.hpp"

namespace trix {
namespace {

constexpr std::size_t kRowsPerUnit = 8;  // of quantising
constexpr std::size_t kPlanes = 3;       // of activations of 24 bits

// relu(x)^2; NaN stays. On bits, as compilers make a branch of a comparison, which random signs make slow.
void activate(float* x, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
        std::int32_t bits;
        std::memcpy(&bits, x + i, sizeof(bits));
        const std::int32_t is_nan = -static_cast<std::int32_t>((bits & 0x7fffffff) > 0x7f800000);
        bits &= ~(bits >> 31) | is_nan;
        float positive;
        std::memcpy(&positive, &bits, sizeof(positive));
        x[i] = positive * positive;
    }
}

// Calls prepare(first, count) for the rows before they are read, while they are in the cache.
template <typename Prepare>
QuantisedRows quantise_prepared(const KernelContext& context, const Activations& activations, const float* x,
                                std::size_t num_rows, std::size_t num_columns, bool with_rest,
                                const Prepare& prepare) {
    const std::size_t stride = ceil_div(num_columns, kBlockColumns) * kBlockColumns;
    const std::size_t group_columns = activations.group_columns(num_columns),
                      num_planes = activations.num_planes();
    const std::size_t num_scales = num_rows * ceil_div(stride, group_columns) * num_planes;
    QuantisedRows result{std::vector<std::int8_t>(num_rows * num_planes * stride),
                         std::vector<float>(num_scales),
                         std::vector<std::int32_t>(num_scales),
                         std::vector<float>(with_rest ? num_scales : 0),
                         std::vector<std::uint8_t>(num_planes == kPlanes ? num_rows : 0),
                         x,
                         group_columns,
                         num_planes};
    const QuantizeRowsKernel kernel = kernels().quantize_rows;
    context.parallel_for(ceil_div(num_rows, kRowsPerUnit), [&](std::size_t unit) noexcept {
        QuantizeRowsJob job{};
        job.x = x;
        job.q = result.q.data();
        job.scale = result.scale.data();
        job.sum = result.sum.data();
        job.squared_rest = with_rest ? result.squared_rest.data() : nullptr;
        job.is_wide = result.is_wide.empty() ? nullptr : result.is_wide.data();
        job.wide_rule = activations.wide_rule();
        job.num_columns = num_columns;
        job.group_columns = group_columns;
        job.num_planes = num_planes;
        job.row_begin = unit * kRowsPerUnit;
        job.row_end = std::min(job.row_begin + kRowsPerUnit, num_rows);
        prepare(job.row_begin, job.row_end - job.row_begin);
        kernel(job);
    });
    return result;
}

// The tokens whose 24 bits are too few, one after the other: there are few of them.
void add_rests(const KernelContext& context, const QuantisedRows& x, const TileMatrices& tiles,
               const TokenGroups& groups, const std::int64_t* token_idx, const std::int64_t* y_idx,
               float* y) {
    if (std::find(x.is_wide.begin(), x.is_wide.end(), 1) == x.is_wide.end()) return;
    struct WideToken {
        std::size_t tile, token, row;
    };
    std::vector<WideToken> wide;
    for (std::size_t tile = 0; tile + 1 < groups.begin.size(); ++tile) {
        for (std::size_t i = groups.begin[tile]; i < groups.begin[tile + 1]; ++i) {
            const auto token = static_cast<std::size_t>(token_idx[i]);
            if (x.is_wide[token] != 0) wide.push_back({tile, token, static_cast<std::size_t>(y_idx[i])});
        }
    }
    const std::size_t num_bytes = rest_bytes(tiles.num_columns, x.group_columns, tiles.num_rows);
    const std::size_t tile_bytes = ceil_div(tiles.num_rows, kPanelRows) * panel_bytes(tiles.num_columns);
    std::atomic<bool> has_memory{true};
    context.parallel_for(wide.size(), [&](std::size_t i) noexcept {
        std::uint8_t* scratch = thread_scratch(num_bytes);
        if (scratch == nullptr) {
            has_memory = false;
            return;
        }
        const auto [tile, token, row] = wide[i];
        const TileMatrices one{tiles.panels + tile * tile_bytes, tiles.row_scale + tile * tiles.num_rows,
                               tiles.num_rows, tiles.num_columns};
        add_rest(one, x, token, scratch, y + row * tiles.num_rows);
    });
    if (!has_memory) throw std::bad_alloc();
}

}  // namespace

Activations::Activations(const KernelInfo& info)
    : bits_(info.int_attribute(kBitsAttribute, kBitsDefault)),
      group_size_(info.int_attribute(kGroupAttribute, kGroupDefault)),
      wide_rule_(kWideForProducts) {
    if (bits_ != 24 && bits_ != 8) reject(kBitsAttribute, " (", bits_, ") must be 24 or 8");
    const auto group = static_cast<std::int64_t>(kGroupColumns);
    if (group_size_ != 0 && group_size_ != group)
        reject(kGroupAttribute, " (", group_size_, ") must be 0 or ", group);
}

std::size_t Activations::group_columns(std::size_t num_columns) const {
    if (group_size_ != 0) return kGroupColumns;
    return std::max(ceil_div(num_columns, kBlockColumns), std::size_t{1}) * kBlockColumns;
}

void check_columns(const char* what, std::int64_t num_columns) {
    if (num_columns > static_cast<std::int64_t>(kMaxColumns)) {
        reject("columns of ", what, " (", num_columns, ") must be <= ", kMaxColumns);
    }
}

QuantisedRows quantise(const KernelContext& context, const Activations& activations, const float* x,
                       std::size_t num_rows, std::size_t num_columns, bool with_rest) {
    return quantise_prepared(context, activations, x, num_rows, num_columns, with_rest,
                             [](std::size_t, std::size_t) {});
}

QuantisedRows quantise_activated(const KernelContext& context, const Activations& activations, float* x,
                                 std::size_t num_rows, std::size_t num_columns) {
    return quantise_prepared(context, activations, x, num_rows, num_columns, false,
                             [&](std::size_t first, std::size_t count) {
                                 activate(x + first * num_columns, count * num_columns);
                             });
}

std::size_t rest_bytes(std::size_t num_columns, std::size_t group_columns, std::size_t num_rows) {
    const std::size_t stride = ceil_div(num_columns, kBlockColumns) * kBlockColumns;
    const std::size_t num_scales = ceil_div(stride, group_columns) * kPlanes;
    return (num_columns + num_rows + 2 * num_scales) * sizeof(float) + kPlanes * stride;
}

void add_rest(const TileMatrices& tile, const float* x, const std::int8_t* q, const float* scale,
              std::size_t group_columns, std::uint8_t* scratch, float* y) noexcept {
    const std::size_t stride = ceil_div(tile.num_columns, kBlockColumns) * kBlockColumns;
    const std::int64_t only = 0;
    float* rest = reinterpret_cast<float*>(scratch);
    QuantizeRowsJob quantise{};
    quantise.x = rest;
    quantise.scale = rest + tile.num_columns;
    const std::size_t num_scales = ceil_div(stride, group_columns) * kPlanes;
    quantise.sum = reinterpret_cast<std::int32_t*>(quantise.scale + num_scales);
    float* part = reinterpret_cast<float*>(quantise.sum + num_scales);
    quantise.q = reinterpret_cast<std::int8_t*>(part + tile.num_rows);
    quantise.num_columns = tile.num_columns;
    quantise.group_columns = group_columns;
    quantise.num_planes = kPlanes;
    quantise.row_end = 1;

    TernaryMatMulJob multiply{};
    multiply.q = quantise.q;
    multiply.scale = quantise.scale;
    multiply.sum = quantise.sum;
    multiply.panels = tile.panels;
    multiply.row_scale = tile.row_scale;
    multiply.token_idx = &only;
    multiply.y_idx = &only;
    multiply.y = part;
    multiply.num_tokens = 1;
    multiply.num_columns = tile.num_columns;
    multiply.group_columns = group_columns;
    multiply.num_planes = kPlanes;
    multiply.num_rows = tile.num_rows;
    multiply.panel_end = ceil_div(tile.num_rows, kPanelRows);

    std::copy_n(x, tile.num_columns, rest);
    while (take_from_rest(x, q, scale, tile.num_columns, group_columns, rest)) {
        kernels().quantize_rows(quantise);
        kernels().ternary_matmul(multiply);
        for (std::size_t n = 0; n < tile.num_rows; ++n) y[n] += part[n];
        q = quantise.q;
        scale = quantise.scale;
    }
}

void add_rest(const TileMatrices& tile, const QuantisedRows& x, std::size_t token, std::uint8_t* scratch,
              float* y) noexcept {
    const std::size_t stride = ceil_div(tile.num_columns, kBlockColumns) * kBlockColumns;
    const std::size_t num_scales = ceil_div(stride, x.group_columns) * kPlanes;
    add_rest(tile, x.x + token * tile.num_columns, x.q.data() + token * kPlanes * stride,
             x.scale.data() + token * num_scales, x.group_columns, scratch, y);
}

void multiply_tiles(const KernelContext& context, const QuantisedRows& x, const TileMatrices& tiles,
                    const TokenGroups& groups, const std::int64_t* token_idx, const std::int64_t* y_idx,
                    float* y) {
    const std::size_t tile_bytes = ceil_div(tiles.num_rows, kPanelRows) * panel_bytes(tiles.num_columns);
    const std::vector<WorkUnit> units = plan_units(groups, tiles.num_rows, tiles.num_columns, x.num_planes);
    const TernaryMatMulKernel kernel = kernels().ternary_matmul;
    context.parallel_for(units.size(), [&](std::size_t i) noexcept {
        const WorkUnit& unit = units[i];
        TernaryMatMulJob job{};
        job.q = x.q.data();
        job.scale = x.scale.data();
        job.sum = x.sum.data();
        job.panels = tiles.panels + unit.tile * tile_bytes;
        job.row_scale = tiles.row_scale + unit.tile * tiles.num_rows;
        job.token_idx = token_idx + unit.token_begin;
        job.y_idx = y_idx + unit.token_begin;
        job.y = y;
        job.num_tokens = unit.token_end - unit.token_begin;
        job.num_columns = tiles.num_columns;
        job.group_columns = x.group_columns;
        job.num_planes = x.num_planes;
        job.num_rows = tiles.num_rows;
        job.panel_begin = unit.panel_begin;
        job.panel_end = unit.panel_end;
        kernel(job);
    });
    add_rests(context, x, tiles, groups, token_idx, y_idx, y);
}

}  // namespace trix
