// The loops of the reference, compiled for AVX-512: twice the registers, of 256 bits.
#define TRIX_LANES 8
#include "kernels/resolvent_mix/resolvent_mix_impl.hpp"

namespace trix {

void resolvent_mix_avx512_vnni(const ResolventMixJob& job) {
    resolvent_mix(job);
}

}  // namespace trix
