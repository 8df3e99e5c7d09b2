// AVX-512 with VNNI. Nothing from the standard library and only internal linkage here: see the rules in
// kernels/README.md.
//
// 16 rows stand in a vector, and vpdpbusd adds four columns of each. With one row of q the four fields of a
// byte are masked where they stand and summed apart, for the shift of a sum at the end costs less than one of
// every vector. With more rows each field is moved down once and serves all of them; one panel by eight rows,
// or two panels by up to four, keep 16 sums in registers: enough to hide the latency, few enough to spill
// nothing.
#include <immintrin.h>

#include "kernels/ternary_matmul/token_blocks.hpp"

namespace trix {
namespace {

#define TRIX_INLINE inline __attribute__((always_inline))

constexpr std::size_t kVectorRows = 16;
constexpr std::size_t kVectorBytes = 64;
constexpr int kPanelVectors = kPanelRows / kVectorRows;

// How far ahead one token's weights are fetched: past the end of a small page, where the hardware's own
// prefetching stops. For one use only, so that they push nothing else out of the cache.
constexpr std::size_t kPrefetchBytes = 8192;

TRIX_INLINE void fetch_ahead(const std::uint8_t* place) {
    _mm_prefetch(reinterpret_cast<const char*>(place + kPrefetchBytes), _MM_HINT_NTA);
}

TRIX_INLINE __m512i four_columns(const std::int8_t* q) {
    std::int32_t four;
    __builtin_memcpy(&four, q, sizeof(four));
    return _mm512_set1_epi32(four);
}

// _mm512_dpbusd_epi32, around which GCC 12 copies every sum to another register and back: a twelfth of the
// time of one token.
TRIX_INLINE __m512i add_four(__m512i dot, __m512i weight, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(dot) : "v"(weight), "v"(x));
    return dot;
}

TRIX_INLINE __m512 add_scaled(__m512 total, __m512i dot, std::int32_t sum, float scale) {
    const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(dot, _mm512_set1_epi32(sum)));
    return _mm512_add_ps(total, _mm512_mul_ps(exact, _mm512_set1_ps(scale)));
}

// Rows [row, row + 16) of y, as far as there are so many.
TRIX_INLINE void store_rows(const TernaryMatMulJob& job, float* y, std::size_t row, __m512 total) {
    if (row >= job.num_rows) return;
    const std::size_t left = job.num_rows - row;
    const auto mask = static_cast<__mmask16>(left >= kVectorRows ? 0xffffu : (1u << left) - 1u);
    const __m512 scale = _mm512_maskz_loadu_ps(mask, job.row_scale + row);
    _mm512_mask_storeu_ps(y + row, mask, _mm512_mul_ps(scale, total));
}

// Of a last panel with few rows, as of few signatures, one vector is enough.
TRIX_INLINE bool fits_a_vector(const TernaryMatMulJob& job, std::size_t panel) {
    return job.num_rows <= panel * kPanelRows + kVectorRows;
}

// One token of one plane. One panel after the other, so that memory is read from the first byte to the last.
template <int kVectors>
void multiply_one(const TernaryMatMulJob& job, const GroupShape& shape, const TokenBlock& tokens,
                  std::size_t panel) {
    const std::uint8_t* bytes = job.panels + panel * shape.num_blocks * kBlockBytes;
    const std::int8_t* q = tokens.q[0];
    __m512i mask[4];
    for (int s = 0; s < 4; ++s) mask[s] = _mm512_set1_epi8(static_cast<char>(3 << (2 * s)));
    __m512 total[kVectors];
    for (auto& value : total) value = _mm512_setzero_ps();
    for (std::size_t g = 0; g < shape.num_groups; ++g) {
        __m512i dot[kVectors][4];
        for (auto& of_vector : dot) {
            for (auto& value : of_vector) value = _mm512_setzero_si512();
        }
        const std::size_t end = group_end(shape, g);
        for (std::size_t block = g * shape.group_blocks; block < end; ++block) {
            __m512i x[4];
            for (std::size_t s = 0; s < 4; ++s) x[s] = four_columns(q + block * kBlockColumns + 4 * s);
            for (std::size_t v = 0; v < kVectors; ++v) {
                const std::uint8_t* place = bytes + block * kBlockBytes + v * kVectorBytes;
                fetch_ahead(place);
                const __m512i codes = _mm512_loadu_si512(place);
                for (int s = 0; s < 4; ++s)
                    dot[v][s] = add_four(dot[v][s], _mm512_and_si512(codes, mask[s]), x[s]);
            }
        }
        for (int v = 0; v < kVectors; ++v) {
            const __m512i low = _mm512_add_epi32(dot[v][0], _mm512_srai_epi32(dot[v][1], 2));
            const __m512i high =
                _mm512_add_epi32(_mm512_srai_epi32(dot[v][2], 4), _mm512_srai_epi32(dot[v][3], 6));
            total[v] =
                add_scaled(total[v], _mm512_add_epi32(low, high), tokens.sum[0][g], tokens.scale[0][g]);
        }
    }
    for (std::size_t v = 0; v < kVectors; ++v)
        store_rows(job, tokens.y[0], panel * kPanelRows + v * kVectorRows, total[v]);
}

