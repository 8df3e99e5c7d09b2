// AVX2. Nothing from the standard library and only internal linkage here: see the rules in kernels/README.md.
//
// 8 rows stand in a vector. vpmaddubsw multiplies codes of 0 to 2 with int8 and adds pairs: a block adds at
// most 4 * 2 * 128 * 2 to a sum of 16 bits, so that eight blocks fit (16384 <= 32767) before they go into
// sums of 32. With one row of q, half of the codes are masked where they stand, two bits up, and count four
// times: one shift does for three. Eight blocks of them just fit, too: 8 * 2 * 8 * 128 * 2 = 32768 is reached
// below 0 only.
#include <immintrin.h>

#include "kernels/ternary_matmul/token_blocks.hpp"

namespace trix {
namespace {

#define TRIX_INLINE inline __attribute__((always_inline))

constexpr std::size_t kVectorRows = 8;
constexpr std::size_t kVectorBytes = 32;
constexpr std::size_t kPanelVectors = kPanelRows / kVectorRows;
constexpr std::size_t kFoldBlocks = 8;

// As in the variant for AVX-512: how far ahead one token's weights are fetched, for one use only.
constexpr std::size_t kPrefetchBytes = 8192;

TRIX_INLINE __m256i four_columns(const std::int8_t* q) {
    std::int32_t four;
    __builtin_memcpy(&four, q, sizeof(four));
    return _mm256_set1_epi32(four);
}

// sum + the products of bytes, added in pairs. The compiler must not put off the addition to sum others
// first: it would run out of registers.
TRIX_INLINE __m256i add_pairs(__m256i sum, __m256i weight, __m256i x) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(weight, x));
    asm("" : "+x"(sum));
    return sum;
}

TRIX_INLINE __m256 add_scaled(__m256 total, __m256i dot, std::int32_t sum, float scale) {
    const __m256 exact = _mm256_cvtepi32_ps(_mm256_sub_epi32(dot, _mm256_set1_epi32(sum)));
    return _mm256_add_ps(total, _mm256_mul_ps(exact, _mm256_set1_ps(scale)));
}

// Rows [row, row + 8) of y, as far as there are so many.
TRIX_INLINE void store_rows(const TernaryMatMulJob& job, float* y, std::size_t row, __m256 total) {
    if (row >= job.num_rows) return;
    const std::size_t left = job.num_rows - row;
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask =
        _mm256_cmpgt_epi32(_mm256_set1_epi32(left < kVectorRows ? static_cast<int>(left) : 8), lane);
    const __m256 scale = _mm256_maskload_ps(job.row_scale + row, mask);
    _mm256_maskstore_ps(y + row, mask, _mm256_mul_ps(scale, total));
}

template <int kVectors, int kTokens, int kPlanes>
void multiply_vectors(const TernaryMatMulJob& job, const GroupShape& shape, const TokenBlock& tokens,
                      const std::uint8_t* bytes, std::size_t row) {
    constexpr int kRows = kTokens * kPlanes;
    const __m256i mask = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
    __m256 total[kVectors][kTokens];
    for (auto& of_vector : total) {
        for (auto& value : of_vector) value = _mm256_setzero_ps();
    }
    for (std::size_t g = 0; g < shape.num_groups; ++g) {
        __m256i dot[kVectors][kRows];
        for (auto& of_vector : dot) {
            for (auto& value : of_vector) value = _mm256_setzero_si256();
        }
        const std::size_t end = group_end(shape, g);
        for (std::size_t block = g * shape.group_blocks; block < end;) {
            const std::size_t fold = end - block < kFoldBlocks ? end : block + kFoldBlocks;
            __m256i pairs[kVectors][kRows];
            for (auto& of_vector : pairs) {
                for (auto& value : of_vector) value = _mm256_setzero_si256();
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
                    for (int r = 0; r < kRows; ++r) {
                        const __m256i x = four_columns(tokens.q[r] + block * kBlockColumns +
                                                       4 * static_cast<std::size_t>(s));
                        for (int v = 0; v < kVectors; ++v) pairs[v][r] = add_pairs(pairs[v][r], weight[v], x);
                    }
                }
            }
            for (int v = 0; v < kVectors; ++v) {
                for (int r = 0; r < kRows; ++r)
                    dot[v][r] = _mm256_add_epi32(dot[v][r], _mm256_madd_epi16(pairs[v][r], ones));
            }
        }
        for (int v = 0; v < kVectors; ++v) {
            for (int m = 0; m < kTokens; ++m) {
                for (std::size_t p = 0; p < kPlanes; ++p) {
                    const __m256i sums = dot[v][m * kPlanes + static_cast<int>(p)];
                    total[v][m] = add_scaled(total[v][m], sums, tokens.sum[m][g * kPlanes + p],
                                             tokens.scale[m][g * kPlanes + p]);
                }
            }
        }
    }
    for (std::size_t v = 0; v < kVectors; ++v) {
        for (int m = 0; m < kTokens; ++m) store_rows(job, tokens.y[m], row + v * kVectorRows, total[v][m]);
    }
}

