// The loops of the reference, compiled for AVX2.
#include "kernels/quantize_rows/quantize_rows_impl.hpp"

namespace trix {

void quantize_rows_avx2(const QuantizeRowsJob& job) {
    quantize_rows<PlainLoops>(job);
}

}  // namespace trix
