#include <algorithm>

#include "kernels/scale_rows/scale_rows.hpp"

namespace trix {

void scale_rows_scalar(const ScaleRowsJob& job) {
    for (std::size_t t = job.token_begin; t < job.token_end; ++t) {
        float* row = job.y + t * job.width;
        const float factor = job.weight[t];
        if (factor == 0.0f) {
            std::fill_n(row, job.width, 0.0f);
        } else {
            for (std::size_t d = 0; d < job.width; ++d) row[d] *= factor;
        }
    }
}

}  // namespace trix
