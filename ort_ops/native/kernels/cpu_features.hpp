// The instruction sets kernels are written for, and which of them this CPU has.
#pragma once

namespace trix {

/// Ordered from the baseline up within an architecture; a kernel variant is written for exactly one of them.
enum class Isa { kScalar, kAvx2, kAvx512Vnni, kNeon, kNeonDotprod };

inline constexpr Isa kAllIsas[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512Vnni, Isa::kNeon, Isa::kNeonDotprod};

/// The name used in TRIX_ORT_ISA and in the log: "scalar", "avx2", "avx512_vnni", "neon", "neon_dotprod".
const char* isa_name(Isa isa);

/// True if this CPU and operating system can run code compiled for `isa`.
bool cpu_supports(Isa isa);

}  // namespace trix
