// Random products of tokens with a packed matrix.
#pragma once

#include <numeric>
#include <utility>

#include "kernels/ternary_panels.hpp"
#include "tests/kernel_test.hpp"

namespace trix_tests {

struct Product {
    std::size_t num_tokens, num_rows, num_columns;
    std::vector<float> x, row_scale;
    std::vector<int> weight;
    std::vector<std::uint8_t> panels;
    std::vector<std::int64_t> token_idx;
};

// The contract of the layout, written as directly as possible.
inline std::vector<std::uint8_t> to_panels(const std::vector<int>& weight, std::size_t num_rows,
                                           std::size_t num_columns) {
    const std::size_t num_blocks = ceil_div(num_columns, kBlockColumns);
    std::vector<std::uint8_t> panels(ceil_div(num_rows, kPanelRows) * num_blocks * kBlockBytes, 0x55);
    for (std::size_t n = 0; n < num_rows; ++n) {
        for (std::size_t k = 0; k < num_columns; ++k) {
            const std::size_t block = n / kPanelRows * num_blocks + k / kBlockColumns;
            const std::size_t shift = 2 * (k % kBlockColumns / 4);
            std::uint8_t& byte = panels[block * kBlockBytes + 4 * (n % kPanelRows) + k % 4];
            const auto code = static_cast<unsigned>(weight[n * num_columns + k] + 1);
            byte = static_cast<std::uint8_t>((byte & ~(3u << shift)) | code << shift);
        }
    }
    return panels;
}

inline Product random_product(std::size_t num_tokens, std::size_t num_rows, std::size_t num_columns,
                              bool has_specials) {
    Product p{num_tokens,
              num_rows,
              num_columns,
              std::vector<float>(num_tokens * num_columns),
              std::vector<float>(num_rows),
              std::vector<int>(num_rows * num_columns),
              {},
              std::vector<std::int64_t>(num_tokens)};
    for (float& value : p.x) {
        value = random_value();
        if (has_specials && random_below(40) == 0) {
            const float specials[] = {kNan, kInfinity, -kInfinity, -0.0f, 3e38f, 1e-40f};
            value = specials[random_below(6)];
        }
    }
    for (float& value : p.row_scale) value = random_value();
    const bool is_zero = random_below(10) == 0;
    for (int& w : p.weight) w = is_zero ? 0 : static_cast<int>(random_below(3)) - 1;
    p.panels = to_panels(p.weight, num_rows, num_columns);
    std::iota(p.token_idx.begin(), p.token_idx.end(), std::int64_t{0});
    std::shuffle(p.token_idx.begin(), p.token_idx.end(), random_bits);
    return p;
}

inline Product product_of_round(int round) {
    const std::size_t num_columns = round % 10 == 0 ? 500 + random_below(3000) : random_below(300);
    return random_product(random_below(16), random_below(round % 3 == 0 ? 150 : 40), num_columns,
                          round % 4 == 3);
}

// Some panels [begin, end).
inline std::pair<std::size_t, std::size_t> random_panels(const Product& p) {
    const std::size_t num_panels = ceil_div(p.num_rows, kPanelRows);
    const std::size_t begin = random_below(num_panels + 1);
    return {begin, begin + random_below(num_panels - begin + 1)};
}

}  // namespace trix_tests
