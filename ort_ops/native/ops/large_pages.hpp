// Large pages for weights that a session keeps.
#pragma once

#include <cstddef>

namespace trix {

/// Asks the system to back those parts of the memory that are whole large pages (2 MiB) by such pages, now:
/// with small ones the reading of weights from memory waits for address translation, too. Advice only: where
/// it is not taken nothing changes. The memory need not be our own, its content stays.
void advise_large_pages(const void* data, std::size_t num_bytes);

}  // namespace trix
