#include "ops/tile_product.hpp"

#include <algorithm>
#include <cstring>

#include "kernels/dispatch.hpp"

namespace trix {
namespace {

constexpr std::size_t kRowsPerUnit = 8;  // of quantising

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

}  // namespace

Activations::Activations(const KernelInfo& info)
    : bits_(info.int_attribute(kBitsAttribute, kBitsDefault)),
      group_size_(info.int_attribute(kGroupAttribute, kGroupDefault)) {
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
}

}  // namespace trix
