// The reference, for the baseline of any CPU.
#include "kernels/quantize_rows/quantize_rows_impl.hpp"

namespace trix {

void quantize_rows_scalar(const QuantizeRowsJob& job) {
    quantize_rows<PlainLoops>(job);
}

}  // namespace trix
