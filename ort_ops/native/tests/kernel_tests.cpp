// Tests of every row of every .inc list, without a runtime: values against float64, all variants bit for bit,
// no read or write outside the arrays (each lies in its own heap block of exact size, so sanitizers see a
// stray byte).
#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/dispatch.hpp"
#include "kernels/ternary_panels.hpp"
#include "kernels/work_plan.hpp"
#include "tests/test_gate.hpp"
#include "tests/test_lookup.hpp"
#include "tests/test_products.hpp"
#include "tests/test_quantise.hpp"

namespace {

using namespace trix_tests;

// The contract of the product, written as directly as possible.
float contract_value(const Product& p, const Quantised& x, std::size_t t, std::size_t n) {
    float total = 0.0f;
    for (std::size_t g = 0; g < x.num_groups; ++g) {
        for (std::size_t plane = 0; plane < x.num_planes; ++plane) {
            std::int32_t dot = 0;
            for (std::size_t k = g * x.group_columns; k < std::min((g + 1) * x.group_columns, p.num_columns);
                 ++k)
                dot += x.q[(t * x.num_planes + plane) * row_stride(p) + k] * p.weight[n * p.num_columns + k];
            total += static_cast<float>(dot) * x.scale[(t * x.num_groups + g) * x.num_planes + plane];
        }
    }
    return p.row_scale[n] * total;
}

// As good as sums of float32: 3 roundings a group, and what the quantiser leaves out.
void check_exactness(const Product& p, const Quantised& x, std::size_t t, std::size_t n, float got) {
    double exact = 0, bound = 1e-30, magnitude = 0;
    for (std::size_t g = 0; g < x.num_groups; ++g) {
        double largest = 0, count = 0;
        for (std::size_t k = g * x.group_columns; k < std::min((g + 1) * x.group_columns, p.num_columns);
             ++k) {
            const auto value = static_cast<double>(p.x[t * p.num_columns + k]);
            const int w = p.weight[n * p.num_columns + k];
            exact += value * w;
            magnitude += std::abs(value * w);
            count += w != 0 ? 1 : 0;
            largest = std::max(largest, std::abs(value));
        }
        bound += count * largest * 0x1p-23;
    }
    bound += 2.0 * static_cast<double>(3 * x.num_groups + 2) * 0x1p-24 * magnitude;
    const auto scale = static_cast<double>(p.row_scale[n]);
    const double error = std::abs(static_cast<double>(got) - exact * scale);
    EXPECT(error <= bound * std::abs(scale), "K %zu: error %g, bound %g", p.num_columns, error,
           bound * std::abs(scale));
}

void test_product(const KernelVariant<TernaryMatMulKernel>& variant) {
    for (int round = 0; round < 1200; ++round) {
        const Product p = product_of_round(round);
        const std::size_t num_planes = round % 3 == 0 ? 1 : 3;
        Quantised x = reference_quantised(p, round % 2 == 0, num_planes);
        const bool is_extreme = round % 7 == 0;
        if (is_extreme) {  // the largest sums that there can be
            const auto value = static_cast<std::int8_t>(round % 2 == 0 ? 127 : -128);
            for (std::size_t row = 0; row < p.num_tokens * num_planes; ++row)
                std::fill_n(x.q.begin() + static_cast<std::ptrdiff_t>(row * row_stride(p)), p.num_columns,
                            value);
            for (std::size_t i = 0; i < x.sum.size(); ++i) {
                const std::size_t begin = i / num_planes % x.num_groups * x.group_columns;
                x.sum[i] =
                    value * static_cast<std::int32_t>(std::min(x.group_columns, p.num_columns - begin));
            }
        }
        const auto [panel_begin, panel_end] = random_panels(p);
        std::vector<float> y(p.num_tokens * p.num_rows, kUntouched);
        variant.function({x.q.data(), x.scale.data(), x.sum.data(), p.panels.data(), p.row_scale.data(),
                          p.token_idx.data(), p.token_idx.data(), y.data(), p.num_tokens, p.num_columns,
                          x.group_columns, num_planes, p.num_rows, panel_begin, panel_end});
        for (std::size_t t = 0; t < p.num_tokens; ++t) {
            for (std::size_t n = 0; n < p.num_rows; ++n) {
                const bool is_named = n / kPanelRows >= panel_begin && n / kPanelRows < panel_end;
                const float expected = is_named ? contract_value(p, x, t, n) : kUntouched;
                const float got = y[t * p.num_rows + n];
                EXPECT(same(got, expected), "%s: T %zu N %zu K %zu token %zu row %zu: %a, not %a",
                       variant.name, p.num_tokens, p.num_rows, p.num_columns, t, n, static_cast<double>(got),
                       static_cast<double>(expected));
                if (is_named && num_planes == 3 && !is_extreme && round % 4 != 3)
                    check_exactness(p, x, t, n, got);
            }
        }
    }
}

// The most columns that the contract allows, all products as large as can be.
void test_longest_sum(const KernelVariant<TernaryMatMulKernel>& variant) {
    for (const int value : {127, -128}) {
        const std::vector<std::int8_t> q(kMaxColumns, static_cast<std::int8_t>(value));
        const std::int32_t sum = value * static_cast<std::int32_t>(kMaxColumns);
        const std::vector<std::uint8_t> panels(panel_bytes(kMaxColumns), 0xaa);  // all +1
        const std::vector<float> row_scale(kPanelRows, 1.0f);
        const float scale = 1.0f;
        const std::int64_t token = 0;
        std::vector<float> y(kPanelRows);
        variant.function({q.data(), &scale, &sum, panels.data(), row_scale.data(), &token, &token, y.data(),
                          1, kMaxColumns, kMaxColumns, 1, kPanelRows, 0, 1});
        for (const float got : y)
            EXPECT(same(got, static_cast<float>(sum)), "%s: %a", variant.name, static_cast<double>(got));
    }
}

std::vector<std::int64_t> reference_choice(const float* score, const float* bias, std::size_t num_tiles) {
    std::vector<std::int64_t> order(num_tiles);
    std::iota(order.begin(), order.end(), std::int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
        const float key_a = score[a] + bias[a], key_b = score[b] + bias[b];
        if (std::isnan(key_a) || std::isnan(key_b)) return !std::isnan(key_a) && std::isnan(key_b);
        return key_a > key_b;
    });
    return order;
}

