// AVX2 + FMA. Nothing from the standard library and only internal linkage here: an out-of-line copy of a
// shared inline function compiled with these flags could be picked by the linker for CPUs without AVX2.
//
// Decoding costs five instructions for 16 weights: a 4-byte word holds the codes of 16 columns, so
// broadcasting it and shifting lane j right by 2j puts the code of lane j in its two lowest bits, which is
// what vpermilps reads to look up {0, +1, -1} in a register. A block of kRows x kTokens sums stays in
// registers: with one token, several rows share the loads of x; with several tokens, a decoded chunk is used
// for each of them.
#include <immintrin.h>

#include "kernels/ternary_tile_matmul/ternary_tile_matmul.hpp"

namespace trix {
namespace {

#define TRIX_INLINE inline __attribute__((always_inline))

constexpr std::size_t kLanes = 16;
constexpr std::size_t kMinTokens = 2;
constexpr std::size_t kMaxTokens = 6;
constexpr std::size_t kTokenBlockBytes = 24 * 1024;  // leaves room in a 32 KiB first-level cache

struct Chunk {
    __m256 low;   // weights of lanes 0 to 7
    __m256 high;  // weights of lanes 8 to 15
};

TRIX_INLINE Chunk decode(std::uint32_t word) {
    const __m256i shift_low = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
    const __m256i shift_high = _mm256_setr_epi32(16, 18, 20, 22, 24, 26, 28, 30);
    const __m256 value = _mm256_setr_ps(0.0f, 1.0f, -1.0f, 0.0f, 0.0f, 1.0f, -1.0f, 0.0f);
    const __m256i codes = _mm256_set1_epi32(static_cast<int>(word));
    return {_mm256_permutevar_ps(value, _mm256_srlv_epi32(codes, shift_low)),
            _mm256_permutevar_ps(value, _mm256_srlv_epi32(codes, shift_high))};
}

TRIX_INLINE std::uint32_t load_word(const std::uint8_t* packed) {
    std::uint32_t word;
    __builtin_memcpy(&word, packed, sizeof(word));
    return word;
}

TRIX_INLINE std::uint32_t load_partial_word(const std::uint8_t* packed, std::size_t num_bytes) {
    std::uint32_t word = 0;
    for (std::size_t i = 0; i < num_bytes; ++i) word |= static_cast<std::uint32_t>(packed[i]) << (8 * i);
    return word;
}

// All ones in the first `count` of eight lanes.
TRIX_INLINE __m256i first_lanes(std::size_t count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
}

TRIX_INLINE float sum_lanes(__m256 low, __m256 high) {
    const __m256 eight = _mm256_add_ps(low, high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

struct Tokens {
    const float* x[kMaxTokens];
    float* y[kMaxTokens];
};

template <int kRows, int kTokens>
TRIX_INLINE void multiply_block(const TernaryTileMatMulJob& job, const Tokens& tokens, std::size_t row) {
    const std::size_t row_bytes = (job.num_columns + 3) / 4;
    const std::uint8_t* packed = job.packed + row * row_bytes;
    const float* x[kTokens];
    for (int m = 0; m < kTokens; ++m) x[m] = tokens.x[m];

    __m256 low[kRows][kTokens];
    __m256 high[kRows][kTokens];
    for (int r = 0; r < kRows; ++r) {
        for (int m = 0; m < kTokens; ++m) low[r][m] = high[r][m] = _mm256_setzero_ps();
    }

    std::size_t k = 0;
    for (; k + kLanes <= job.num_columns; k += kLanes) {
        for (int r = 0; r < kRows; ++r) {
            const Chunk weight = decode(load_word(packed + static_cast<std::size_t>(r) * row_bytes + k / 4));
            for (int m = 0; m < kTokens; ++m) {
                low[r][m] = _mm256_fmadd_ps(_mm256_loadu_ps(x[m] + k), weight.low, low[r][m]);
                high[r][m] = _mm256_fmadd_ps(_mm256_loadu_ps(x[m] + k + 8), weight.high, high[r][m]);
            }
        }
    }
    const std::size_t tail = job.num_columns - k;
    if (tail > 0) {
        const __m256i mask_low = first_lanes(tail);
        const __m256i mask_high = first_lanes(tail > 8 ? tail - 8 : 0);
        for (int r = 0; r < kRows; ++r) {
            const std::uint8_t* bytes = packed + static_cast<std::size_t>(r) * row_bytes + k / 4;
            const Chunk weight = decode(load_partial_word(bytes, (tail + 3) / 4));
            for (int m = 0; m < kTokens; ++m) {
                const __m256 x_low = _mm256_maskload_ps(x[m] + k, mask_low);
                low[r][m] = _mm256_fmadd_ps(x_low, weight.low, low[r][m]);
                if (tail > 8) {
                    const __m256 x_high = _mm256_maskload_ps(x[m] + k + 8, mask_high);
                    high[r][m] = _mm256_fmadd_ps(x_high, weight.high, high[r][m]);
                }
            }
        }
    }
    for (int r = 0; r < kRows; ++r) {
        const std::size_t n = row + static_cast<std::size_t>(r);
        for (int m = 0; m < kTokens; ++m)
            tokens.y[m][n] = job.row_scale[n] * sum_lanes(low[r][m], high[r][m]);
    }
}

// Every row passes over the block's x again, so the block must stay in the first-level cache: with K = 4096,
// blocks of 2 tokens run a fifth faster than blocks of 6; with K = 512 it is the other way round.
TRIX_INLINE std::size_t tokens_per_block(std::size_t num_columns) {
    const std::size_t fitting = kTokenBlockBytes / (sizeof(float) * (num_columns == 0 ? 1 : num_columns));
    return fitting < kMinTokens ? kMinTokens : fitting > kMaxTokens ? kMaxTokens : fitting;
}

template <int kRows, int kTokens>
void multiply_rows(const TernaryTileMatMulJob& job, const Tokens& tokens) {
    std::size_t n = job.row_begin;
    for (; n + kRows <= job.row_end; n += kRows) multiply_block<kRows, kTokens>(job, tokens, n);
    for (; n < job.row_end; ++n) multiply_block<1, kTokens>(job, tokens, n);
}

}  // namespace

void ternary_tile_matmul_avx2(const TernaryTileMatMulJob& job) {
    const std::size_t block_size = tokens_per_block(job.num_columns);
    const std::size_t num_blocks = (job.num_tokens + block_size - 1) / block_size;
    std::size_t begin = 0;
    for (std::size_t block = 0; block < num_blocks; ++block) {
        // Even shares: with blocks of six, seven tokens run as 3 + 4.
        const std::size_t end = job.num_tokens * (block + 1) / num_blocks;
        Tokens tokens;
        for (std::size_t m = 0; m < end - begin; ++m) {
            const auto token = static_cast<std::size_t>(job.token_idx[begin + m]);
            tokens.x[m] = job.x + token * job.num_columns;
            tokens.y[m] = job.y + token * job.num_rows;
        }
        // Rows x tokens x 2 sums, at most 12 of the 16 registers.
        switch (end - begin) {
            case 1:
                multiply_rows<4, 1>(job, tokens);
                break;
            case 2:
                multiply_rows<3, 2>(job, tokens);
                break;
            case 3:
                multiply_rows<2, 3>(job, tokens);
                break;
            case 4:
                multiply_rows<1, 4>(job, tokens);
                break;
            case 5:
                multiply_rows<1, 5>(job, tokens);
                break;
            default:
                multiply_rows<1, 6>(job, tokens);
                break;
        }
        begin = end;
    }
}

}  // namespace trix
