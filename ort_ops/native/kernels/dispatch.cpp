#include "kernels/dispatch.hpp"

#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

namespace trix {
namespace {

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
    throw std::logic_error("a row of kernels.inc must end in scalar");
}

}  // namespace

// The value of Isa that an instruction set of kernels.inc has.
#define TRIX_ISA_scalar Isa::kScalar
#define TRIX_ISA_avx2 Isa::kAvx2
#define TRIX_ISA_avx512_vnni Isa::kAvx512Vnni
#define TRIX_ISA_neon Isa::kNeon
#define TRIX_ISA_neon_dotprod Isa::kNeonDotprod

#define TRIX_VARIANT(kernel, Name, isa) TRIX_WHERE_##isa({TRIX_ISA_##isa, kernel##_##isa, #kernel "_" #isa}, )
#define TRIX_KERNEL(kernel, Name, ...)                                                                       \
    KernelVariants<Name##Kernel> kernel##_variants() {                                                       \
        static constexpr KernelVariant<Name##Kernel> kRows[] = {                                             \
            TRIX_FOR_EACH_ISA(TRIX_VARIANT, kernel, Name, __VA_ARGS__)};                                     \
        static_assert(kRows[std::size(kRows) - 1].isa == Isa::kScalar, #kernel "'s row must end in scalar"); \
        return {kRows, static_cast<int>(std::size(kRows))};                                                  \
    }
#include "kernels/kernels.inc"
#undef TRIX_KERNEL
#undef TRIX_VARIANT

KernelTable choose_kernels(const char* requested) {
    const bool is_limited = requested != nullptr && *requested != '\0';
    const Isa isa = is_limited ? requested_isa(requested) : best_isa();
    KernelTable table{};
    table.isa = isa;
#define TRIX_KERNEL(kernel, Name, ...) table.kernel = best_variant(kernel##_variants(), isa);
#include "kernels/kernels.inc"
#undef TRIX_KERNEL
    return table;
}

const KernelTable& kernels() {
    static const KernelTable table = choose_kernels(std::getenv("TRIX_ORT_ISA"));
    return table;
}

}  // namespace trix
