// What 24 bits leave of a row, to be quantised in its turn. Portable code, no variants.
#pragma once

#include "kernels/ternary_panels.hpp"

namespace trix {

/// rest[k] -= v[k] * scale of a row of three planes, as quantize_rows.hpp writes them; then 0 where |rest[k]|
/// is at most |x[k]| 2^-24, which float32 would round away, is below 2^-100, or is not a number. Returns
/// whether anything is left. rest starts as x; after a row of a finite x, |rest| <= m 2^-22.
bool take_from_rest(const float* x, const std::int8_t* q, const float* scale, std::size_t num_columns,
                    std::size_t group_columns, float* rest) noexcept;

}  // namespace trix
