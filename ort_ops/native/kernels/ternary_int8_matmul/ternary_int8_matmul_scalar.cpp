// The reference, in plain C++.
#include "kernels/ternary_int8_matmul/ternary_int8_matmul.hpp"

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

void ternary_int8_matmul_scalar(const TernaryInt8MatMulJob& job) {
    const std::size_t num_blocks = ceil_div(job.num_columns, kBlockColumns);
    const std::size_t group_blocks = job.group_columns / kBlockColumns;
    const std::size_t num_groups = ceil_div(num_blocks * kBlockColumns, job.group_columns);
    for (std::size_t panel = job.panel_begin; panel < job.panel_end; ++panel) {
        const std::uint8_t* bytes = job.panels + panel * panel_bytes(job.num_columns);
        for (std::size_t i = 0; i < job.num_tokens; ++i) {
            const auto token = static_cast<std::size_t>(job.token_idx[i]);
            float total[kPanelRows] = {};
            for (std::size_t g = 0; g < num_groups; ++g) {
                const std::size_t begin = g * group_blocks, left = num_blocks - begin;
                std::int32_t dot[kPanelRows];
                dot_group(job.q + token * num_blocks * kBlockColumns, bytes, begin,
                          begin + (left < group_blocks ? left : group_blocks), dot);
                const float scale = job.scale[token * num_groups + g];
                const std::int32_t sum = job.sum[token * num_groups + g];
                for (std::size_t row = 0; row < kPanelRows; ++row)
                    total[row] += static_cast<float>(dot[row] - sum) * scale;
            }
            for (std::size_t row = 0; row < kPanelRows; ++row) {
                const std::size_t n = panel * kPanelRows + row;
                if (n < job.num_rows) job.y[token * job.num_rows + n] = job.row_scale[n] * total[row];
            }
        }
    }
}

}  // namespace trix
