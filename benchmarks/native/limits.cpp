// What one thread of this CPU can do at most: int8 dot products in registers, and reading of memory. Prints
// three numbers: multiply-adds of int8 per second with AVX-512 VNNI and with AVX2 (0 without), and bytes per
// second read from memory (128 MiB in pages as large as the system gives).
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

double seconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512vnni"))) double int8_products() {
    __m512i sum[12], one = _mm512_set1_epi8(1);
    for (int j = 0; j < 12; ++j) sum[j] = _mm512_setzero_si512();
    asm volatile("" : "+v"(one));  // not a constant to the compiler
    constexpr std::size_t kSteps = 500000;
    double best = 1e9;
    for (int round = 0; round < 20; ++round) {
        const double start = seconds();
        for (std::size_t i = 0; i < kSteps; ++i) {
#pragma GCC unroll 12
            for (int j = 0; j < 12; ++j) sum[j] = _mm512_dpbusd_epi32(sum[j], one, one);
        }
        const double elapsed = seconds() - start;
        if (elapsed < best) best = elapsed;
    }
    for (int j = 0; j < 12; ++j) asm volatile("" : : "v"(sum[j]));
    return 64.0 * 12.0 * static_cast<double>(kSteps) / best;
}

// Products of bytes, added in pairs, and their sum in 16 bits: two instructions for 32 multiply-adds.
__attribute__((target("avx2"))) double avx2_products() {
    __m256i sum[12], one = _mm256_set1_epi8(1);
    for (int j = 0; j < 12; ++j) sum[j] = _mm256_setzero_si256();
    constexpr std::size_t kSteps = 500000;
    double best = 1e9;
    for (int round = 0; round < 20; ++round) {
        const double start = seconds();
        for (std::size_t i = 0; i < kSteps; ++i) {
#pragma GCC unroll 12
            for (int j = 0; j < 12; ++j) {
                asm volatile("" : "+x"(one));  // each product is computed anew
                sum[j] = _mm256_add_epi16(sum[j], _mm256_maddubs_epi16(one, one));
            }
        }
        const double elapsed = seconds() - start;
        if (elapsed < best) best = elapsed;
    }
    for (int j = 0; j < 12; ++j) asm volatile("" : : "x"(sum[j]));
    return 32.0 * 12.0 * static_cast<double>(kSteps) / best;
}
#endif

double read_bytes() {
    constexpr std::size_t kBytes = std::size_t{128} << 20;
    auto* memory = static_cast<std::uint64_t*>(std::aligned_alloc(std::size_t{2} << 20, kBytes));
    if (memory == nullptr) return 0;
#if defined(__linux__)
    madvise(memory, kBytes, MADV_HUGEPAGE);
#endif
    for (std::size_t i = 0; i < kBytes / 8; ++i) memory[i] = i;
    double best = 1e9;
    std::uint64_t sum[8] = {};
    for (int round = 0; round < 5; ++round) {
        const double start = seconds();
        for (std::size_t i = 0; i < kBytes / 8; i += 8) {
            for (std::size_t j = 0; j < 8; ++j) sum[j] += memory[i + j];
        }
        const double elapsed = seconds() - start;
        if (elapsed < best) best = elapsed;
    }
    asm volatile("" : : "r"(sum) : "memory");
    std::free(memory);
    return static_cast<double>(kBytes) / best;
}

}  // namespace

int main() {
    double products = 0, products_of_avx2 = 0;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512vnni")) products = int8_products();
    if (__builtin_cpu_supports("avx2")) products_of_avx2 = avx2_products();
#endif
    std::printf("%.6g %.6g %.6g\n", products, products_of_avx2, read_bytes());
}
