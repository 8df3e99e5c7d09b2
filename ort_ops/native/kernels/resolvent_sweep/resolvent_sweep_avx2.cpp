// The loops of the reference, compiled for AVX2.
#define TRIX_LANES 8
#include "kernels/resolvent_sweep/resolvent_sweep_impl.hpp"

namespace trix {

void resolvent_sweep_avx2(const ResolventSweepJob& job) {
    resolvent_sweep(job);
}

}  // namespace trix
