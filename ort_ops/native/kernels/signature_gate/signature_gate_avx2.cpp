// The loops of the reference, compiled for AVX2.
#define TRIX_LANES 8
#include "kernels/signature_gate/signature_gate_impl.hpp"

namespace trix {

void signature_gate_avx2(const SignatureGateJob& job) {
    signature_gate(job);
}

}  // namespace trix
