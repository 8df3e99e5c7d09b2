#include <algorithm>

#include "kernels/sum_parts/sum_parts.hpp"

namespace trix {

void sum_parts_scalar(const SumPartsJob& job) {
    for (std::size_t t = job.token_begin; t < job.token_end; ++t) {
        float* sum = job.y + t * job.width;
        std::fill_n(sum, job.width, 0.0f);
        for (std::size_t k = 0; k < job.top_k; ++k) {
            const std::int64_t place = job.part_idx[t * job.top_k + k];
            if (place < 0) continue;
            const float* part = job.part + static_cast<std::size_t>(place) * job.width;
            const float factor = job.weight[t * job.top_k + k];
            for (std::size_t d = 0; d < job.width; ++d) sum[d] += factor * part[d];
        }
    }
}

}  // namespace trix
