#include "ops/thread_scratch.hpp"

#include <memory>
#include <new>

namespace trix {

std::uint8_t* thread_scratch(std::size_t num_bytes) noexcept {
    thread_local std::unique_ptr<std::uint8_t[]> memory;
    thread_local std::size_t size = 0;
    if (size < num_bytes) {
        memory.reset();  // before the larger one is asked for
        memory.reset(new (std::nothrow) std::uint8_t[num_bytes]);
        size = memory ? num_bytes : 0;
    }
    return memory.get();
}

}  // namespace trix
