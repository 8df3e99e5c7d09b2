#include "kernels/sparse_lookup/compress_strips.hpp"

#include <algorithm>

namespace trix {

std::vector<StripRow> lay_in_strips(const float* matrix, std::size_t num_rows, std::size_t num_columns) {
    std::vector<StripRow> strips(whole_strips(num_columns) / kStripColumns * num_rows);
    auto row = strips.begin();
    for (std::size_t column = 0; column < num_columns; column += kStripColumns) {
        const std::size_t count = std::min(kStripColumns, num_columns - column);
        for (std::size_t d = 0; d < num_rows; ++d, ++row)
            std::copy_n(matrix + d * num_columns + column, count, row->value);
    }
    return strips;
}

}  // namespace trix
