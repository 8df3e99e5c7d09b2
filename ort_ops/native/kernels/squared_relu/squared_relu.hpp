// Contract of the kernel: x[i] = max(x[i], 0)^2 in float32, in place, for i in [begin, end). NaN stays NaN.
//
// Thread-safe on disjoint ranges. No alignment asked; nothing outside the range is read.
#pragma once

#include <cstddef>

#include "kernels/kernel_list.hpp"

namespace trix {

struct SquaredReluJob {
    float* x;
    std::size_t begin;
    std::size_t end;
};

}  // namespace trix
