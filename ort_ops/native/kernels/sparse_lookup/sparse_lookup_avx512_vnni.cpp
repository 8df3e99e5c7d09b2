// The loops of the reference, compiled for AVX-512.
#define TRIX_LANES 16
#include "kernels/sparse_lookup/sparse_lookup_impl.hpp"

namespace trix {

void sparse_lookup_avx512_vnni(const SparseLookupJob& job) {
    sparse_lookup(job);
}

}  // namespace trix
