#include "kernels/ternary_panels.hpp"

#include <algorithm>
#include <cstring>

namespace trix {
namespace {

constexpr std::uint64_t kLowBits = 0x5555555555555555u;

// The low bit of every code that is 11.
std::uint64_t reserved_bits(std::uint64_t word) {
    return word & (word >> 1) & kLowBits;
}

std::uint64_t load_word(const std::uint8_t* bytes) {
    std::uint64_t word;
    std::memcpy(&word, bytes, sizeof(word));
    return word;
}

}  // namespace

std::size_t find_reserved_code(const std::uint8_t* panels, std::size_t num_bytes) {
    constexpr std::size_t kStep = 8 * sizeof(std::uint64_t);
    std::size_t i = 0;
    for (; i + kStep <= num_bytes; i += kStep) {
        std::uint64_t any = 0;
        for (std::size_t j = 0; j < kStep; j += sizeof(std::uint64_t))
            any |= reserved_bits(load_word(panels + i + j));
        if (any != 0) break;
    }
    for (; i < num_bytes; ++i) {
        if (reserved_bits(panels[i]) != 0) return i;
    }
    return kNotFound;
}

UsedSize used_size(const std::uint8_t* panels, std::size_t num_panels, std::size_t num_blocks) {
    UsedSize used{0, 0};
    for (std::size_t panel = 0; panel < num_panels; ++panel) {
        const bool is_last_panel = panel + 1 == num_panels;
        for (std::size_t block = is_last_panel ? 0 : num_blocks - 1; block < num_blocks; ++block) {
            const std::uint8_t* bytes = panels + (panel * num_blocks + block) * kBlockBytes;
            for (std::size_t i = 0; i < kBlockBytes; ++i) {
                const unsigned nonzero = bytes[i] ^ kZeroCodes;
                for (std::size_t s = 0; s < 4; ++s) {
                    if (((nonzero >> (2 * s)) & 3) == 0) continue;
                    used.rows = std::max(used.rows, panel * kPanelRows + i / 4 + 1);
                    used.columns = std::max(used.columns, block * kBlockColumns + 4 * s + i % 4 + 1);
                }
            }
        }
    }
    return used;
}

}  // namespace trix
