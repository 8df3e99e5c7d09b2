// Tests of every row of every .inc list, without a runtime: values against float64, all variants bit for bit,
// no read or write outside the arrays (each lies in its own heap block of exact size, so sanitizers see a
// stray byte).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/dispatch.hpp"
#include "kernels/packed_codes.hpp"
#include "kernels/work_plan.hpp"

namespace {

using namespace trix;

int failures = 0;

#define EXPECT(condition, ...)                                          \
    do {                                                                \
        if (!(condition)) {                                             \
            ++failures;                                                 \
            std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            std::printf(__VA_ARGS__);                                   \
            std::printf("\n");                                          \
        }                                                               \
    } while (false)

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::mt19937 random_bits(20240229);

std::size_t random_below(std::size_t limit) {
    return random_bits() % limit;
}

float random_value() {
    return std::normal_distribution<float>()(random_bits);
}

// Equal bits, or both NaN.
bool same(float a, float b) {
    return std::memcmp(&a, &b, sizeof(a)) == 0 || (std::isnan(a) && std::isnan(b));
}

struct Product {
    std::size_t num_tokens, num_rows, num_columns;
    std::vector<float> x, row_scale;
    std::vector<int> weight;
    std::vector<std::uint8_t> packed;
    std::vector<std::int64_t> token_idx;
};

Product random_product(std::size_t num_tokens, std::size_t num_rows, std::size_t num_columns,
                       bool has_specials) {
    const std::size_t row_bytes = (num_columns + 3) / 4;
    Product p{num_tokens,
              num_rows,
              num_columns,
              std::vector<float>(num_tokens * num_columns),
              std::vector<float>(num_rows),
              std::vector<int>(num_rows * num_columns),
              std::vector<std::uint8_t>(num_rows * row_bytes),
              std::vector<std::int64_t>(num_tokens)};
    for (float& value : p.x) {
        value = random_value();
        if (has_specials && random_below(40) == 0) {
            const float specials[] = {kNan, kInfinity, -kInfinity, -0.0f, 3e38f, 1e-40f};
            value = specials[random_below(6)];
        }
    }
    for (float& value : p.row_scale) value = random_value();
    for (std::size_t n = 0; n < num_rows; ++n) {
        for (std::size_t k = 0; k < num_columns; ++k) {
            const int w = static_cast<int>(random_below(3)) - 1;
            p.weight[n * num_columns + k] = w;
            const unsigned code = w == 0 ? 0u : (w > 0 ? 1u : 2u);
            auto& byte = p.packed[n * row_bytes + k / 4];
            byte = static_cast<std::uint8_t>(byte | code << (2 * (k % 4)));
        }
    }
    std::iota(p.token_idx.begin(), p.token_idx.end(), std::int64_t{0});
    std::shuffle(p.token_idx.begin(), p.token_idx.end(), random_bits);
    return p;
}

constexpr float kUntouched = -12345.0f;

std::vector<float> run(TernaryTileMatMulKernel kernel, const Product& p, std::size_t row_begin,
                       std::size_t row_end) {
    std::vector<float> y(p.num_tokens * p.num_rows, kUntouched);
    kernel({p.x.data(), p.packed.data(), p.row_scale.data(), p.token_idx.data(), y.data(), p.num_tokens,
            p.num_columns, p.num_rows, row_begin, row_end});
    return y;
}

// The contract of the sum, written as directly as possible.
float contract_dot(const float* x, const int* weight, std::size_t num_columns) {
    float lane[16] = {};
    for (std::size_t k = 0; k < num_columns; ++k) lane[k % 16] += x[k] * static_cast<float>(weight[k]);
    for (std::size_t half : {8u, 4u, 2u, 1u}) {
        for (std::size_t j = 0; j < half; ++j) lane[j] += lane[j + half];
    }
    return lane[0];
}

void test_product(const KernelVariant<TernaryTileMatMulKernel>& variant) {
    for (int round = 0; round < 1500; ++round) {
        const std::size_t num_columns = round % 10 == 0 ? 500 + random_below(3000) : random_below(80);
        const bool has_specials = round % 4 == 3;
        const Product p = random_product(random_below(16), random_below(12), num_columns, has_specials);
        const std::size_t row_begin = random_below(p.num_rows + 1);
        const std::size_t row_end = row_begin + random_below(p.num_rows - row_begin + 1);
        const std::vector<float> y = run(variant.function, p, row_begin, row_end);
        for (std::size_t t = 0; t < p.num_tokens; ++t) {
            for (std::size_t n = 0; n < p.num_rows; ++n) {
                const float got = y[t * p.num_rows + n];
                if (n < row_begin || n >= row_end) {
                    EXPECT(same(got, kUntouched), "%s wrote row %zu", variant.name, n);
                    continue;
                }
                const float* x = p.x.data() + t * num_columns;
                const int* weight = p.weight.data() + n * num_columns;
                const float expected = p.row_scale[n] * contract_dot(x, weight, num_columns);
                EXPECT(same(got, expected), "%s: T %zu N %zu K %zu token %zu row %zu: %a, not %a",
                       variant.name, p.num_tokens, p.num_rows, num_columns, t, n, got, expected);
                if (has_specials) continue;
                double exact = 0, magnitude = 0;
                for (std::size_t k = 0; k < num_columns; ++k) {
                    exact += static_cast<double>(x[k]) * weight[k];
                    magnitude += std::abs(static_cast<double>(x[k]) * weight[k]);
                }
                const double error =
                    std::abs(static_cast<double>(got) - exact * static_cast<double>(p.row_scale[n]));
                EXPECT(error <= 1e-6 * magnitude * std::abs(static_cast<double>(p.row_scale[n])) + 1e-30,
                       "%s: K %zu error %g", variant.name, num_columns, error);
            }
        }
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

void test_packed_codes() {
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
    const unsigned expected_mask[] = {0x00, 0xfc, 0xf0, 0xc0};
    for (int columns = 0; columns < 9; ++columns) {
        EXPECT(padding_mask(columns) == expected_mask[columns % 4], "columns %d", columns);
        EXPECT(packed_row_bytes(columns) == (columns + 3) / 4, "columns %d", columns);
    }
    for (int round = 0; round < 200; ++round) {
        const Product p = random_product(0, random_below(9), random_below(90), false);
        const std::size_t row_bytes = (p.num_columns + 3) / 4;
        std::vector<float> norm(p.num_rows);
        inverse_row_norms(p.packed.data(), p.num_rows, row_bytes, norm.data());
        for (std::size_t n = 0; n < p.num_rows; ++n) {
            float nnz = 0;
            for (std::size_t k = 0; k < p.num_columns; ++k)
                nnz += p.weight[n * p.num_columns + k] != 0 ? 1.0f : 0.0f;
            EXPECT(same(norm[n], 1.0f / std::sqrt(std::max(nnz, 1.0f))), "row %zu", n);
        }
    }
    EXPECT(union_of_last_bytes(nullptr, 5, 0) == 0, "rows without bytes");
}

void test_work_plan() {
    for (int round = 0; round < 300; ++round) {
        const std::size_t num_tokens = random_below(200), num_tiles = 1 + random_below(9);
        const std::size_t num_rows = random_below(100), num_columns = random_below(5000);
        std::vector<std::int64_t> tile_idx(num_tokens);
        for (auto& tile : tile_idx) tile = static_cast<std::int64_t>(random_below(num_tiles));
        const TokenGroups groups = group_tokens(tile_idx.data(), num_tokens, num_tiles);
        std::vector<int> visits(num_tokens * num_rows, 0);
        for (const WorkUnit& unit : plan_units(groups, num_rows, num_columns)) {
            for (std::size_t i = unit.token_begin; i < unit.token_end; ++i) {
                const auto token = static_cast<std::size_t>(groups.order[i]);
                EXPECT(static_cast<std::size_t>(tile_idx[token]) == unit.tile, "token %zu", token);
                for (std::size_t n = unit.row_begin; n < unit.row_end; ++n) ++visits[token * num_rows + n];
            }
        }
        EXPECT(std::all_of(visits.begin(), visits.end(), [](int count) { return count == 1; }), "round %d",
               round);
    }
}

void test_dispatch() {
    EXPECT(choose_kernels("scalar").ternary_tile_matmul == ternary_tile_matmul_scalar, "scalar by name");
    EXPECT(choose_kernels("scalar").signature_route == signature_route_scalar, "scalar by name");
    for (const char* unlimited : {static_cast<const char*>(nullptr), ""}) {
        const KernelTable table = choose_kernels(unlimited);
        EXPECT(cpu_supports(table.isa), "%s", isa_name(table.isa));
        for (const auto& row : ternary_tile_matmul_variants()) {
            if (!cpu_supports(row.isa)) continue;
            EXPECT(table.ternary_tile_matmul == row.function, "the first usable row, %s", row.name);
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
        EXPECT(std::string(error.what()) == "TRIX_ORT_ISA (mmx) must be one of: scalar, avx2", "%s",
               error.what());
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
    for_each_variant(ternary_tile_matmul_variants(), test_product);
    for_each_variant(signature_route_variants(), test_route);
    test_packed_codes();
    test_work_plan();
    test_dispatch();
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
