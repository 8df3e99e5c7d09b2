// AVX2. Nothing from the standard library and only internal linkage here: see the rules in kernels/README.md.
//
// 8 rows stand in a vector. vpmaddubsw multiplies codes of 0 to 2 with int8 and adds pairs: a block adds at
// most 4 * 2 * 127 * 2 to a sum of 16 bits, so that eight blocks fit (16256 <= 32767) before they go into
// sums of 32.
#include <immintrin.h>

#include "kernels/ternary_int8_matmul/ternary_int8_matmul.hpp"

namespace trix {
namespace {

#define TRIX_INLINE inline __attribute__((always_inline))

constexpr std::size_t kVectorRows = 8;
constexpr std::size_t kVectorBytes = 32;
constexpr std::size_t kPanelVectors = kPanelRows / kVectorRows;
constexpr std::size_t kFoldBlocks = 8;
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

TRIX_INLINE __m256i four_columns(const std::int8_t* q) {
    std::int32_t four;
    __builtin_memcpy(&four, q, sizeof(four));
    return _mm256_set1_epi32(four);
}

TRIX_INLINE __m256 scaled(__m256i dot, std::int32_t sum, float scale) {
    return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(dot, _mm256_set1_epi32(sum))),
                         _mm256_set1_ps(scale));
}

// Rows [row, row + 8) of y, as far as there are so many.
TRIX_INLINE void store_rows(const TernaryInt8MatMulJob& job, float* y, std::size_t row, __m256 total) {
    if (row >= job.num_rows) return;
    const std::size_t left = job.num_rows - row;
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask =
        _mm256_cmpgt_epi32(_mm256_set1_epi32(left < kVectorRows ? static_cast<int>(left) : 8), lane);
    const __m256 scale = _mm256_maskload_ps(job.row_scale + row, mask);
    _mm256_maskstore_ps(y + row, mask, _mm256_mul_ps(scale, total));
}

template <int kVectors, int kTokens>
void multiply_vectors(const TernaryInt8MatMulJob& job, const Shape& shape, const Tokens& tokens,
                      const std::uint8_t* bytes, std::size_t row) {
    const __m256i mask = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
    __m256 total[kVectors][kTokens];
    for (int v = 0; v < kVectors; ++v) {
        for (int m = 0; m < kTokens; ++m) total[v][m] = _mm256_setzero_ps();
    }
    for (std::size_t g = 0; g < shape.num_groups; ++g) {
        __m256i dot[kVectors][kTokens];
        for (int v = 0; v < kVectors; ++v) {
            for (int m = 0; m < kTokens; ++m) dot[v][m] = _mm256_setzero_si256();
        }
        std::size_t block = g * shape.group_blocks;
        const std::size_t left = shape.num_blocks - block;
        const std::size_t end = block + (left < shape.group_blocks ? left : shape.group_blocks);
        while (block < end) {
            const std::size_t fold = end - block < kFoldBlocks ? end : block + kFoldBlocks;
            __m256i pairs[kVectors][kTokens];
            for (int v = 0; v < kVectors; ++v) {
                for (int m = 0; m < kTokens; ++m) pairs[v][m] = _mm256_setzero_si256();
            }
            for (; block < fold; ++block) {
#pragma GCC unroll 4
                for (int s = 0; s < 4; ++s) {
                    __m256i weight[kVectors];
                    for (std::size_t v = 0; v < kVectors; ++v) {
                        const auto* codes =
                            reinterpret_cast<const __m256i*>(bytes + block * kBlockBytes + v * kVectorBytes);
                        weight[v] =
                            _mm256_and_si256(_mm256_srli_epi16(_mm256_loadu_si256(codes), 2 * s), mask);
                    }
                    for (int m = 0; m < kTokens; ++m) {
                        const __m256i x = four_columns(tokens.q[m] + block * kBlockColumns +
                                                       4 * static_cast<std::size_t>(s));
                        for (int v = 0; v < kVectors; ++v)
                            pairs[v][m] = _mm256_add_epi16(pairs[v][m], _mm256_maddubs_epi16(weight[v], x));
                    }
                }
            }
            for (int v = 0; v < kVectors; ++v) {
                for (int m = 0; m < kTokens; ++m)
                    dot[v][m] = _mm256_add_epi32(dot[v][m], _mm256_madd_epi16(pairs[v][m], ones));
            }
        }
        for (int v = 0; v < kVectors; ++v) {
            for (int m = 0; m < kTokens; ++m)
                total[v][m] =
                    _mm256_add_ps(total[v][m], scaled(dot[v][m], tokens.sum[m][g], tokens.scale[m][g]));
        }
    }
    for (std::size_t v = 0; v < kVectors; ++v) {
        for (int m = 0; m < kTokens; ++m) store_rows(job, tokens.y[m], row + v * kVectorRows, total[v][m]);
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

void ternary_int8_matmul_avx2(const TernaryInt8MatMulJob& job) {
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
                multiply_panels<4, 1>(job, shape, tokens);
                break;
            case 2:
                multiply_panels<4, 2>(job, shape, tokens);
                break;
            case 3:
                multiply_panels<2, 3>(job, shape, tokens);
                break;
            default:
                multiply_panels<2, 4>(job, shape, tokens);
                break;
        }
        begin = end;
    }
}

}  // namespace trix
