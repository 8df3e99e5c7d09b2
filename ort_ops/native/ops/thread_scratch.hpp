// Memory for one unit of work.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trix {

/// At least num_bytes of the calling thread's own memory, aligned to 16 bytes, which it keeps for its next
/// use; null where there is none left. What was in it is undefined.
std::uint8_t* thread_scratch(std::size_t num_bytes) noexcept;

}  // namespace trix
