// The loops of the reference, compiled for AVX2.
#define TRIX_LANES 8
#include "kernels/resolvent_mix/resolvent_mix_impl.hpp"

namespace trix {

void resolvent_mix_avx2(const ResolventMixJob& job) {
    resolvent_mix(job);
}

}  // namespace trix
