// The loops of the reference, compiled for AVX2.
#define TRIX_LANES 8
#define TRIX_TOKENS 3
#include "kernels/sparse_lookup/sparse_lookup_impl.hpp"

namespace trix {

void sparse_lookup_avx2(const SparseLookupJob& job) {
    sparse_lookup(job);
}

}  // namespace trix
