// The NEON variants but for one instruction, AddFour::add_four. Everything is static: see the rules in
// kernels/README.md.
#pragma once

#include <arm_neon.h>

#include "kernels/ternary_matmul/token_blocks.hpp"

namespace trix {

static constexpr std::size_t kVectorRows = 4;
static constexpr std::size_t kVectorBytes = 16;
static constexpr std::size_t kPanelVectors = kPanelRows / kVectorRows;

// Columns 4s to 4s + 3 of 4 rows, as values of 0 to 2.
template <int kField>
static inline int8x16_t field(uint8x16_t codes) {
    if constexpr (kField == 0)
        return vreinterpretq_s8_u8(vandq_u8(codes, vdupq_n_u8(3)));
    else if constexpr (kField == 3)
        return vreinterpretq_s8_u8(vshrq_n_u8(codes, 6));
    else
        return vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(codes, 2 * kField), vdupq_n_u8(3)));
}

static inline int8x16_t four_columns(const std::int8_t* q) {
    std::int32_t four;
    __builtin_memcpy(&four, q, sizeof(four));
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

static inline float32x4_t add_scaled(float32x4_t total, int32x4_t dot, std::int32_t sum, float scale) {
    const float32x4_t exact = vcvtq_f32_s32(vsubq_s32(dot, vdupq_n_s32(sum)));
    return vaddq_f32(total, vmulq_f32(exact, vdupq_n_f32(scale)));
}

// Rows [row, row + 4) of y, as far as there are so many.
static inline void store_rows(const TernaryMatMulJob& job, float* y, std::size_t row, float32x4_t total) {
    if (row + kVectorRows <= job.num_rows) {
        vst1q_f32(y + row, vmulq_f32(vld1q_f32(job.row_scale + row), total));
        return;
    }
    float lane[kVectorRows];
    vst1q_f32(lane, total);
    for (std::size_t i = 0; row + i < job.num_rows; ++i) y[row + i] = job.row_scale[row + i] * lane[i];
}

template <typename AddFour, int kVectors, int kTokens, int kPlanes>
static void multiply_vectors(const TernaryMatMulJob& job, const GroupShape& shape, const TokenBlock& tokens,
                             const std::uint8_t* bytes, std::size_t row) {
    constexpr std::size_t kRows = kTokens * kPlanes;
    float32x4_t total[kVectors][kTokens];
    for (auto& of_vector : total) {
        for (auto& value : of_vector) value = vdupq_n_f32(0.0f);
    }
    for (std::size_t g = 0; g < shape.num_groups; ++g) {
        int32x4_t dot[kVectors][kRows];
        for (auto& of_vector : dot) {
            for (auto& value : of_vector) value = vdupq_n_s32(0);
        }
        const std::size_t end = group_end(shape, g);
        for (std::size_t block = g * shape.group_blocks; block < end; ++block) {
            for (std::size_t v = 0; v < kVectors; ++v) {
                const uint8x16_t codes = vld1q_u8(bytes + block * kBlockBytes + v * kVectorBytes);
                const int8x16_t weight[4] = {field<0>(codes), field<1>(codes), field<2>(codes),
                                             field<3>(codes)};
                for (std::size_t r = 0; r < kRows; ++r) {
                    const std::int8_t* q = tokens.q[r] + block * kBlockColumns;
                    for (std::size_t s = 0; s < 4; ++s)
                        dot[v][r] = AddFour::add_four(dot[v][r], weight[s], four_columns(q + 4 * s));
                }
            }
        }
        for (std::size_t v = 0; v < kVectors; ++v) {
            for (std::size_t m = 0; m < kTokens; ++m) {
                for (std::size_t p = 0; p < kPlanes; ++p) {
                    total[v][m] =
                        add_scaled(total[v][m], dot[v][m * kPlanes + p], tokens.sum[m][g * kPlanes + p],
                                   tokens.scale[m][g * kPlanes + p]);
                }
            }
        }
    }
    for (std::size_t v = 0; v < kVectors; ++v) {
        for (std::size_t m = 0; m < kTokens; ++m)
            store_rows(job, tokens.y[m], row + v * kVectorRows, total[v][m]);
    }
}

template <typename AddFour, int kVectors, int kTokens, int kPlanes>
static void multiply_panels(const TernaryMatMulJob& job, const GroupShape& shape, const TokenBlock& tokens) {
    for (std::size_t panel = job.panel_begin; panel < job.panel_end; ++panel) {
        const std::uint8_t* bytes = job.panels + panel * shape.num_blocks * kBlockBytes;
        for (std::size_t v = 0; v < kPanelVectors; v += kVectors) {
            multiply_vectors<AddFour, kVectors, kTokens, kPlanes>(
                job, shape, tokens, bytes + v * kVectorBytes, panel * kPanelRows + v * kVectorRows);
        }
    }
}

template <typename AddFour>
static void multiply_tokens(const TernaryMatMulJob& job) {
    const GroupShape shape = group_shape(job);
    if (job.num_planes == 1) {
        for_token_blocks(job, shape, 4, [&](const TokenBlock& tokens, std::size_t count) {
            switch (count) {
                case 1:
                    return multiply_panels<AddFour, 8, 1, 1>(job, shape, tokens);
                case 2:
                    return multiply_panels<AddFour, 4, 2, 1>(job, shape, tokens);
                case 3:
                    return multiply_panels<AddFour, 4, 3, 1>(job, shape, tokens);
                default:
                    return multiply_panels<AddFour, 4, 4, 1>(job, shape, tokens);
            }
        });
        return;
    }
    for_token_blocks(job, shape, 1, [&](const TokenBlock& tokens, std::size_t) {
        multiply_panels<AddFour, 4, 1, 3>(job, shape, tokens);
    });
}

}  // namespace trix
