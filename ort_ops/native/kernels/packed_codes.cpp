#include "kernels/packed_codes.hpp"

#include <cmath>
#include <cstring>

namespace trix {
namespace {

// The low bit of every code that is 11.
template <typename Word>
Word reserved_bits(Word word) {
    return static_cast<Word>(word & (word >> 1) & static_cast<Word>(0x5555555555555555u));
}

std::uint64_t load_word(const std::uint8_t* bytes) {
    std::uint64_t word;
    std::memcpy(&word, bytes, sizeof(word));
    return word;
}

}  // namespace

std::size_t find_reserved_code(const std::uint8_t* packed, std::size_t num_bytes) {
    constexpr std::size_t kStep = 8 * sizeof(std::uint64_t);
    std::size_t i = 0;
    for (; i + kStep <= num_bytes; i += kStep) {
        std::uint64_t any = 0;
        for (std::size_t j = 0; j < kStep; j += sizeof(std::uint64_t))
            any |= reserved_bits(load_word(packed + i + j));
        if (any != 0) break;
    }
    for (; i < num_bytes; ++i) {
        if (reserved_bits(packed[i]) != 0) return i;
    }
    return kNotFound;
}

std::uint8_t union_of_last_bytes(const std::uint8_t* packed, std::size_t num_rows, std::size_t row_bytes) {
    std::uint8_t bits = 0;
    if (row_bytes == 0) return bits;
    for (std::size_t n = 0; n < num_rows; ++n) bits |= packed[(n + 1) * row_bytes - 1];
    return bits;
}

void inverse_row_norms(const std::uint8_t* packed, std::size_t num_rows, std::size_t row_bytes,
                       float* inverse_norm) {
    for (std::size_t n = 0; n < num_rows; ++n) {
        const std::uint8_t* row = packed + n * row_bytes;
        std::size_t nnz = 0;  // a nonzero code has exactly one bit set
        std::size_t i = 0;
        for (; i + sizeof(std::uint64_t) <= row_bytes; i += sizeof(std::uint64_t)) {
            nnz += static_cast<std::size_t>(__builtin_popcountll(load_word(row + i)));
        }
        for (; i < row_bytes; ++i) nnz += static_cast<std::size_t>(__builtin_popcount(row[i]));
        inverse_norm[n] = 1.0f / std::sqrt(static_cast<float>(nnz > 0 ? nnz : 1));
    }
}

}  // namespace trix
