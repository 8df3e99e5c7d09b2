// The reference, for the baseline of any CPU.
#define TRIX_LANES 4
#include "kernels/signature_gate/signature_gate_impl.hpp"

namespace trix {

void signature_gate_scalar(const SignatureGateJob& job) {
    signature_gate(job);
}

}  // namespace trix
