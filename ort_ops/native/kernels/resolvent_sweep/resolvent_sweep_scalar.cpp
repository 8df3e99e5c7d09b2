// The reference.
#define TRIX_LANES 4
#include "kernels/resolvent_sweep/resolvent_sweep_impl.hpp"

namespace trix {

void resolvent_sweep_scalar(const ResolventSweepJob& job) {
    resolvent_sweep(job);
}

}  // namespace trix
