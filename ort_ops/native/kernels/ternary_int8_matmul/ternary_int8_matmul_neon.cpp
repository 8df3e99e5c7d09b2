// NEON, the baseline of AArch64: 4 rows stand in a vector; products of 16 bits are added in pairs, and again
// in pairs.
#include <arm_neon.h>

#include "kernels/ternary_int8_matmul/ternary_int8_matmul.hpp"

namespace trix {
namespace {

constexpr std::size_t kVectorRows = 4;
constexpr std::size_t kVectorBytes = 16;
constexpr std::size_t kPanelVectors = kPanelRows / kVectorRows;
constexpr std::size_t kMaxTokens = 4;

struct Shape {
    std::size_t num_blocks;
    std::size_t group_blocks;
    std::size_t num_groups;
};

struct Tokens {
    const std::int8_t* q[kMaxTokens];
    const float* scale[kMaxTokens];
    const std::int32_t* sum[kMaxTokens];
    float* y[kMaxTokens];
};

// Columns 4s to 4s + 3 of 4 rows, as values of 0 to 2.
template <int kField>
inline int8x16_t field(uint8x16_t codes) {
    if constexpr (kField == 0)
        return vreinterpretq_s8_u8(vandq_u8(codes, vdupq_n_u8(3)));
    else if constexpr (kField == 3)
        return vreinterpretq_s8_u8(vshrq_n_u8(codes, 6));
    else
        return vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(codes, 2 * kField), vdupq_n_u8(3)));
}

// dot += the sum over four columns of each of four rows.
inline int32x4_t add_four(int32x4_t dot, int8x16_t weight, const std::int8_t* q) {
    std::int32_t four;
    __builtin_memcpy(&four, q, sizeof(four));
    const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(four));
    const int16x8_t low = vmull_s8(vget_low_s8(weight), vget_low_s8(x));
    const int16x8_t high = vmull_s8(vget_high_s8(weight), vget_high_s8(x));
    return vpadalq_s16(dot, vpaddq_s16(low, high));
}

// Rows [row, row + 4) of y, as far as there are so many.
inline void store_rows(const TernaryInt8MatMulJob& job, float* y, std::size_t row, float32x4_t total) {
    if (row + kVectorRows <= job.num_rows) {
        vst1q_f32(y + row, vmulq_f32(vld1q_f32(job.row_scale + row), total));
        return;
    }
    float lane[kVectorRows];
    vst1q_f32(lane, total);
    for (std::size_t i = 0; row + i < job.num_rows; ++i) y[row + i] = job.row_scale[row + i] * lane[i];
}

template <int kVectors, int kTokens>
void multiply_vectors(const TernaryInt8MatMulJob& job, const Shape& shape, const Tokens& tokens,
                      const std::uint8_t* bytes, std::size_t row) {
    float32x4_t total[kVectors][kTokens];
    for (auto& of_vector : total) {
        for (auto& value : of_vector) value = vdupq_n_f32(0.0f);
    }
    for (std::size_t g = 0; g < shape.num_groups; ++g) {
        int32x4_t dot[kVectors][kTokens];
        for (auto& of_vector : dot) {
            for (auto& value : of_vector) value = vdupq_n_s32(0);
        }
        const std::size_t begin = g * shape.group_blocks;
        const std::size_t left = shape.num_blocks - begin;
        const std::size_t end = begin + (left < shape.group_blocks ? left : shape.group_blocks);
        for (std::size_t block = begin; block < end; ++block) {
            for (std::size_t v = 0; v < kVectors; ++v) {
                const uint8x16_t codes = vld1q_u8(bytes + block * kBlockBytes + v * kVectorBytes);
                const int8x16_t weight[4] = {field<0>(codes), field<1>(codes), field<2>(codes),
                                             field<3>(codes)};
                for (std::size_t m = 0; m < kTokens; ++m) {
                    const std::int8_t* q = tokens.q[m] + block * kBlockColumns;
                    for (std::size_t s = 0; s < 4; ++s) dot[v][m] = add_four(dot[v][m], weight[s], q + 4 * s);
                }
            }
        }
        for (std::size_t v = 0; v < kVectors; ++v) {
            for (std::size_t m = 0; m < kTokens; ++m) {
                const int32x4_t exact = vsubq_s32(dot[v][m], vdupq_n_s32(tokens.sum[m][g]));
                total[v][m] =
                    vaddq_f32(total[v][m], vmulq_f32(vcvtq_f32_s32(exact), vdupq_n_f32(tokens.scale[m][g])));
            }
        }
    }
    for (std::size_t v = 0; v < kVectors; ++v) {
        for (std::size_t m = 0; m < kTokens; ++m)
            store_rows(job, tokens.y[m], row + v * kVectorRows, total[v][m]);
    }
}

template <int kVectors, int kTokens>
void multiply_panels(const TernaryInt8MatMulJob& job, const Shape& shape, const Tokens& tokens) {
    for (std::size_t panel = job.panel_begin; panel < job.panel_end; ++panel) {
        const std::uint8_t* bytes = job.panels + panel * shape.num_blocks * kBlockBytes;
        for (std::size_t v = 0; v < kPanelVectors; v += kVectors) {
            multiply_vectors<kVectors, kTokens>(job, shape, tokens, bytes + v * kVectorBytes,
                                                panel * kPanelRows + v * kVectorRows);
        }
    }
}

}  // namespace

void ternary_int8_matmul_neon(const TernaryInt8MatMulJob& job) {
    const std::size_t num_blocks = ceil_div(job.num_columns, kBlockColumns);
    const Shape shape{num_blocks, job.group_columns / kBlockColumns,
                      ceil_div(num_blocks * kBlockColumns, job.group_columns)};
    const std::size_t num_steps = ceil_div(job.num_tokens, kMaxTokens);
    std::size_t begin = 0;
    for (std::size_t step = 0; step < num_steps; ++step) {
        const std::size_t end = job.num_tokens * (step + 1) / num_steps;
        Tokens tokens;
        for (std::size_t m = 0; m < end - begin; ++m) {
            const auto token = static_cast<std::size_t>(job.token_idx[begin + m]);
            tokens.q[m] = job.q + token * num_blocks * kBlockColumns;
            tokens.scale[m] = job.scale + token * shape.num_groups;
            tokens.sum[m] = job.sum + token * shape.num_groups;
            tokens.y[m] = job.y + token * job.num_rows;
        }
        switch (end - begin) {
            case 1:
                multiply_panels<8, 1>(job, shape, tokens);
                break;
            case 2:
                multiply_panels<4, 2>(job, shape, tokens);
                break;
            case 3:
                multiply_panels<4, 3>(job, shape, tokens);
                break;
            default:
                multiply_panels<4, 4>(job, shape, tokens);
                break;
        }
        begin = end;
    }
}

}  // namespace trix
