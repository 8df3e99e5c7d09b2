// The loops of the reference, compiled for AVX-512: twice the registers, of 256 bits, as wider ones are no
// faster without fused products.
#define TRIX_LANES 8
#include "kernels/layer_norm/layer_norm_impl.hpp"

namespace trix {

void layer_norm_avx512_vnni(const LayerNormJob& job) {
    layer_norm(job);
}

}  // namespace trix
