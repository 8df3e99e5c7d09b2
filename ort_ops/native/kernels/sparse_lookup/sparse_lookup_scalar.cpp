// The reference, for the baseline of any CPU.
#define TRIX_LANES 4
#define TRIX_TOKENS 1
#include "kernels/sparse_lookup/sparse_lookup_impl.hpp"

namespace trix {

void sparse_lookup_scalar(const SparseLookupJob& job) {
    sparse_lookup(job);
}

}  // namespace trix
