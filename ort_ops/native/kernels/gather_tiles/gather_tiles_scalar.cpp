#include <cstring>

#include "kernels/gather_tiles/gather_tiles.hpp"

namespace trix {

void gather_tiles_scalar(const GatherTilesJob& job) {
    constexpr std::size_t kRowBytes = kBlockBytes / kPanelRows;
    const std::size_t stride = panel_bytes(job.num_columns);
    const std::size_t num_bytes = ceil_div(job.count, kPanelRows) * stride;
    if (num_bytes > 0) std::memset(job.to_panels, kZeroCodes, num_bytes);
    for (std::size_t i = 0; i < job.count; ++i) {
        const auto tile = static_cast<std::size_t>(job.tile_idx[i]);
        const std::uint8_t* from = job.panels + tile / kPanelRows * stride + tile % kPanelRows * kRowBytes;
        std::uint8_t* to = job.to_panels + i / kPanelRows * stride + i % kPanelRows * kRowBytes;
        for (std::size_t place = 0; place < stride; place += kBlockBytes)
            std::memcpy(to + place, from + place, kRowBytes);
        job.to_row_scale[i] = job.row_scale[tile];
        job.to_bias[i] = job.bias[tile];
    }
}

}  // namespace trix
