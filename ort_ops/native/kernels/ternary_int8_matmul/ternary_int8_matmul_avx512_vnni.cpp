// AVX-512 with VNNI. Nothing from the standard library and only internal linkage here: see the rules in
// kernels/README.md.
//
// 16 rows stand in a vector, and vpdpbusd adds four columns of each. With one token the four fields of a byte
// are masked where they stand and summed apart, for the shift of a sum at the end costs less than one of
// every vector. With more tokens each field is moved down once and serves all of them; one panel by eight
// tokens, or two panels by up to four, keep 16 sums in registers: enough to hide the latency, few enough to
// spill nothing.
#include <immintrin.h>

#include "kernels/ternary_int8_matmul/ternary_int8_matmul.hpp"

namespace trix {
namespace {

#define TRIX_INLINE inline __attribute__((always_inline))

constexpr std::size_t kVectorRows = 16;
constexpr std::size_t kVectorBytes = 64;
constexpr std::size_t kMaxTokens = 8;

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

TRIX_INLINE __m512i four_columns(const std::int8_t* q) {
    std::int32_t four;
    __builtin_memcpy(&four, q, sizeof(four));
    return _mm512_set1_epi32(four);
}

TRIX_INLINE __m512 scaled(__m512i dot, std::int32_t sum, float scale) {
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(dot, _mm512_set1_epi32(sum))),
                         _mm512_set1_ps(scale));
}

// Rows [row, row + 16) of y, as far as there are so many.
TRIX_INLINE void store_rows(const TernaryInt8MatMulJob& job, float* y, std::size_t row, __m512 total) {
    if (row >= job.num_rows) return;
    const std::size_t left = job.num_rows - row;
    const auto mask = static_cast<__mmask16>(left >= kVectorRows ? 0xffffu : (1u << left) - 1u);
    const __m512 scale = _mm512_maskz_loadu_ps(mask, job.row_scale + row);
    _mm512_mask_storeu_ps(y + row, mask, _mm512_mul_ps(scale, total));
}

// _mm512_dpbusd_epi32, around which GCC 12 copies every sum to another register and back: a twelfth of the
// time of one token.
TRIX_INLINE __m512i add_four(__m512i dot, __m512i weight, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(dot) : "v"(weight), "v"(x));
    return dot;
}

// One token.
template <int kPanels>
void multiply_one(const TernaryInt8MatMulJob& job, const Shape& shape, const Tokens& tokens,
                  std::size_t panel) {
    const std::uint8_t* bytes = job.panels + panel * shape.num_blocks * kBlockBytes;
    constexpr int kVectors = 2 * kPanels;
    const std::size_t stride = shape.num_blocks * kBlockBytes;
    const std::int8_t* q = tokens.q[0];
    __m512i mask[4];
    for (int s = 0; s < 4; ++s) mask[s] = _mm512_set1_epi8(static_cast<char>(3 << (2 * s)));
    __m512 total[kVectors];
    for (auto& value : total) value = _mm512_setzero_ps();
    for (std::size_t g = 0; g < shape.num_groups; ++g) {
        __m512i dot[kVectors][4];
        for (int h = 0; h < kVectors; ++h) {
            for (int s = 0; s < 4; ++s) dot[h][s] = _mm512_setzero_si512();
        }
        const std::size_t begin = g * shape.group_blocks;
        const std::size_t left = shape.num_blocks - begin;
        const std::size_t end = begin + (left < shape.group_blocks ? left : shape.group_blocks);
        for (std::size_t block = begin; block < end; ++block) {
            __m512i x[4];
            for (std::size_t s = 0; s < 4; ++s) x[s] = four_columns(q + block * kBlockColumns + 4 * s);
            for (std::size_t h = 0; h < kVectors; ++h) {
                const __m512i codes =
                    _mm512_loadu_si512(bytes + h / 2 * stride + block * kBlockBytes + h % 2 * kVectorBytes);
                for (int s = 0; s < 4; ++s)
                    dot[h][s] = add_four(dot[h][s], _mm512_and_si512(codes, mask[s]), x[s]);
            }
        }
        for (int h = 0; h < kVectors; ++h) {
            const __m512i low = _mm512_add_epi32(dot[h][0], _mm512_srai_epi32(dot[h][1], 2));
            const __m512i high =
                _mm512_add_epi32(_mm512_srai_epi32(dot[h][2], 4), _mm512_srai_epi32(dot[h][3], 6));
            total[h] = _mm512_add_ps(
                total[h], scaled(_mm512_add_epi32(low, high), tokens.sum[0][g], tokens.scale[0][g]));
        }
    }
    for (std::size_t h = 0; h < kVectors; ++h)
        store_rows(job, tokens.y[0], panel * kPanelRows + h * kVectorRows, total[h]);
}

