// What kernels.inc says, as declarations. A row TRIX_KERNEL(layer_norm, LayerNorm, avx2, scalar) gives
//
//   struct LayerNormJob;                                    defined in layer_norm/layer_norm.hpp
//   using LayerNormKernel = void (*)(const LayerNormJob&);
//   void layer_norm_avx2(const LayerNormJob& job);          where the build is for x86-64
//   void layer_norm_scalar(const LayerNormJob& job);
#pragma once

#if defined(TRIX_WITH_X86)
#define TRIX_ON_X86(...) __VA_ARGS__
#else
#define TRIX_ON_X86(...)
#endif
#if defined(TRIX_WITH_NEON)
#define TRIX_ON_NEON(...) __VA_ARGS__
#else
#define TRIX_ON_NEON(...)
#endif

// The instruction sets by their names in kernels.inc: TRIX_WHERE_<isa>(code) is the code if this build has
// the instruction set, else nothing.
#define TRIX_WHERE_scalar(...) __VA_ARGS__
#define TRIX_WHERE_avx2 TRIX_ON_X86
#define TRIX_WHERE_avx512_vnni TRIX_ON_X86
#define TRIX_WHERE_neon TRIX_ON_NEON
#define TRIX_WHERE_neon_dotprod TRIX_ON_NEON
#define TRIX_WHERE_none(...)

// visit(kernel, Name, isa) for each of at most five instruction sets.
#define TRIX_FOR_EACH_ISA(visit, kernel, Name, ...) \
    TRIX_FOR_FIVE_ISAS(visit, kernel, Name, __VA_ARGS__, none, none, none, none, none)
#define TRIX_FOR_FIVE_ISAS(visit, kernel, Name, a, b, c, d, e, ...)                             \
    visit(kernel, Name, a) visit(kernel, Name, b) visit(kernel, Name, c) visit(kernel, Name, d) \
        visit(kernel, Name, e)

namespace trix {

#define TRIX_VARIANT(kernel, Name, isa) TRIX_WHERE_##isa(void kernel##_##isa(const Name##Job& job);)
#define TRIX_KERNEL(kernel, Name, ...)                   \
    struct Name##Job;                                    \
    using Name##Kernel = void (*)(const Name##Job& job); \
    TRIX_FOR_EACH_ISA(TRIX_VARIANT, kernel, Name, __VA_ARGS__)
#include "kernels/kernels.inc"
#undef TRIX_KERNEL
#undef TRIX_VARIANT

}  // namespace trix
