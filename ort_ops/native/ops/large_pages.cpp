#include "ops/large_pages.hpp"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace trix {

void advise_large_pages(const void* data, std::size_t num_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t kPage = std::uintptr_t{1} << 21;
    constexpr int kCollapse =
        25;  // MADV_COLLAPSE, since Linux 6.1: at once, not when the system finds the time
    if (num_bytes < kPage) return;
    const auto begin = reinterpret_cast<std::uintptr_t>(data) / kPage * kPage;
    const auto end = reinterpret_cast<std::uintptr_t>(data) + num_bytes;
    for (std::uintptr_t place = begin; place < end; place += kPage) {
        auto* const page = reinterpret_cast<void*>(place);
        if (madvise(page, kPage, MADV_HUGEPAGE) == 0) madvise(page, kPage, kCollapse);
    }
#else
    static_cast<void>(data);
    static_cast<void>(num_bytes);
#endif
}

}  // namespace trix
