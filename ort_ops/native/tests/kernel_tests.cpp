// Runs the test of every kernel on every variant that this CPU has, without a runtime: values against the
// contract, all variants bit for bit, no read or write outside the arrays (each lies in its own heap block of
// exact size, so sanitizers see a stray byte). Then what has no variants.
//
//   kernel_tests             all of it
//   kernel_tests layer_norm  one kernel
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels/work_plan.hpp"
#include "tests/products.hpp"

namespace {

using namespace trix_tests;

void test_panels() {
    for (std::size_t size = 0; size < 300; ++size) {
        std::vector<std::uint8_t> packed(size, 0x96);  // 10 01 01 10
        EXPECT(find_reserved_code(packed.data(), size) == kNotFound, "size %zu", size);
        for (std::size_t bad = 0; bad < size; bad += 1 + random_below(20)) {
            std::vector<std::uint8_t> changed = packed;
            changed[bad] = static_cast<std::uint8_t>(0x96 | 3u << (2 * random_below(4)));
            EXPECT(find_reserved_code(changed.data(), size) == bad, "size %zu byte %zu", size, bad);
        }
    }
    // 01 10 spans a code boundary when read as bits: neighbouring codes must not look like the reserved one.
    for (unsigned byte = 0; byte < 256; ++byte) {
        bool has_reserved = false;
        for (unsigned i = 0; i < 4; ++i) has_reserved |= ((byte >> (2 * i)) & 3) == 3;
        const std::vector<std::uint8_t> one(1, static_cast<std::uint8_t>(byte));
        EXPECT((find_reserved_code(one.data(), 1) == 0) == has_reserved, "byte %u", byte);
    }
    for (int round = 0; round < 300; ++round) {
        const Product p = random_product(0, 1 + random_below(80), 1 + random_below(90), false);
        UsedSize used{0, 0};
        const std::size_t last_panel = (p.num_rows - 1) / kPanelRows,
                          last_block = (p.num_columns - 1) / kBlockColumns;
        for (std::size_t n = 0; n < p.num_rows; ++n) {
            for (std::size_t k = 0; k < p.num_columns; ++k) {
                if (p.weight[n * p.num_columns + k] == 0) continue;
                if (n / kPanelRows != last_panel && k / kBlockColumns != last_block) continue;
                used.rows = std::max(used.rows, n + 1);
                used.columns = std::max(used.columns, k + 1);
            }
        }
        const UsedSize got = used_size(p.panels.data(), last_panel + 1, last_block + 1);
        EXPECT(got.rows == used.rows && got.columns == used.columns, "%zu %zu, not %zu %zu", got.rows,
               got.columns, used.rows, used.columns);
    }
}

void test_work_plan() {
    for (int round = 0; round < 300; ++round) {
        const std::size_t num_tokens = random_below(200), num_tiles = 1 + random_below(9);
        const std::size_t num_rows = random_below(300), num_columns = random_below(5000);
        std::vector<std::int64_t> tile_idx(num_tokens);
        for (auto& tile : tile_idx) tile = static_cast<std::int64_t>(random_below(num_tiles));
        const TokenGroups groups = group_tokens(tile_idx.data(), num_tokens, num_tiles);
        const std::size_t num_panels = ceil_div(num_rows, kPanelRows);
        std::vector<int> visits(num_tokens * num_panels, 0);
        for (const WorkUnit& unit : plan_units(groups, num_rows, num_columns, round % 2 == 0 ? 1 : 3)) {
            for (std::size_t i = unit.token_begin; i < unit.token_end; ++i) {
                const auto token = static_cast<std::size_t>(groups.order[i]);
                EXPECT(static_cast<std::size_t>(tile_idx[token]) == unit.tile, "token %zu", token);
                for (std::size_t n = unit.panel_begin; n < unit.panel_end; ++n)
                    ++visits[token * num_panels + n];
            }
        }
        EXPECT(std::all_of(visits.begin(), visits.end(), [](int count) { return count == 1; }), "round %d",
               round);
    }
}

void test_dispatch() {
    EXPECT(choose_kernels("scalar").ternary_matmul == ternary_matmul_scalar, "scalar by name");
    EXPECT(choose_kernels("scalar").signature_route == signature_route_scalar, "scalar by name");
    for (const char* unlimited : {static_cast<const char*>(nullptr), ""}) {
        const KernelTable table = choose_kernels(unlimited);
        EXPECT(cpu_supports(table.isa), "%s", isa_name(table.isa));
        for (const auto& row : ternary_matmul_variants()) {
            if (!cpu_supports(row.isa)) continue;
            EXPECT(table.ternary_matmul == row.function, "the first usable row, %s", row.name);
            break;
        }
    }
    for (Isa isa : kAllIsas) {
        try {
            const bool is_named = choose_kernels(isa_name(isa)).isa == isa;
            EXPECT(is_named && cpu_supports(isa), "%s", isa_name(isa));
        } catch (const std::invalid_argument& error) {
            EXPECT(!cpu_supports(isa), "%s", error.what());
        }
    }
    try {
        choose_kernels("mmx");
        EXPECT(false, "an unknown name was taken");
    } catch (const std::invalid_argument& error) {
        EXPECT(std::string(error.what()) ==
                   "TRIX_ORT_ISA (mmx) must be one of: scalar, avx2, avx512_vnni, neon, neon_dotprod",
               "%s", error.what());
    }
}

template <typename Function, typename Test>
void for_each_variant(KernelVariants<Function> variants, const Test& test) {
    for (const auto& variant : variants) {
        if (cpu_supports(variant.isa)) {
            test(variant);
            std::printf("ran %s\n", variant.name);
        } else {
            std::printf("skipped %s: this CPU lacks %s\n", variant.name, isa_name(variant.isa));
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    const char* only = argc > 1 ? argv[1] : nullptr;
#define TRIX_KERNEL(kernel, Name, ...)                      \
    if (only == nullptr || std::strcmp(only, #kernel) == 0) \
        for_each_variant(kernel##_variants(), test_##kernel);
#include "kernels/kernels.inc"
#undef TRIX_KERNEL
    if (only == nullptr) {
        test_panels();
        test_work_plan();
        test_dispatch();
    }
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
