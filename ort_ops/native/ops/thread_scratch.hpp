// Memory for one unit of work.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trix {

/// At least num_bytes of the calling thread's own memory, aligned to 16 bytes; null where there is none left.
/// It is the thread's until its next call or its end, and holds whatever was in it.
std::uint8_t* thread_scratch(std::size_t num_bytes) noexcept;

}  // namespace trix
