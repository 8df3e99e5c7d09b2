// AVX2: eight tiles are compared at once with the worst tile chosen so far; only those that may rank before
// it are offered. The addition and the rank are the reference's own, so the choice is the same.
#include <immintrin.h>

#include "kernels/signature_route/signature_route.hpp"

namespace trix {

void signature_route_avx2(const SignatureRouteJob& job) {
    for (std::size_t t = job.token_begin; t < job.token_end; ++t) {
        ChosenTiles chosen{job.score + t * job.num_tiles, job.bias, job.tile_idx + t * job.top_k, job.top_k,
                           0};
        std::size_t tile = 0;
        while (tile < job.top_k) offer_tile(chosen, tile++);
        for (; tile + 8 <= job.num_tiles; tile += 8) {
            const float worst = key_of(chosen, static_cast<std::size_t>(chosen.tile_idx[job.top_k - 1]));
            const __m256 key =
                _mm256_add_ps(_mm256_loadu_ps(chosen.score + tile), _mm256_loadu_ps(job.bias + tile));
            // "Not less or equal" also holds where either side is NaN; offer_tile decides those.
            const __m256 may_rank_before = _mm256_cmp_ps(key, _mm256_set1_ps(worst), _CMP_NLE_UQ);
            auto lanes = static_cast<unsigned>(_mm256_movemask_ps(may_rank_before));
            for (; lanes != 0; lanes &= lanes - 1) {
                offer_tile(chosen, tile + static_cast<std::size_t>(__builtin_ctz(lanes)));
            }
        }
        for (; tile < job.num_tiles; ++tile) offer_tile(chosen, tile);
    }
}

}  // namespace trix
