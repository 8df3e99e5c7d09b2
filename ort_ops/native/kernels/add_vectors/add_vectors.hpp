// Contract of the kernel: y[i] += x[i] in float32, for i in [0, size). No alignment asked; nothing outside
// the arrays, which do not overlap, is read.
#pragma once

#include <cstddef>

#include "kernels/kernel_list.hpp"

namespace trix {

struct AddVectorsJob {
    const float* x;
    float* y;
    std::size_t size;
};

}  // namespace trix
