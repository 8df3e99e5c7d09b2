// Which variant of each kernel runs: chosen once, when the library is first registered.
#pragma once

#include "kernels/cpu_features.hpp"
#include "kernels/layer_norm/layer_norm.hpp"
#include "kernels/quantize_rows/quantize_rows.hpp"
#include "kernels/signature_gate/signature_gate.hpp"
#include "kernels/signature_route/signature_route.hpp"
#include "kernels/sparse_lookup/sparse_lookup.hpp"
#include "kernels/ternary_matmul/ternary_matmul.hpp"

namespace trix {

template <typename Function>
struct KernelVariant {
    Isa isa;
    Function function;
    const char* name;
};

template <typename Function>
struct KernelVariants {
    const KernelVariant<Function>* rows;
    int count;
    const KernelVariant<Function>* begin() const { return rows; }
    const KernelVariant<Function>* end() const { return rows + count; }
};

/// Every variant that was compiled, best first: the rows of <kernel>/<kernel>.inc.
KernelVariants<TernaryMatMulKernel> ternary_matmul_variants();
KernelVariants<QuantizeRowsKernel> quantize_rows_variants();
KernelVariants<SignatureGateKernel> signature_gate_variants();
KernelVariants<SignatureRouteKernel> signature_route_variants();
KernelVariants<LayerNormKernel> layer_norm_variants();
KernelVariants<SparseLookupKernel> sparse_lookup_variants();

struct KernelTable {
    Isa isa;
    TernaryMatMulKernel ternary_matmul;
    QuantizeRowsKernel quantize_rows;
    SignatureGateKernel signature_gate;
    SignatureRouteKernel signature_route;
    LayerNormKernel layer_norm;
    SparseLookupKernel sparse_lookup;
};

/// The best variant of each kernel that the CPU supports, none above the instruction set named `requested`
/// (null or "": no limit). Throws std::invalid_argument if the name is unknown or the CPU or build lacks it.
KernelTable choose_kernels(const char* requested);

/// The table chosen by the environment variable TRIX_ORT_ISA; the choice is made by the first call that
/// succeeds.
const KernelTable& kernels();

}  // namespace trix
