#include "kernels/gather_tiles/gather_tiles.hpp"
#include "tests/products.hpp"

namespace trix_tests {

void test_gather_tiles(const KernelVariant<GatherTilesKernel>& variant) {
    for (int round = 0; round < 300; ++round) {
        const Product p = random_product(0, 1 + random_below(150), random_below(90), false);
        const std::vector<float> bias = random_values(p.num_rows);
        const std::size_t count = random_below(p.num_rows + 1);
        std::vector<std::int64_t> tile_idx(count);
        for (auto& tile : tile_idx) tile = static_cast<std::int64_t>(random_below(p.num_rows));
        std::vector<std::uint8_t> panels(ceil_div(count, kPanelRows) * panel_bytes(p.num_columns), 0xff);
        std::vector<float> row_scale(count), own_bias(count);
        variant.function({p.panels.data(), p.row_scale.data(), bias.data(), tile_idx.data(), panels.data(),
                          row_scale.data(), own_bias.data(), count, p.num_columns});
        std::vector<int> weight;
        for (std::size_t i = 0; i < count; ++i) {
            const auto tile = static_cast<std::size_t>(tile_idx[i]);
            for (std::size_t k = 0; k < p.num_columns; ++k)
                weight.push_back(p.weight[tile * p.num_columns + k]);
            EXPECT(same(row_scale[i], p.row_scale[tile]) && same(own_bias[i], bias[tile]), "%s: row %zu",
                   variant.name, i);
        }
        EXPECT(panels == to_panels(weight, count, p.num_columns), "%s: round %d", variant.name, round);
    }
}

}  // namespace trix_tests
