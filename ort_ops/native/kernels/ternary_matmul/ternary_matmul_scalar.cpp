// The reference, in plain C++.
#include "kernels/ternary_matmul/token_blocks.hpp"

namespace trix {
namespace {

// dot[row] = sum of q (w + 1) over blocks [begin, end) of a panel.
void dot_group(const std::int8_t* q, const std::uint8_t* panel, std::size_t begin, std::size_t end,
               std::int32_t dot[kPanelRows]) {
    for (std::size_t row = 0; row < kPanelRows; ++row) dot[row] = 0;
    for (std::size_t block = begin; block < end; ++block) {
        const std::uint8_t* bytes = panel + block * kBlockBytes;
        for (std::size_t column = 0; column < kBlockColumns; ++column) {
            const std::int32_t value = q[block * kBlockColumns + column];
            const std::size_t shift = 2 * (column / 4), j = column % 4;
            for (std::size_t row = 0; row < kPanelRows; ++row)
                dot[row] += value * ((bytes[4 * row + j] >> shift) & 3);
        }
    }
}

}  // namespace

void ternary_matmul_scalar(const TernaryMatMulJob& job) {
    const GroupShape shape = group_shape(job);
    for_token_blocks(job, shape, 1, [&](const TokenBlock& token, std::size_t) {
        for (std::size_t panel = job.panel_begin; panel < job.panel_end; ++panel) {
            const std::uint8_t* bytes = job.panels + panel * panel_bytes(job.num_columns);
            float total[kPanelRows] = {};
            for (std::size_t g = 0; g < shape.num_groups; ++g) {
                for (std::size_t p = 0; p < job.num_planes; ++p) {
                    std::int32_t dot[kPanelRows];
                    dot_group(token.q[p], bytes, g * shape.group_blocks, group_end(shape, g), dot);
                    const float scale = token.scale[0][g * job.num_planes + p];
                    const std::int32_t sum = token.sum[0][g * job.num_planes + p];
                    for (std::size_t row = 0; row < kPanelRows; ++row)
                        total[row] += static_cast<float>(dot[row] - sum) * scale;
                }
            }
            for (std::size_t row = 0; row < kPanelRows; ++row) {
                const std::size_t n = panel * kPanelRows + row;
                if (n < job.num_rows) token.y[0][n] = job.row_scale[n] * total[row];
            }
        }
    });
}

}  // namespace trix
