#include <cmath>

#include "kernels/score_bound/score_bound.hpp"

namespace trix {

void score_bound_scalar(const ScoreBoundJob& job) {
    constexpr double kLargestQ = 127;
    const double rounding = 0x1p-16 + static_cast<double>(job.num_groups) * 0x1p-21;
    const auto num_columns = static_cast<double>(job.num_groups * job.group_columns);
    for (std::size_t t = job.token_begin; t < job.token_end; ++t) {
        double error = 0, length = 0;
        for (std::size_t g = 0; g < job.num_groups; ++g) {
            const auto scale = static_cast<double>(job.scale[t * job.num_groups + g]);
            error += static_cast<double>(job.squared_rest[t * job.num_groups + g]) * scale * scale;
            length += static_cast<double>(job.group_columns) * kLargestQ * kLargestQ * scale * scale;
        }
        const bool may_overflow = std::sqrt(length * num_columns) > kLargestScore;
        job.bound[t] = may_overflow ? HUGE_VAL : std::sqrt(error) + std::sqrt(length) * rounding;
    }
}

}  // namespace trix
