#include <cmath>

#include "kernels/near_tiles/near_tiles.hpp"
#include "kernels/score_bound/score_bound.hpp"

namespace trix {

void near_tiles_scalar(const NearTilesJob& job) {
    const auto key = static_cast<double>(job.score[job.last] + job.bias[job.last]);
    const double lowest =
        std::abs(key) < kLargestScore ? key - 2 * (job.bound + std::abs(key) * 0x1p-20) : -HUGE_VAL;
    const float floor = std::nextafter(static_cast<float>(lowest), -HUGE_VALF);
    std::size_t num_found = 0;
    for (std::size_t tile = 0; tile < job.num_tiles; ++tile) {
        if (!(job.score[tile] + job.bias[tile] < floor))
            job.tile_idx[num_found++] = static_cast<std::int64_t>(tile);
    }
    *job.num_found = num_found;
}

}  // namespace trix
