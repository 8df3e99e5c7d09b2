// NEON, the baseline of AArch64: 4 rows stand in a vector; products of 16 bits are added in pairs, and again
// in pairs.
#include "kernels/ternary_matmul/neon_panels.hpp"

namespace trix {
namespace {

struct AddFour {
    static inline int32x4_t add_four(int32x4_t dot, int8x16_t weight, int8x16_t x) {
        const int16x8_t low = vmull_s8(vget_low_s8(weight), vget_low_s8(x));
        const int16x8_t high = vmull_s8(vget_high_s8(weight), vget_high_s8(x));
        return vpadalq_s16(dot, vpaddq_s16(low, high));
    }
};

}  // namespace

void ternary_matmul_neon(const TernaryMatMulJob& job) {
    multiply_tokens<AddFour>(job);
}

}  // namespace trix
