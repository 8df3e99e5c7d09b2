// The reference, in plain C++: a block is decoded once and used for up to four tokens; the loops over 32 rows
// are ones that a compiler vectorises for the baseline of any CPU.
#include "kernels/ternary_tile_matmul/ternary_tile_matmul.hpp"

namespace trix {
namespace {

constexpr std::size_t kTokenBlock = 4;

// Column `column` of a block, for its 32 rows.
void decode_column(const std::uint8_t* block, std::size_t column, float value[kPanelRows]) {
    const std::size_t shift = 2 * (column / 4), j = column % 4;
    for (std::size_t row = 0; row < kPanelRows; ++row)
        value[row] = static_cast<float>(((block[4 * row + j] >> shift) & 3) - 1);
}

void dot_tokens(const float* const* x, std::size_t num_tokens, const std::uint8_t* panel,
                std::size_t num_columns, float dot[kTokenBlock][kPanelRows]) {
    for (std::size_t m = 0; m < num_tokens; ++m) {
        for (std::size_t row = 0; row < kPanelRows; ++row) dot[m][row] = 0.0f;
    }
    for (std::size_t begin = 0; begin < num_columns; begin += kGroupColumns) {
        const std::size_t left = num_columns - begin;
        const std::size_t end = begin + (left < kGroupColumns ? left : kGroupColumns);
        float group[kTokenBlock][kPanelRows] = {};
        for (std::size_t k = begin; k < end; ++k) {
            float value[kPanelRows];
            decode_column(panel + k / kBlockColumns * kBlockBytes, k % kBlockColumns, value);
            for (std::size_t m = 0; m < num_tokens; ++m) {
                for (std::size_t row = 0; row < kPanelRows; ++row) group[m][row] += x[m][k] * value[row];
            }
        }
        for (std::size_t m = 0; m < num_tokens; ++m) {
            for (std::size_t row = 0; row < kPanelRows; ++row) dot[m][row] += group[m][row];
        }
    }
}

}  // namespace

void ternary_tile_matmul_scalar(const TernaryTileMatMulJob& job) {
    for (std::size_t begin = 0; begin < job.num_tokens; begin += kTokenBlock) {
        const std::size_t left = job.num_tokens - begin;
        const std::size_t num_tokens = left < kTokenBlock ? left : kTokenBlock;
        const float* x[kTokenBlock];
        float* y[kTokenBlock];
        for (std::size_t m = 0; m < num_tokens; ++m) {
            const auto token = static_cast<std::size_t>(job.token_idx[begin + m]);
            x[m] = job.x + token * job.num_columns;
            y[m] = job.y + token * job.num_rows;
        }
        for (std::size_t panel = job.panel_begin; panel < job.panel_end; ++panel) {
            float dot[kTokenBlock][kPanelRows];
            dot_tokens(x, num_tokens, job.panels + panel * panel_bytes(job.num_columns), job.num_columns,
                       dot);
            for (std::size_t m = 0; m < num_tokens; ++m) {
                for (std::size_t row = 0; row < kPanelRows; ++row) {
                    const std::size_t n = panel * kPanelRows + row;
                    if (n < job.num_rows) y[m][n] = job.row_scale[n] * dot[m][row];
                }
            }
        }
    }
}

}  // namespace trix