void test_route(const KernelVariant<SignatureRouteKernel>& variant) {
    for (int round = 0; round < 3000; ++round) {
        const std::size_t num_tokens = random_below(5);
        const std::size_t num_tiles = 1 + random_below(round % 5 == 0 ? 300 : 40);
        const std::size_t top_k =
            1 + random_below(round % 3 == 0 ? num_tiles : std::min<std::size_t>(num_tiles, 4));
        std::vector<float> score(num_tokens * num_tiles), bias(num_tiles);
        const float few[] = {0.0f, -0.0f, 1.0f, -1.0f, 2.0f, kNan, -kInfinity, kInfinity};
        const auto draw = [&] { return round % 2 == 0 ? few[random_below(8)] : random_value(); };
        for (float& value : score) value = draw();
        for (float& value : bias) value = round % 4 == 0 ? draw() : 0.0f;
        std::vector<std::int64_t> tile_idx(num_tokens * top_k, -7);
        const std::size_t token_begin = random_below(num_tokens + 1);
        variant.function(
            {score.data(), bias.data(), tile_idx.data(), num_tiles, top_k, token_begin, num_tokens});
        for (std::size_t t = 0; t < num_tokens; ++t) {
            const auto expected = reference_choice(score.data() + t * num_tiles, bias.data(), num_tiles);
            for (std::size_t i = 0; i < top_k; ++i) {
                const std::int64_t want = t < token_begin ? -7 : expected[i];
                EXPECT(tile_idx[t * top_k + i] == want, "%s: E %zu top_k %zu place %zu: %lld, not %lld",
                       variant.name, num_tiles, top_k, i, static_cast<long long>(tile_idx[t * top_k + i]),
                       static_cast<long long>(want));
            }
        }
    }
}

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
        std::vector<float> norm(p.num_rows);
        inverse_row_norms(p.panels.data(), p.num_rows, p.num_columns, norm.data());
        UsedSize used{0, 0};
        const std::size_t last_panel = (p.num_rows - 1) / kPanelRows,
                          last_block = (p.num_columns - 1) / kBlockColumns;
        for (std::size_t n = 0; n < p.num_rows; ++n) {
            float nnz = 0;
            for (std::size_t k = 0; k < p.num_columns; ++k) {
                if (p.weight[n * p.num_columns + k] == 0) continue;
                nnz += 1.0f;
                if (n / kPanelRows != last_panel && k / kBlockColumns != last_block) continue;
                used.rows = std::max(used.rows, n + 1);
                used.columns = std::max(used.columns, k + 1);
            }
            EXPECT(same(norm[n], 1.0f / std::sqrt(std::max(nnz, 1.0f))), "row %zu", n);
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

int main() {
    for_each_variant(quantize_rows_variants(), test_quantise);
    for_each_variant(ternary_matmul_variants(), test_product);
    for_each_variant(ternary_matmul_variants(), test_longest_sum);
    for_each_variant(signature_route_variants(), test_route);
    for_each_variant(signature_gate_variants(), test_gate);
    for_each_variant(layer_norm_variants(), test_norm);
    for_each_variant(sparse_lookup_variants(), test_lookup);
    test_rests();
    test_panels();
    test_work_plan();
    test_dispatch();
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
