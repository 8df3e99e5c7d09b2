// On bits, as compilers make a branch of a comparison, which random signs make slow.
#include <cstdint>
#include <cstring>

#include "kernels/squared_relu/squared_relu.hpp"

namespace trix {

void squared_relu_scalar(const SquaredReluJob& job) {
    for (std::size_t i = job.begin; i < job.end; ++i) {
        std::int32_t bits;
        std::memcpy(&bits, job.x + i, sizeof(bits));
        const std::int32_t is_nan = -static_cast<std::int32_t>((bits & 0x7fffffff) > 0x7f800000);
        bits &= ~(bits >> 31) | is_nan;
        float positive;
        std::memcpy(&positive, &bits, sizeof(positive));
        job.x[i] = positive * positive;
    }
}

}  // namespace trix
