// The layout of the matrix that the lookup kernel multiplies with: columns in strips of 32, each strip row by
// row, with zeros beside the last column. Portable code, no variants.
#pragma once

#include <cstddef>

namespace trix {

inline constexpr std::size_t kStripColumns = 32;

/// One row of a strip, which starts a line of the cache.
struct alignas(64) StripRow {
    float value[kStripColumns];
};

/// Columns of a matrix with those beside the last one: a multiple of 32.
static constexpr std::size_t whole_strips(std::size_t num_columns) {
    return (num_columns + kStripColumns - 1) / kStripColumns * kStripColumns;
}

/// Rows of all strips of a matrix.
static constexpr std::size_t num_strip_rows(std::size_t num_rows, std::size_t num_columns) {
    return whole_strips(num_columns) / kStripColumns * num_rows;
}

/// matrix [num_rows, num_columns] as num_strip_rows rows, strip after strip.
void lay_in_strips(const float* matrix, std::size_t num_rows, std::size_t num_columns, StripRow* strips);

}  // namespace trix
