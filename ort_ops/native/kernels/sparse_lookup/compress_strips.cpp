#include "kernels/sparse_lookup/compress_strips.hpp"

namespace trix {

void lay_in_strips(const float* matrix, std::size_t num_rows, std::size_t num_columns, StripRow* strips) {
    for (std::size_t column = 0; column < num_columns; column += kStripColumns) {
        for (std::size_t d = 0; d < num_rows; ++d, ++strips) {
            const float* row = matrix + d * num_columns;
            for (std::size_t c = 0; c < kStripColumns; ++c)
                strips->value[c] = column + c < num_columns ? row[column + c] : 0.0f;
        }
    }
}

}  // namespace trix
