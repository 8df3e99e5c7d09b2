// The only file that asks the CPU what it can do.
#include "kernels/cpu_features.hpp"

#if defined(TRIX_WITH_NEON) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace trix {
namespace {

#if defined(TRIX_WITH_NEON)
bool has_dotprod() {
#if defined(__linux__)
    constexpr unsigned long kHwcapAsimdDp = 1ul << 20;  // HWCAP_ASIMDDP of the Linux kernel
    return (getauxval(AT_HWCAP) & kHwcapAsimdDp) != 0;
#else
    return true;  // every Apple silicon has it
#endif
}
#endif

}  // namespace

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::kScalar:
            return "scalar";
        case Isa::kAvx2:
            return "avx2";
        case Isa::kAvx512Vnni:
            return "avx512_vnni";
        case Isa::kNeon:
            return "neon";
        case Isa::kNeonDotprod:
            return "neon_dotprod";
    }
    return "unknown";
}

bool cpu_supports(Isa isa) {
    switch (isa) {
        case Isa::kScalar:
            return true;
#if defined(TRIX_WITH_X86)
        // The builtins also check that the operating system saves the wide registers.
        case Isa::kAvx2:
            __builtin_cpu_init();
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        case Isa::kAvx512Vnni:
            __builtin_cpu_init();
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
                   __builtin_cpu_supports("fma");
#endif
#if defined(TRIX_WITH_NEON)
        case Isa::kNeon:
            return true;  // part of every AArch64
        case Isa::kNeonDotprod:
            return has_dotprod();
#endif
        default:
            return false;
    }
}

}  // namespace trix
