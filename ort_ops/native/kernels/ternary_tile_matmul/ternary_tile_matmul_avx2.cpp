// AVX2 + FMA. Nothing from the standard library and only internal linkage here: see the rules in
// kernels/README.md.
//
// 8 rows stand in a vector. A shift brings the code of one column to the lowest bits of every lane, which is
// what vpermilps reads to look up {-1, 0, +1} in a register; the weights then serve all tokens of the block.
#include <immintrin.h>

#include "kernels/ternary_tile_matmul/ternary_tile_matmul.hpp"

namespace trix {
namespace {

#define TRIX_INLINE inline __attribute__((always_inline))

constexpr std::size_t kVectorRows = 8;
constexpr std::size_t kVectorBytes = 4 * kVectorRows;
constexpr std::size_t kPanelVectors = kPanelRows / kVectorRows;
constexpr std::size_t kMaxTokens = 6;

struct Tokens {
    const float* x[kMaxTokens];
    float* y[kMaxTokens];
};

// Rows [row, row + 8) of y, as far as there are so many.
TRIX_INLINE void store_rows(const TernaryTileMatMulJob& job, float* y, std::size_t row, __m256 total) {
    if (row >= job.num_rows) return;
    const std::size_t left = job.num_rows - row;
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask =
        _mm256_cmpgt_epi32(_mm256_set1_epi32(left < kVectorRows ? static_cast<int>(left) : 8), lane);
    const __m256 scale = _mm256_maskload_ps(job.row_scale + row, mask);
    _mm256_maskstore_ps(y + row, mask, _mm256_mul_ps(scale, total));
}

template <int kVectors, int kTokens>
TRIX_INLINE void add_column(__m256i const (&codes)[kVectors], int shift, const float* const (&x)[kTokens],
                            std::size_t k, __m256 (&group)[kVectors][kTokens]) {
    const __m256 value = _mm256_setr_ps(-1.0f, 0.0f, 1.0f, 0.0f, -1.0f, 0.0f, 1.0f, 0.0f);
    __m256 weight[kVectors];
    for (int v = 0; v < kVectors; ++v)
        weight[v] = _mm256_permutevar_ps(value, _mm256_srli_epi32(codes[v], shift));
    for (int m = 0; m < kTokens; ++m) {
        const __m256 column = _mm256_set1_ps(x[m][k]);
        for (int v = 0; v < kVectors; ++v) group[v][m] = _mm256_fmadd_ps(column, weight[v], group[v][m]);
    }
}

template <int kVectors, int kTokens>
void multiply_vectors(const TernaryTileMatMulJob& job, const Tokens& tokens, const std::uint8_t* bytes,
                      std::size_t row) {
    const float* x[kTokens];
    for (int m = 0; m < kTokens; ++m) x[m] = tokens.x[m];
    __m256 total[kVectors][kTokens];
    for (int v = 0; v < kVectors; ++v) {
        for (int m = 0; m < kTokens; ++m) total[v][m] = _mm256_setzero_ps();
    }
    for (std::size_t begin = 0; begin < job.num_columns; begin += kGroupColumns) {
        __m256 group[kVectors][kTokens];
        for (int v = 0; v < kVectors; ++v) {
            for (int m = 0; m < kTokens; ++m) group[v][m] = _mm256_setzero_ps();
        }
        const std::size_t left = job.num_columns - begin;
        const std::size_t end = begin + (left < kGroupColumns ? left : kGroupColumns);
        for (std::size_t k = begin; k < end; k += kBlockColumns) {
            __m256i codes[kVectors];
            for (std::size_t v = 0; v < kVectors; ++v) {
                codes[v] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(
                    bytes + k / kBlockColumns * kBlockBytes + v * kVectorBytes));
            }
            if (k + kBlockColumns <= end) {
#pragma GCC unroll 16
                for (int c = 0; c < static_cast<int>(kBlockColumns); ++c)
                    add_column(codes, 8 * (c % 4) + 2 * (c / 4), x, k + static_cast<std::size_t>(c), group);
            } else {
                for (std::size_t c = 0; c < end - k; ++c)
                    add_column(codes, static_cast<int>(8 * (c % 4) + 2 * (c / 4)), x, k + c, group);
            }
        }
        for (int v = 0; v < kVectors; ++v) {
            for (int m = 0; m < kTokens; ++m) total[v][m] = _mm256_add_ps(total[v][m], group[v][m]);
        }
    }
    for (std::size_t v = 0; v < kVectors; ++v) {
        for (int m = 0; m < kTokens; ++m) store_rows(job, tokens.y[m], row + v * kVectorRows, total[v][m]);
    }
}

template <int kVectors, int kTokens>
void multiply_panels(const TernaryTileMatMulJob& job, const Tokens& tokens) {
    for (std::size_t panel = job.panel_begin; panel < job.panel_end; ++panel) {
        const std::uint8_t* bytes = job.panels + panel * panel_bytes(job.num_columns);
        for (std::size_t v = 0; v < kPanelVectors; v += kVectors) {
            multiply_vectors<kVectors, kTokens>(job, tokens, bytes + v * kVectorBytes,
                                                panel * kPanelRows + v * kVectorRows);
        }
    }
}

}  // namespace

void ternary_tile_matmul_avx2(const TernaryTileMatMulJob& job) {
    const std::size_t num_steps = ceil_div(job.num_tokens, kMaxTokens);
    std::size_t begin = 0;
    for (std::size_t step = 0; step < num_steps; ++step) {
        const std::size_t end =
            job.num_tokens * (step + 1) / num_steps;  // even shares: seven tokens run as 3 + 4
        Tokens tokens;
        for (std::size_t m = 0; m < end - begin; ++m) {
            const auto token = static_cast<std::size_t>(job.token_idx[begin + m]);
            tokens.x[m] = job.x + token * job.num_columns;
            tokens.y[m] = job.y + token * job.num_rows;
        }
        switch (end - begin) {
            case 1:
                multiply_panels<4, 1>(job, tokens);
                break;
            case 2:
                multiply_panels<4, 2>(job, tokens);
                break;
            case 3:
                multiply_panels<4, 3>(job, tokens);
                break;
            case 4:
                multiply_panels<2, 4>(job, tokens);
                break;
            case 5:
                multiply_panels<2, 5>(job, tokens);
                break;
            default:
                multiply_panels<2, 6>(job, tokens);
                break;
        }
        begin = end;
    }
}

}  // namespace trix
