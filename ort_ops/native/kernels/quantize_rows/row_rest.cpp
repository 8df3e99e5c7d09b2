#include "kernels/quantize_rows/row_rest.hpp"

#include <algorithm>
#include <cmath>

namespace trix {

bool take_from_rest(const float* x, const std::int8_t* q, const float* scale, std::size_t num_columns,
                    std::size_t group_columns, float* rest) noexcept {
    constexpr double kSmallest = 0x1p-100, kRounding = 0x1p-24;
    const std::size_t stride = ceil_div(num_columns, kBlockColumns) * kBlockColumns;
    bool has_rest = false;
    for (std::size_t k = 0; k < num_columns; ++k) {
        const auto step = static_cast<double>(scale[k / group_columns * 3 + 2]);
        const std::int32_t value = 65536 * q[k] + 256 * q[stride + k] + q[2 * stride + k];
        // value * step has 48 bits, so that it is exact.
        const double left = static_cast<double>(rest[k]) - value * step;
        const double least = std::max(std::abs(static_cast<double>(x[k])) * kRounding, kSmallest);
        const bool is_left = std::abs(left) > least;
        rest[k] = is_left ? static_cast<float>(left) : 0.0f;
        has_rest |= is_left;
    }
    return has_rest;
}

}  // namespace trix
