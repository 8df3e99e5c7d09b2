// NEON with the dot product of bytes (Armv8.2): 4 rows stand in a vector, and sdot adds four columns of each.
#include "kernels/ternary_matmul/neon_panels.hpp"

namespace trix {
namespace {

struct AddFour {
    static inline int32x4_t add_four(int32x4_t dot, int8x16_t weight, int8x16_t x) {
        return vdotq_s32(dot, weight, x);
    }
};

}  // namespace

void ternary_matmul_neon_dotprod(const TernaryMatMulJob& job) {
    multiply_tokens<AddFour>(job);
}

}  // namespace trix
