// Checks and counts over packed 2-bit codes (layout: ternary_tile_matmul.hpp). Portable code, no variants.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trix {

inline constexpr std::size_t kNotFound = static_cast<std::size_t>(-1);

/// ceil(num_columns / 4): the bytes of a row.
inline std::int64_t packed_row_bytes(std::int64_t num_columns) {
    return num_columns / 4 + (num_columns % 4 != 0);
}

/// Index of the first byte that holds the reserved code 11, or kNotFound.
std::size_t find_reserved_code(const std::uint8_t* packed, std::size_t num_bytes);

/// The bitwise OR of the last byte of every row: all bits that any row uses there.
std::uint8_t union_of_last_bytes(const std::uint8_t* packed, std::size_t num_rows, std::size_t row_bytes);

/// The bits of a row's last byte that lie past column num_columns and must be 0.
inline std::uint8_t padding_mask(std::int64_t num_columns) {
    const int used_codes = static_cast<int>(num_columns % 4);
    return used_codes == 0 ? std::uint8_t{0} : static_cast<std::uint8_t>(0xff << (2 * used_codes));
}

/// inverse_norm[n] = 1 / sqrt(max(nnz of row n, 1)), float32 operations in that order. The codes must be
/// valid.
void inverse_row_norms(const std::uint8_t* packed, std::size_t num_rows, std::size_t row_bytes,
                       float* inverse_norm);

}  // namespace trix
