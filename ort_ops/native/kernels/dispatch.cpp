#include "kernels/dispatch.hpp"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace trix {
namespace {

#define TRIX_KERNEL(isa, function) {isa, function, #function},

constexpr KernelVariant<TernaryMatMulKernel> kTernaryMatMulRows[] = {
#include "kernels/ternary_matmul/ternary_matmul.inc"
};
constexpr KernelVariant<QuantizeRowsKernel> kQuantizeRowsRows[] = {
#include "kernels/quantize_rows/quantize_rows.inc"
};
constexpr KernelVariant<SignatureGateKernel> kSignatureGateRows[] = {
#include "kernels/signature_gate/signature_gate.inc"
};
constexpr KernelVariant<SignatureRouteKernel> kSignatureRouteRows[] = {
#include "kernels/signature_route/signature_route.inc"
};
constexpr KernelVariant<LayerNormKernel> kLayerNormRows[] = {
#include "kernels/layer_norm/layer_norm.inc"
};
constexpr KernelVariant<SparseLookupKernel> kSparseLookupRows[] = {
#include "kernels/sparse_lookup/sparse_lookup.inc"
};

#undef TRIX_KERNEL

Isa best_isa() {
    Isa best = Isa::kScalar;
    for (Isa isa : kAllIsas) {
        if (cpu_supports(isa)) best = isa;
    }
    return best;
}

Isa requested_isa(const std::string& requested) {
    std::string known;
    for (Isa isa : kAllIsas) {
        if (requested == isa_name(isa)) {
            if (cpu_supports(isa)) return isa;
            throw std::invalid_argument("TRIX_ORT_ISA (" + requested +
                                        ") must be supported by this CPU and build, whose best is " +
                                        isa_name(best_isa()));
        }
        known += std::string(known.empty() ? "" : ", ") + isa_name(isa);
    }
    throw std::invalid_argument("TRIX_ORT_ISA (" + requested + ") must be one of: " + known);
}

template <typename Function>
Function best_variant(KernelVariants<Function> variants, Isa limit) {
    for (const auto& row : variants) {
        if (row.isa <= limit && cpu_supports(row.isa)) return row.function;
    }
    throw std::logic_error("a kernel list lacks its scalar row");
}

}  // namespace

KernelVariants<TernaryMatMulKernel> ternary_matmul_variants() {
    return {kTernaryMatMulRows, static_cast<int>(std::size(kTernaryMatMulRows))};
}

KernelVariants<QuantizeRowsKernel> quantize_rows_variants() {
    return {kQuantizeRowsRows, static_cast<int>(std::size(kQuantizeRowsRows))};
}

KernelVariants<SignatureGateKernel> signature_gate_variants() {
    return {kSignatureGateRows, static_cast<int>(std::size(kSignatureGateRows))};
}

KernelVariants<SignatureRouteKernel> signature_route_variants() {
    return {kSignatureRouteRows, static_cast<int>(std::size(kSignatureRouteRows))};
}

KernelVariants<LayerNormKernel> layer_norm_variants() {
    return {kLayerNormRows, static_cast<int>(std::size(kLayerNormRows))};
}

KernelVariants<SparseLookupKernel> sparse_lookup_variants() {
    return {kSparseLookupRows, static_cast<int>(std::size(kSparseLookupRows))};
}

KernelTable choose_kernels(const char* requested) {
    const bool is_limited = requested != nullptr && *requested != '\0';
    const Isa isa = is_limited ? requested_isa(requested) : best_isa();
    return {isa,
            best_variant(ternary_matmul_variants(), isa),
            best_variant(quantize_rows_variants(), isa),
            best_variant(signature_gate_variants(), isa),
            best_variant(signature_route_variants(), isa),
            best_variant(layer_norm_variants(), isa),
            best_variant(sparse_lookup_variants(), isa)};
}

const KernelTable& kernels() {
    static const KernelTable table = choose_kernels(std::getenv("TRIX_ORT_ISA"));
    return table;
}

}  // namespace trix