template <int kPanels, int kTokens>
void multiply_block(const TernaryInt8MatMulJob& job, const Shape& shape, const Tokens& tokens,
                    std::size_t panel) {
    constexpr int kVectors = 2 * kPanels;
    const std::uint8_t* bytes = job.panels + panel * shape.num_blocks * kBlockBytes;
    const std::size_t stride = shape.num_blocks * kBlockBytes;
    const __m512i mask = _mm512_set1_epi8(3);
    const std::int8_t* q[kTokens];
    for (int m = 0; m < kTokens; ++m) q[m] = tokens.q[m];
    __m512 total[kVectors][kTokens];
    for (int v = 0; v < kVectors; ++v) {
        for (int m = 0; m < kTokens; ++m) total[v][m] = _mm512_setzero_ps();
    }
    for (std::size_t g = 0; g < shape.num_groups; ++g) {
        __m512i dot[kVectors][kTokens];
        for (int v = 0; v < kVectors; ++v) {
            for (int m = 0; m < kTokens; ++m) dot[v][m] = _mm512_setzero_si512();
        }
        const std::size_t begin = g * shape.group_blocks;
        const std::size_t left = shape.num_blocks - begin;
        const std::size_t end = begin + (left < shape.group_blocks ? left : shape.group_blocks);
        for (std::size_t block = begin; block < end; ++block) {
            __m512i codes[kVectors];
            for (std::size_t v = 0; v < kVectors; ++v) {
                codes[v] =
                    _mm512_loadu_si512(bytes + v / 2 * stride + block * kBlockBytes + v % 2 * kVectorBytes);
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
                for (int m = 0; m < kTokens; ++m) {
                    const __m512i x =
                        four_columns(q[m] + block * kBlockColumns + 4 * static_cast<std::size_t>(s));
                    for (int v = 0; v < kVectors; ++v) dot[v][m] = add_four(dot[v][m], weight[v], x);
                }
            }
        }
        for (int v = 0; v < kVectors; ++v) {
            for (int m = 0; m < kTokens; ++m)
                total[v][m] =
                    _mm512_add_ps(total[v][m], scaled(dot[v][m], tokens.sum[m][g], tokens.scale[m][g]));
        }
    }
    for (std::size_t v = 0; v < kVectors; ++v) {
        for (int m = 0; m < kTokens; ++m)
            store_rows(job, tokens.y[m], panel * kPanelRows + v * kVectorRows, total[v][m]);
    }
}

void multiply_panels_once(const TernaryInt8MatMulJob& job, const Shape& shape, const Tokens& tokens) {
    std::size_t panel = job.panel_begin;
    for (; panel + 2 <= job.panel_end; panel += 2) multiply_one<2>(job, shape, tokens, panel);
    for (; panel < job.panel_end; ++panel) multiply_one<1>(job, shape, tokens, panel);
}

template <int kPanels, int kTokens>
void multiply_panels(const TernaryInt8MatMulJob& job, const Shape& shape, const Tokens& tokens) {
    std::size_t panel = job.panel_begin;
    for (; panel + kPanels <= job.panel_end; panel += kPanels)
        multiply_block<kPanels, kTokens>(job, shape, tokens, panel);
    for (; panel < job.panel_end; ++panel) multiply_block<1, kTokens>(job, shape, tokens, panel);
}

}  // namespace

void ternary_int8_matmul_avx512_vnni(const TernaryInt8MatMulJob& job) {
    const std::size_t num_blocks = ceil_div(job.num_columns, kBlockColumns);
    const Shape shape{num_blocks, job.group_columns / kBlockColumns,
                      ceil_div(num_blocks * kBlockColumns, job.group_columns)};
    const std::size_t num_steps = ceil_div(job.num_tokens, kMaxTokens);
    std::size_t begin = 0;
    for (std::size_t step = 0; step < num_steps; ++step) {
        const std::size_t end =
            job.num_tokens * (step + 1) / num_steps;  // even shares: nine tokens run as 4 + 5
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
                multiply_panels_once(job, shape, tokens);
                break;
            case 2:
                multiply_panels<2, 2>(job, shape, tokens);
                break;
            case 3:
                multiply_panels<2, 3>(job, shape, tokens);
                break;
            case 4:
                multiply_panels<2, 4>(job, shape, tokens);
                break;
            case 5:
                multiply_panels<1, 5>(job, shape, tokens);
                break;
            case 6:
                multiply_panels<1, 6>(job, shape, tokens);
                break;
            case 7:
                multiply_panels<1, 7>(job, shape, tokens);
                break;
            default:
                multiply_panels<1, 8>(job, shape, tokens);
                break;
        }
        begin = end;
    }
}

}  // namespace trix