// One token of one plane. The whole panel at once, so that memory is read from the first byte to the last.
void multiply_one(const TernaryMatMulJob& job, const GroupShape& shape, const TokenBlock& tokens,
                  std::size_t panel) {
    const std::uint8_t* bytes = job.panels + panel * shape.num_blocks * kBlockBytes;
    const std::int8_t* q = tokens.q[0];
    const __m256i once = _mm256_set1_epi8(3), four_times = _mm256_set1_epi8(12);
    __m256 total[kPanelVectors];
    for (auto& value : total) value = _mm256_setzero_ps();
    for (std::size_t g = 0; g < shape.num_groups; ++g) {
        __m256i dot[kPanelVectors];  // four times
        for (auto& value : dot) value = _mm256_setzero_si256();
        const std::size_t end = group_end(shape, g);
        for (std::size_t block = g * shape.group_blocks; block < end;) {
            const std::size_t fold = end - block < kFoldBlocks ? end : block + kFoldBlocks;
            __m256i low[kPanelVectors], high[kPanelVectors];
            for (auto& value : low) value = _mm256_setzero_si256();
            for (auto& value : high) value = _mm256_setzero_si256();
            for (; block < fold; ++block) {
                __m256i x[4];
                for (std::size_t s = 0; s < 4; ++s) x[s] = four_columns(q + block * kBlockColumns + 4 * s);
                for (std::size_t v = 0; v < kPanelVectors; ++v) {
                    const std::uint8_t* place = bytes + block * kBlockBytes + v * kVectorBytes;
                    if (v % 2 == 0)
                        _mm_prefetch(reinterpret_cast<const char*>(place + kPrefetchBytes), _MM_HINT_NTA);
                    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(place));
                    const __m256i moved = _mm256_srli_epi16(codes, 4);
                    low[v] = add_pairs(low[v], _mm256_and_si256(codes, once), x[0]);
                    high[v] = add_pairs(high[v], _mm256_and_si256(codes, four_times), x[1]);
                    low[v] = add_pairs(low[v], _mm256_and_si256(moved, once), x[2]);
                    high[v] = add_pairs(high[v], _mm256_and_si256(moved, four_times), x[3]);
                }
            }
            for (std::size_t v = 0; v < kPanelVectors; ++v) {
                const __m256i sums = _mm256_add_epi32(_mm256_madd_epi16(low[v], _mm256_set1_epi16(4)),
                                                      _mm256_madd_epi16(high[v], _mm256_set1_epi16(1)));
                dot[v] = _mm256_add_epi32(dot[v], sums);
            }
        }
        for (std::size_t v = 0; v < kPanelVectors; ++v)
            total[v] =
                add_scaled(total[v], _mm256_srai_epi32(dot[v], 2), tokens.sum[0][g], tokens.scale[0][g]);
    }
    for (std::size_t v = 0; v < kPanelVectors; ++v)
        store_rows(job, tokens.y[0], panel * kPanelRows + v * kVectorRows, total[v]);
}

template <int kVectors, int kTokens, int kPlanes>
void multiply_panels(const TernaryMatMulJob& job, const GroupShape& shape, const TokenBlock& tokens) {
    for (std::size_t panel = job.panel_begin; panel < job.panel_end; ++panel) {
        const std::uint8_t* bytes = job.panels + panel * shape.num_blocks * kBlockBytes;
        for (std::size_t v = 0; v < kPanelVectors; v += kVectors) {
            multiply_vectors<kVectors, kTokens, kPlanes>(job, shape, tokens, bytes + v * kVectorBytes,
                                                         panel * kPanelRows + v * kVectorRows);
        }
    }
}

}  // namespace

void ternary_matmul_avx2(const TernaryMatMulJob& job) {
    const GroupShape shape = group_shape(job);
    if (job.num_planes == 1) {
        for_token_blocks(job, shape, 4, [&](const TokenBlock& tokens, std::size_t count) {
            switch (count) {
                case 1:
                    for (std::size_t panel = job.panel_begin; panel < job.panel_end; ++panel)
                        multiply_one(job, shape, tokens, panel);
                    return;
                case 2:
                    return multiply_panels<4, 2, 1>(job, shape, tokens);
                case 3:
                    return multiply_panels<2, 3, 1>(job, shape, tokens);
                default:
                    return multiply_panels<2, 4, 1>(job, shape, tokens);
            }
        });
        return;
    }
    for_token_blocks(job, shape, 1, [&](const TokenBlock& tokens, std::size_t) {
        multiply_panels<2, 1, 3>(job, shape, tokens);
    });
}

}  // namespace trix
