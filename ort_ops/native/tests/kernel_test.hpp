// What the C++ tests share: a check that goes on after a failure, random values, and the declaration of the
// test of each kernel, test_<kernel> in test_<kernel>.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "kernels/dispatch.hpp"

namespace trix_tests {

using namespace trix;

inline int failures = 0;

#define EXPECT(condition, ...)                                          \
    do {                                                                \
        if (!(condition)) {                                             \
            ++failures;                                                 \
            std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            std::printf(__VA_ARGS__);                                   \
            std::printf("\n");                                          \
        }                                                               \
    } while (false)

inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline std::mt19937 random_bits(20240229);

inline std::size_t random_below(std::size_t limit) {
    return random_bits() % limit;
}

inline float random_value() {
    return std::normal_distribution<float>()(random_bits);
}

// Equal bits, or both NaN.
inline bool same(float a, float b) {
    return std::memcmp(&a, &b, sizeof(a)) == 0 || (std::isnan(a) && std::isnan(b));
}

inline std::vector<float> random_values(std::size_t count) {
    std::vector<float> values(count);
    for (float& value : values) value = random_value();
    return values;
}

inline constexpr float kUntouched = -12345.0f;

// Runs one variant: its values against the contract, and its bits against those of the reference.
#define TRIX_KERNEL(kernel, Name, ...) void test_##kernel(const KernelVariant<Name##Kernel>& variant);
#include "kernels/kernels.inc"
#undef TRIX_KERNEL

}  // namespace trix_tests
