#include "ops/tile_product.hpp"

#include <algorithm>

#include "kernels/dispatch.hpp"

namespace trix {
namespace {

constexpr std::size_t kRowsPerUnit = 8;  // of quantising

struct Quantised {
    std::vector<std::int8_t> q;
    std::vector<float> scale;
    std::vector<std::int32_t> sum;
};

Quantised quantise(const KernelContext& context, const float* x, std::size_t num_tokens,
                   std::size_t num_columns, std::size_t group_columns, std::size_t num_planes) {
    const std::size_t stride = ceil_div(num_columns, kBlockColumns) * kBlockColumns;
    const std::size_t num_scales = num_tokens * ceil_div(stride, group_columns) * num_planes;
    Quantised result{std::vector<std::int8_t>(num_tokens * num_planes * stride),
                     std::vector<float>(num_scales), std::vector<std::int32_t>(num_scales)};
    const QuantizeRowsKernel kernel = kernels().quantize_rows;
    context.parallel_for(ceil_div(num_tokens, kRowsPerUnit), [&](std::size_t unit) noexcept {
        QuantizeRowsJob job{};
        job.x = x;
        job.q = result.q.data();
        job.scale = result.scale.data();
        job.sum = result.sum.data();
        job.num_columns = num_columns;
        job.group_columns = group_columns;
        job.num_planes = num_planes;
        job.row_begin = unit * kRowsPerUnit;
        job.row_end = std::min(job.row_begin + kRowsPerUnit, num_tokens);
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

void check_columns(const TensorView& x) {
    if (x.size(1) > kMaxColumns) reject("columns of x (", x.dim(1), ") must be <= ", kMaxColumns);
}

void multiply_tiles(const KernelContext& context, const Activations& activations, const float* x,
                    std::size_t num_tokens, const TileMatrices& tiles, const TokenGroups& groups, float* y) {
    const std::size_t group_columns = activations.group_columns(tiles.num_columns);
    const std::size_t num_planes = activations.num_planes();
    const Quantised rows = quantise(context, x, num_tokens, tiles.num_columns, group_columns, num_planes);
    const std::size_t tile_bytes = ceil_div(tiles.num_rows, kPanelRows) * panel_bytes(tiles.num_columns);
    const std::vector<WorkUnit> units = plan_units(groups, tiles.num_rows, tiles.num_columns, num_planes);
    const TernaryMatMulKernel kernel = kernels().ternary_matmul;
    context.parallel_for(units.size(), [&](std::size_t i) noexcept {
        const WorkUnit& unit = units[i];
        TernaryMatMulJob job{};
        job.q = rows.q.data();
        job.scale = rows.scale.data();
        job.sum = rows.sum.data();
        job.panels = tiles.panels + unit.tile * tile_bytes;
        job.row_scale = tiles.row_scale + unit.tile * tiles.num_rows;
        job.token_idx = groups.order.data() + unit.token_begin;
        job.y = y;
        job.num_tokens = unit.token_end - unit.token_begin;
        job.num_columns = tiles.num_columns;
        job.group_columns = group_columns;
        job.num_planes = num_planes;
        job.num_rows = tiles.num_rows;
        job.panel_begin = unit.panel_begin;
        job.panel_end = unit.panel_end;
        kernel(job);
    });
}

}  // namespace trix
