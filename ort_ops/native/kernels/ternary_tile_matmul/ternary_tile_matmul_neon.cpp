// NEON, the baseline of AArch64: 4 rows stand in a vector. The code of one column is brought to the lowest
// bits of every lane and becomes a float; the weights then serve all tokens of the block.
#include <arm_neon.h>

#include "kernels/ternary_tile_matmul/ternary_tile_matmul.hpp"

namespace trix {
namespace {

constexpr std::size_t kVectorRows = 4;
constexpr std::size_t kVectorBytes = 16;
constexpr std::size_t kPanelVectors = kPanelRows / kVectorRows;
constexpr std::size_t kVectors = 4;
constexpr std::size_t kMaxTokens = 4;

struct Tokens {
    const float* x[kMaxTokens];
    float* y[kMaxTokens];
};

// Rows [row, row + 4) of y, as far as there are so many.
inline void store_rows(const TernaryTileMatMulJob& job, float* y, std::size_t row, float32x4_t total) {
    if (row + kVectorRows <= job.num_rows) {
        vst1q_f32(y + row, vmulq_f32(vld1q_f32(job.row_scale + row), total));
        return;
    }
    float lane[kVectorRows];
    vst1q_f32(lane, total);
    for (std::size_t i = 0; row + i < job.num_rows; ++i) y[row + i] = job.row_scale[row + i] * lane[i];
}

template <std::size_t kTokens>
void multiply_vectors(const TernaryTileMatMulJob& job, const Tokens& tokens, const std::uint8_t* bytes,
                      std::size_t row) {
    float32x4_t total[kVectors][kTokens];
    for (auto& of_vector : total) {
        for (auto& value : of_vector) value = vdupq_n_f32(0.0f);
    }
    for (std::size_t begin = 0; begin < job.num_columns; begin += kGroupColumns) {
        float32x4_t group[kVectors][kTokens];
        for (auto& of_vector : group) {
            for (auto& value : of_vector) value = vdupq_n_f32(0.0f);
        }
        const std::size_t left = job.num_columns - begin;
        const std::size_t end = begin + (left < kGroupColumns ? left : kGroupColumns);
        for (std::size_t k = begin; k < end; ++k) {
            const std::size_t column = k % kBlockColumns;
            const int32x4_t shift = vdupq_n_s32(-static_cast<int>(8 * (column % 4) + 2 * (column / 4)));
            for (std::size_t v = 0; v < kVectors; ++v) {
                const std::uint8_t* codes = bytes + k / kBlockColumns * kBlockBytes + v * kVectorBytes;
                const uint32x4_t moved = vshlq_u32(vreinterpretq_u32_u8(vld1q_u8(codes)), shift);
                const int32x4_t code = vreinterpretq_s32_u32(vandq_u32(moved, vdupq_n_u32(3)));
                const float32x4_t weight = vcvtq_f32_s32(vsubq_s32(code, vdupq_n_s32(1)));
                for (std::size_t m = 0; m < kTokens; ++m)
                    group[v][m] = vfmaq_n_f32(group[v][m], weight, tokens.x[m][k]);
            }
        }
        for (std::size_t v = 0; v < kVectors; ++v) {
            for (std::size_t m = 0; m < kTokens; ++m) total[v][m] = vaddq_f32(total[v][m], group[v][m]);
        }
    }
    for (std::size_t v = 0; v < kVectors; ++v) {
        for (std::size_t m = 0; m < kTokens; ++m)
            store_rows(job, tokens.y[m], row + v * kVectorRows, total[v][m]);
    }
}

template <std::size_t kTokens>
void multiply_panels(const TernaryTileMatMulJob& job, const Tokens& tokens) {
    for (std::size_t panel = job.panel_begin; panel < job.panel_end; ++panel) {
        const std::uint8_t* bytes = job.panels + panel * panel_bytes(job.num_columns);
        for (std::size_t v = 0; v < kPanelVectors; v += kVectors)
            multiply_vectors<kTokens>(job, tokens, bytes + v * kVectorBytes,
                                      panel * kPanelRows + v * kVectorRows);
    }
}

}  // namespace

void ternary_tile_matmul_neon(const TernaryTileMatMulJob& job) {
    const std::size_t num_steps = ceil_div(job.num_tokens, kMaxTokens);
    std::size_t begin = 0;
    for (std::size_t step = 0; step < num_steps; ++step) {
        const std::size_t end = job.num_tokens * (step + 1) / num_steps;
        Tokens tokens;
        for (std::size_t m = 0; m < end - begin; ++m) {
            const auto token = static_cast<std::size_t>(job.token_idx[begin + m]);
            tokens.x[m] = job.x + token * job.num_columns;
            tokens.y[m] = job.y + token * job.num_rows;
        }
        switch (end - begin) {
            case 1:
                multiply_panels<1>(job, tokens);
                break;
            case 2:
                multiply_panels<2>(job, tokens);
                break;
            case 3:
                multiply_panels<3>(job, tokens);
                break;
            default:
                multiply_panels<4>(job, tokens);
                break;
        }
        begin = end;
    }
}

}  // namespace trix
