#include "ops/tile_product.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>

#include "kernels/add_vectors/add_vectors.hpp"
#include "kernels/dispatch.hpp"
#include "kernels/row_rest/row_rest.hpp"
#include "kernels/squared_relu/squared_relu.hpp"
#include "ops/thread_scratch.hpp"

namespace trix {
namespace {

constexpr std::size_t kRowsPerUnit = 8;  // of quantising

TernaryMatMulJob make_product_job(const TileMatrices& tile, const std::int8_t* q, const float* scale,
                                  const std::int32_t* sum, std::size_t group_columns,
                                  std::size_t num_planes) {
    TernaryMatMulJob job{};
    job.q = q;
    job.scale = scale;
    job.sum = sum;
    job.panels = tile.panels;
    job.row_scale = tile.row_scale;
    job.num_columns = tile.num_columns;
    job.group_columns = group_columns;
    job.num_planes = num_planes;
    job.num_rows = tile.num_rows;
    job.panel_end = ceil_div(tile.num_rows, kPanelRows);
    return job;
}

// Tile number `tile` of the matrices.
TileMatrices one_tile(const TileMatrices& tiles, std::size_t tile) {
    const std::size_t tile_bytes = ceil_div(tiles.num_rows, kPanelRows) * panel_bytes(tiles.num_columns);
    return {tiles.panels + tile * tile_bytes, tiles.row_scale + tile * tiles.num_rows, tiles.num_rows,
            tiles.num_columns};
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
                         std::vector<std::uint8_t>(num_planes == kFinePlanes ? num_rows : 0),
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
        job.min_magnitude = activations.min_magnitude();
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
    std::atomic<bool> has_memory{true};
    context.parallel_for(wide.size(), [&](std::size_t i) noexcept {
        std::uint8_t* scratch = thread_scratch(num_bytes);
        if (scratch == nullptr) {
            has_memory = false;
            return;
        }
        const auto [tile, token, row] = wide[i];
        add_rest(one_tile(tiles, tile), x, token, scratch, y + row * tiles.num_rows);
    });
    if (!has_memory) throw std::bad_alloc();
}

}  // namespace

Activations::Activations(const KernelInfo& info)
    : bits_(info.int_attribute(kBitsAttribute, kBitsDefault)),
      group_size_(info.int_attribute(kGroupAttribute, kGroupDefault)),
      min_magnitude_(info.float_attribute(kMinMagnitudeAttribute, kMinMagnitudeDefault)),
      wide_rule_(kWideForProducts) {
    if (bits_ != 24 && bits_ != 8) reject(kBitsAttribute, " (", bits_, ") must be 24 or 8");
    const auto group = static_cast<std::int64_t>(kGroupColumns);
    if (group_size_ != 0 && group_size_ != group)
        reject(kGroupAttribute, " (", group_size_, ") must be 0 or ", group);
    if (!(min_magnitude_ >= 0.0f) || std::isinf(min_magnitude_))
        reject(kMinMagnitudeAttribute, " (", min_magnitude_, ") must be >= 0 and finite");
    if (min_magnitude_ > 0.0f && bits_ != 8) {
        reject(kMinMagnitudeAttribute, " (", min_magnitude_, ") must be 0 with ", kBitsAttribute, " ", bits_);
    }
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
    return quantise_prepared(
        context, activations, x, num_rows, num_columns, false, [&](std::size_t first, std::size_t count) {
            kernels().squared_relu({x, first * num_columns, (first + count) * num_columns});
        });
}

TernaryMatMulJob product_job(const TileMatrices& tile, const QuantisedRows& rows) {
    return make_product_job(tile, rows.q.data(), rows.scale.data(), rows.sum.data(), rows.group_columns,
                            rows.num_planes);
}

TernaryMatMulJob product_job(const TileMatrices& tile, const QuantizeRowsJob& rows) {
    return make_product_job(tile, rows.q, rows.scale, rows.sum, rows.group_columns, rows.num_planes);
}

std::size_t plane_bytes(std::size_t num_rows, std::size_t num_columns, std::size_t group_columns) {
    const std::size_t stride = ceil_div(num_columns, kBlockColumns) * kBlockColumns;
    const std::size_t scale_bytes = ceil_div(stride, group_columns) * (sizeof(float) + sizeof(std::int32_t));
    return num_rows * kFinePlanes * (stride + scale_bytes);
}

QuantizeRowsJob plane_job(std::uint8_t* scratch, std::size_t num_rows, std::size_t num_columns,
                          std::size_t group_columns) {
    const std::size_t stride = ceil_div(num_columns, kBlockColumns) * kBlockColumns;
    const std::size_t num_scales = num_rows * ceil_div(stride, group_columns) * kFinePlanes;
    QuantizeRowsJob job{};
    job.scale = reinterpret_cast<float*>(scratch);
    job.sum = reinterpret_cast<std::int32_t*>(job.scale + num_scales);
    job.q = reinterpret_cast<std::int8_t*>(job.sum + num_scales);
    job.num_columns = num_columns;
    job.group_columns = group_columns;
    job.num_planes = kFinePlanes;
    job.row_end = num_rows;
    return job;
}

std::size_t rest_bytes(std::size_t num_columns, std::size_t group_columns, std::size_t num_rows) {
    return (num_columns + num_rows) * sizeof(float) + plane_bytes(1, num_columns, group_columns);
}

void add_rest(const TileMatrices& tile, const float* x, const std::int8_t* q, const float* scale,
              std::size_t group_columns, std::uint8_t* scratch, float* y) noexcept {
    const std::int64_t only = 0;
    float* rest = reinterpret_cast<float*>(scratch);
    float* part = rest + tile.num_columns;
    QuantizeRowsJob quantise =
        plane_job(reinterpret_cast<std::uint8_t*>(part + tile.num_rows), 1, tile.num_columns, group_columns);
    quantise.x = rest;
    TernaryMatMulJob multiply = product_job(tile, quantise);
    multiply.token_idx = &only;
    multiply.y_idx = &only;
    multiply.y = part;
    multiply.num_tokens = 1;

    std::copy_n(x, tile.num_columns, rest);
    bool has_rest = false;
    while (true) {
        kernels().row_rest({x, q, scale, rest, &has_rest, tile.num_columns, group_columns});
        if (!has_rest) return;
        kernels().quantize_rows(quantise);
        kernels().ternary_matmul(multiply);
        kernels().add_vectors({part, y, tile.num_rows});
        q = quantise.q;
        scale = quantise.scale;
    }
}

void add_rest(const TileMatrices& tile, const QuantisedRows& x, std::size_t token, std::uint8_t* scratch,
              float* y) noexcept {
    const std::size_t stride = ceil_div(tile.num_columns, kBlockColumns) * kBlockColumns;
    const std::size_t num_scales = ceil_div(stride, x.group_columns) * kFinePlanes;
    add_rest(tile, x.x + token * tile.num_columns, x.q.data() + token * kFinePlanes * stride,
             x.scale.data() + token * num_scales, x.group_columns, scratch, y);
}

void multiply_tiles(const KernelContext& context, const QuantisedRows& x, const TileMatrices& tiles,
                    const TokenGroups& groups, const std::int64_t* token_idx, const std::int64_t* y_idx,
                    float* y) {
    const std::vector<WorkUnit> units = plan_units(groups, tiles.num_rows, tiles.num_columns, x.num_planes);
    const TernaryMatMulKernel kernel = kernels().ternary_matmul;
    context.parallel_for(units.size(), [&](std::size_t i) noexcept {
        const WorkUnit& unit = units[i];
        TernaryMatMulJob job = product_job(one_tile(tiles, unit.tile), x);
        job.token_idx = token_idx + unit.token_begin;
        job.y_idx = y_idx + unit.token_begin;
        job.y = y;
        job.num_tokens = unit.token_end - unit.token_begin;
        job.panel_begin = unit.panel_begin;
        job.panel_end = unit.panel_end;
        kernel(job);
    });
    add_rests(context, x, tiles, groups, token_idx, y_idx, y);
}

}  // namespace trix
