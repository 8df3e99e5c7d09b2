// The layout of a packed ternary matrix, the same for every instruction set, and checks and counts over it.
//
// A matrix of N rows and K columns is cut into panels of 32 rows, and a panel into blocks of 16 columns:
// uint8 [ceil(N / 32), ceil(K / 16), 128]. The 128 bytes of a block are 32 rows of 4 bytes; bits 2s and 2s +
// 1 of byte j of a row hold column 4s + j of the block as the code w + 1:
//
//   -1 -> 00    0 -> 01    +1 -> 10    (11 is reserved and an error when read)
//
// So four codes that stand side by side after a shift belong to four columns that stand side by side: what a
// dot product of bytes wants, for 16 rows in a vector of 512 bits, 8 in 256, 4 in 128, with no sum across a
// vector. Rows and columns past the end hold 0, that is 01. Portable code, no variants.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trix {

inline constexpr std::size_t kPanelRows = 32;
inline constexpr std::size_t kBlockColumns = 16;
inline constexpr std::size_t kBlockBytes = kPanelRows * kBlockColumns / 4;
inline constexpr std::size_t kGroupColumns = 128;  // of quantised activations, and of partial float sums
inline constexpr std::size_t kGroupBlocks = kGroupColumns / kBlockColumns;

inline constexpr std::uint8_t kZeroCodes = 0x55;  // four zeros: 01 01 01 01

inline constexpr std::size_t kNotFound = static_cast<std::size_t>(-1);

static constexpr std::size_t ceil_div(std::size_t a, std::size_t b) {
    return a / b + (a % b != 0 ? 1 : 0);
}

/// Size in bytes of one panel of num_columns columns.
static constexpr std::size_t panel_bytes(std::size_t num_columns) {
    return ceil_div(num_columns, kBlockColumns) * kBlockBytes;
}

/// Index of the first byte that holds the reserved code 11, or kNotFound.
std::size_t find_reserved_code(const std::uint8_t* panels, std::size_t num_bytes);

/// How many rows and columns of a matrix have a code other than 0 in its last panel and in its last block:
/// the matrix has at least this many rows and columns.
struct UsedSize {
    std::size_t rows;
    std::size_t columns;
};

UsedSize used_size(const std::uint8_t* panels, std::size_t num_panels, std::size_t num_blocks);

}  // namespace trix
