// AVX-512, on CPUs that have VNNI too: 16 columns at a time, the last ones under a mask.
#include <immintrin.h>

#include "kernels/quantize_rows/quantize_rows_impl.hpp"

namespace trix {
namespace {

constexpr std::size_t kVector = 16;
constexpr int kToEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

// Calls body(k, mask) for 16 columns at a time: without a mask to apply but for the last.
template <typename Body>
inline __attribute__((always_inline)) void for_vectors(std::size_t count, const Body& body) {
    std::size_t k = 0;
    for (; k + kVector <= count; k += kVector) body(k, static_cast<__mmask16>(0xffff));
    if (k < count) body(k, static_cast<__mmask16>((1u << (count - k)) - 1u));
}

// To a register and from there to memory: the instruction that does both is slow on Zen 4.
inline void store_bytes(std::int8_t* q, __mmask16 mask, __m512i value) {
    const __m128i bytes = _mm512_cvtepi32_epi8(value);
    if (mask == 0xffff) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q), bytes);
    } else {
        _mm_mask_storeu_epi8(q, mask, bytes);
    }
}

// The digits of base 256 in the bytes of each value: v + 128 (256^2 + 256 + 1) has each digit + 128.
inline __m512i to_digits(__m512i value) {
    const __m512i offset = _mm512_set1_epi32(0x808080);
    return _mm512_xor_si512(_mm512_add_epi32(value, offset), offset);
}

// sum + digit number p of each value.
inline __m512i add_digit(__m512i sum, int p, __m512i digits) {
    return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(1 << (8 * p)), digits);
}

inline __m256i scaled(__m256 x, __m512d factor) {
    return _mm512_cvt_roundpd_epi32(_mm512_mul_pd(_mm512_cvtps_pd(x), factor), kToEven);
}

struct VectorLoops {
    static float largest_magnitude(const float* x, std::size_t count) {
        const __m512i no_sign = _mm512_set1_epi32(0x7fffffff);
        __m512i largest = _mm512_setzero_si512();
        for_vectors(count, [&](std::size_t k, __mmask16 mask) {
            const __m512i bits = _mm512_maskz_loadu_epi32(mask, x + k);
            largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, no_sign));
        });
        const std::uint32_t bits = _mm512_reduce_max_epu32(largest);
        float m;
        __builtin_memcpy(&m, &bits, sizeof(m));
        return m;
    }

    static std::int32_t quantize_8(const float* x, std::size_t count, float factor, std::int8_t* q) {
        const __m512 factors = _mm512_set1_ps(factor);
        __m512i sum = _mm512_setzero_si512();
        for_vectors(count, [&](std::size_t k, __mmask16 mask) {
            const __m512 product = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + k), factors);
            const __m512i value = _mm512_cvt_roundps_epi32(product, kToEven);
            store_bytes(q + k, mask, value);
            sum = _mm512_add_epi32(sum, value);
        });
        return _mm512_reduce_add_epi32(sum);
    }

    static void quantize_24(const float* x, std::size_t count, double factor, std::int8_t* q,
                            std::size_t stride, std::int32_t* sum) {
        const __m512d factors = _mm512_set1_pd(factor);
        __m512i high = _mm512_setzero_si512(), middle = high, low = high;
        for_vectors(count, [&](std::size_t k, __mmask16 mask) {
            const __m512 from = _mm512_maskz_loadu_ps(mask, x + k);
            const __m256 last = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(from), 1));
            const __m256i first_scaled = scaled(_mm512_castps512_ps256(from), factors);
            const __m512i digits =
                to_digits(_mm512_inserti64x4(_mm512_castsi256_si512(first_scaled), scaled(last, factors), 1));
            store_bytes(q + k, mask, _mm512_srli_epi32(digits, 16));
            store_bytes(q + stride + k, mask, _mm512_srli_epi32(digits, 8));
            store_bytes(q + 2 * stride + k, mask, digits);
            high = add_digit(high, 2, digits);
            middle = add_digit(middle, 1, digits);
            low = add_digit(low, 0, digits);
        });
        sum[0] = _mm512_reduce_add_epi32(high);
        sum[1] = _mm512_reduce_add_epi32(middle);
        sum[2] = _mm512_reduce_add_epi32(low);
    }
};

}  // namespace

void quantize_rows_avx512_vnni(const QuantizeRowsJob& job) {
    quantize_rows<VectorLoops>(job);
}

}  // namespace trix
