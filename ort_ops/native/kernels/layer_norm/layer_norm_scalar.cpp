// The reference.
#define TRIX_LANES 4
#include "kernels/layer_norm/layer_norm_impl.hpp"

namespace trix {

void layer_norm_scalar(const LayerNormJob& job) {
    layer_norm(job);
}

}  // namespace trix
