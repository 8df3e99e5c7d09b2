// Which variant of each kernel runs: chosen once, when the library is first registered.
#pragma once

#include "kernels/cpu_features.hpp"
#include "kernels/kernel_list.hpp"

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

/// <kernel>_variants(): every variant of the kernel that was compiled, best first.
#define TRIX_KERNEL(kernel, Name, ...) KernelVariants<Name##Kernel> kernel##_variants();
#include "kernels/kernels.inc"
#undef TRIX_KERNEL

/// One function of each kernel, under the kernel's name.
struct KernelTable {
    Isa isa;
#define TRIX_KERNEL(kernel, Name, ...) Name##Kernel kernel;
#include "kernels/kernels.inc"
#undef TRIX_KERNEL
};

/// The best variant of each kernel that the CPU supports, none above the instruction set named `requested`
/// (null or "": no limit). Throws std::invalid_argument if the name is unknown or the CPU or build lacks it.
KernelTable choose_kernels(const char* requested);

/// The table chosen by the environment variable TRIX_ORT_ISA; the choice is made by the first call that
/// succeeds.
const KernelTable& kernels();

}  // namespace trix
