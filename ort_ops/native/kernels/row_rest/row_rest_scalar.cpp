#include <algorithm>
#include <cmath>

#include "kernels/row_rest/row_rest.hpp"

namespace trix {

void row_rest_scalar(const RowRestJob& job) {
    constexpr double kSmallest = 0x1p-100, kRounding = 0x1p-24;
    const std::size_t stride = ceil_div(job.num_columns, kBlockColumns) * kBlockColumns;
    const std::int8_t* q = job.q;
    bool has_rest = false;
    for (std::size_t k = 0; k < job.num_columns; ++k) {
        const auto step = static_cast<double>(job.scale[k / job.group_columns * 3 + 2]);
        const std::int32_t value = 65536 * q[k] + 256 * q[stride + k] + q[2 * stride + k];
        // value * step has 48 bits, so that it is exact.
        const double left = static_cast<double>(job.rest[k]) - value * step;
        const double least = std::max(std::abs(static_cast<double>(job.x[k])) * kRounding, kSmallest);
        const bool is_left = std::abs(left) > least;
        job.rest[k] = is_left ? static_cast<float>(left) : 0.0f;
        has_rest |= is_left;
    }
    *job.has_rest = has_rest;
}

}  // namespace trix
