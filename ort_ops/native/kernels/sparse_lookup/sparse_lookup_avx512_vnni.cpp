// The loops of the reference, compiled for AVX-512: twice the registers, of 256 bits, as wider ones are no
// faster without fused products.
#define TRIX_LANES 8
#define TRIX_TOKENS 6
#include "kernels/sparse_lookup/sparse_lookup_impl.hpp"

namespace trix {

void sparse_lookup_avx512_vnni(const SparseLookupJob& job) {
    sparse_lookup(job);
}

}  // namespace trix
