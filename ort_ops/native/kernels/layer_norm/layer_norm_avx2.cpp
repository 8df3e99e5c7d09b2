// The loops of the reference, compiled for AVX2.
#define TRIX_LANES 8
#include "kernels/layer_norm/layer_norm_impl.hpp"

namespace trix {

void layer_norm_avx2(const LayerNormJob& job) {
    layer_norm(job);
}

}  // namespace trix
