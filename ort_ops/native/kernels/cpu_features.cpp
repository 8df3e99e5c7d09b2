// The only file that asks the CPU what it can do.
#include "kernels/cpu_features.hpp"

namespace trix {

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::kScalar:
            return "scalar";
        case Isa::kAvx2:
            return "avx2";
    }
    return "unknown";
}

bool cpu_supports(Isa isa) {
    switch (isa) {
        case Isa::kScalar:
            return true;
        case Isa::kAvx2:
#ifdef TRIX_WITH_AVX2
            // The builtin also checks that the operating system saves the wide registers.
            __builtin_cpu_init();
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
            return false;
#endif
    }
    return false;
}

}  // namespace trix
