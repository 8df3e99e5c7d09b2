// The reference.
#define TRIX_LANES 4
#include "kernels/resolvent_mix/resolvent_mix_impl.hpp"

namespace trix {

void resolvent_mix_scalar(const ResolventMixJob& job) {
    resolvent_mix(job);
}

}  // namespace trix