// Of one group the sums go from the registers to y: totals beside them would not fit there.
template <int kVectors, int kTokens, int kPlanes, bool kIsOneGroup>
void multiply_groups(const TernaryMatMulJob& job, const GroupShape& shape, const TokenBlock& tokens,
                     std::size_t panel) {
    constexpr int kRows = kTokens * kPlanes;
    const std::size_t stride = shape.num_blocks * kBlockBytes;
    const std::uint8_t* bytes = job.panels + panel * stride;
    const __m512i mask = _mm512_set1_epi8(3);
    const std::int8_t* q[kRows];
    for (int r = 0; r < kRows; ++r) q[r] = tokens.q[r];
    __m512 total[kVectors][kTokens];
    for (auto& of_vector : total) {
        for (auto& value : of_vector) value = _mm512_setzero_ps();
    }
    for (std::size_t g = 0; g < shape.num_groups; ++g) {
        __m512i dot[kVectors][kRows];
        for (auto& of_vector : dot) {
            for (auto& value : of_vector) value = _mm512_setzero_si512();
        }
        const std::size_t end = group_end(shape, g);
        for (std::size_t block = g * shape.group_blocks; block < end; ++block) {
            __m512i codes[kVectors];
            for (std::size_t v = 0; v < kVectors; ++v) {
                const std::uint8_t* place =
                    bytes + v / 2 * stride + block * kBlockBytes + v % 2 * kVectorBytes;
                if (kTokens == 1) fetch_ahead(place);
                codes[v] = _mm512_loadu_si512(place);
            }
#pragma GCC unroll 4
            for (int s = 0; s < 4; ++s) {
                __m512i weight[kVectors];
                for (int v = 0; v < kVectors; ++v) {
                    // Bits that cross from byte to byte are masked away.
                    const __m512i moved =
                        s == 0 ? codes[v] : _mm512_srli_epi16(codes[v], static_cast<unsigned>(2 * s));
                    weight[v] = _mm512_and_si512(moved, mask);
                }
#pragma GCC unroll 8
                for (int r = 0; r < kRows; ++r) {
                    const __m512i x =
                        four_columns(q[r] + block * kBlockColumns + 4 * static_cast<std::size_t>(s));
                    for (int v = 0; v < kVectors; ++v) dot[v][r] = add_four(dot[v][r], weight[v], x);
                }
            }
        }
        for (std::size_t v = 0; v < kVectors; ++v) {
            const std::size_t row = panel * kPanelRows + v * kVectorRows;
            for (int m = 0; m < kTokens; ++m) {
                __m512 sum = kIsOneGroup ? _mm512_setzero_ps() : total[v][m];
                for (std::size_t p = 0; p < kPlanes; ++p) {
                    sum = add_scaled(sum, dot[v][m * kPlanes + static_cast<int>(p)],
                                     tokens.sum[m][g * kPlanes + p], tokens.scale[m][g * kPlanes + p]);
                }
                if (kIsOneGroup) {
                    store_rows(job, tokens.y[m], row, sum);
                } else {
                    total[v][m] = sum;
                }
            }
        }
    }
    for (std::size_t v = 0; v < kVectors && !kIsOneGroup; ++v) {
        for (int m = 0; m < kTokens; ++m)
            store_rows(job, tokens.y[m], panel * kPanelRows + v * kVectorRows, total[v][m]);
    }
}

template <int kVectors, int kTokens, int kPlanes>
void multiply_block(const TernaryMatMulJob& job, const GroupShape& shape, const TokenBlock& tokens,
                    std::size_t panel) {
    if (shape.num_groups == 1) {
        multiply_groups<kVectors, kTokens, kPlanes, true>(job, shape, tokens, panel);
    } else {
        multiply_groups<kVectors, kTokens, kPlanes, false>(job, shape, tokens, panel);
    }
}

template <int kPanels, int kTokens, int kPlanes>
void multiply_panels(const TernaryMatMulJob& job, const GroupShape& shape, const TokenBlock& tokens) {
    std::size_t panel = job.panel_begin;
    for (; kPanels > 1 && panel + kPanels <= job.panel_end; panel += kPanels)
        multiply_block<kPanels * kPanelVectors, kTokens, kPlanes>(job, shape, tokens, panel);
    for (; panel < job.panel_end; ++panel) {
        if (fits_a_vector(job, panel)) {
            multiply_block<1, kTokens, kPlanes>(job, shape, tokens, panel);
        } else {
            multiply_block<kPanelVectors, kTokens, kPlanes>(job, shape, tokens, panel);
        }
    }
}

void multiply_one_plane(const TernaryMatMulJob& job, const GroupShape& shape, const TokenBlock& tokens,
                        std::size_t count) {
    switch (count) {
        case 1:
            for (std::size_t panel = job.panel_begin; panel < job.panel_end; ++panel) {
                if (fits_a_vector(job, panel)) {
                    multiply_one<1>(job, shape, tokens, panel);
                } else {
                    multiply_one<kPanelVectors>(job, shape, tokens, panel);
                }
            }
            return;
        case 2:
            return multiply_panels<2, 2, 1>(job, shape, tokens);
        case 3:
            return multiply_panels<2, 3, 1>(job, shape, tokens);
        case 4:
            return multiply_panels<2, 4, 1>(job, shape, tokens);
        case 5:
            return multiply_panels<1, 5, 1>(job, shape, tokens);
        case 6:
            return multiply_panels<1, 6, 1>(job, shape, tokens);
        case 7:
            return multiply_panels<1, 7, 1>(job, shape, tokens);
        default:
            return multiply_panels<1, 8, 1>(job, shape, tokens);
    }
}

}  // namespace

void ternary_matmul_avx512_vnni(const TernaryMatMulJob& job) {
    const GroupShape shape = group_shape(job);
    if (job.num_planes == 1) {
        for_token_blocks(job, shape, 8, [&](const TokenBlock& tokens, std::size_t count) {
            multiply_one_plane(job, shape, tokens, count);
        });
        return;
    }
    for_token_blocks(job, shape, 2, [&](const TokenBlock& tokens, std::size_t count) {
        if (count == 1) {
            multiply_panels<1, 1, 3>(job, shape, tokens);
        } else {
            multiply_panels<1, 2, 3>(job, shape, tokens);
        }
    });
}

}  // namespace trix
