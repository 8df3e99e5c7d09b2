// The reference: every tile is offered in order of index.
#include "kernels/signature_route/signature_route.hpp"

namespace trix {

void signature_route_scalar(const SignatureRouteJob& job) {
    for (std::size_t t = job.token_begin; t < job.token_end; ++t) {
        ChosenTiles chosen{job.score + t * job.num_tiles, job.bias, job.tile_idx + t * job.top_k, job.top_k,
                           0};
        for (std::size_t tile = 0; tile < job.num_tiles; ++tile) offer_tile(chosen, tile);
    }
}

}  // namespace trix
