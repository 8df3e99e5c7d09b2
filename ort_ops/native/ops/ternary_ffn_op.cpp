// ai.trix::TernaryFFN: y[t] = sum_k weight[t, k] * down_e relu(up_e x[t])^2 with e = tile_idx[t, k]; tiles of
// weight 0 are not computed.
#include <algorithm>
#include <memory>

#include "kernels/dispatch.hpp"
#include "kernels/scale_rows/scale_rows.hpp"
#include "kernels/sum_parts/sum_parts.hpp"
#include "ops/custom_op.hpp"
#include "ops/packed_input.hpp"
#include "ops/tile_product.hpp"

namespace trix {
namespace {

// clang-format off
constexpr TensorSpec kInputTable[] = {
    {"x", ElementType::kFloat, 2, "[T, D]"},
    {"tile_idx", ElementType::kInt64, 2, "[T, top_k]"},
    {"weight", ElementType::kFloat, 2, "[T, top_k]"},
    {"up", ElementType::kUint8, 4, "[E, ceil(H/32), ceil(D/16), 128]"},
    {"up_scale", ElementType::kFloat, 2, "[E, H]"},
    {"down", ElementType::kUint8, 4, "[E, ceil(D/32), ceil(H/16), 128]"},
    {"down_scale", ElementType::kFloat, 2, "[E, D]"},
};
constexpr TensorSpec kOutputTable[] = {
    {"y", ElementType::kFloat, 2, "[T, D]"},
};
// clang-format on

constexpr std::size_t kRowsPerUnit = 8;

enum Input : std::size_t { kX, kTileIdx, kWeight, kUp, kUpScale, kDown, kDownScale };

// What is computed: assignment i is row `row[i]` of the T * K, and its token is token[i]; sorted by tile.
struct Assignments {
    TokenGroups groups;
    std::vector<std::int64_t> token;
    std::vector<std::int64_t> place;  // 0, 1, ...: rows of the hidden values and of the outputs
};

class TernaryFFN {
  public:
    static constexpr const char* kName = "TernaryFFN";
    static constexpr auto& kInputs = kInputTable;
    static constexpr auto& kOutputs = kOutputTable;

    explicit TernaryFFN(const KernelInfo& info)
        : inputs_(info, kInputs),
          activations_(info),
          up_(info, kUp, kInputs[kUp]),
          down_(info, kDown, kInputs[kDown]) {}

    void compute(KernelContext& context) const {
        const TensorView x = inputs_.view(context, kX);
        const TensorView tile_idx = inputs_.view(context, kTileIdx);
        const TensorView weight = inputs_.view(context, kWeight);
        const TensorView up = inputs_.view(context, kUp);
        const TensorView up_scale = inputs_.view(context, kUpScale);
        const TensorView down = inputs_.view(context, kDown);
        const TensorView down_scale = inputs_.view(context, kDownScale);
        check_sizes(x, up, up_scale, down, down_scale);
        check_choice(x, tile_idx, weight, up.dim(0));

        const std::size_t width = x.size(1), num_hidden = up_scale.size(1);
        float* y = context.output<float>(0, kOutputs[0].name, {x.dim(0), x.dim(1)});
        // Without hidden values tiles hold no bytes, so there may be any number of them: keep no list of
        // them.
        if (width == 0 || num_hidden == 0) {
            std::fill_n(y, x.size(0) * width, 0.0f);
            return;
        }
        const Assignments chosen = assignments(tile_idx, weight, up.size(0));
        const std::size_t num_chosen = chosen.token.size();
        const std::int64_t* place = chosen.place.data();
        const QuantisedRows rows = quantise(context, activations_, x.as<float>(), x.size(0), width);
        const auto num_rows = static_cast<std::int64_t>(num_chosen);
        checked_bytes("hidden values", {num_rows, up_scale.dim(1)}, sizeof(float));
        checked_bytes("outputs of tiles", {num_rows, x.dim(1)}, sizeof(float));
        const std::unique_ptr<float[]> hidden(new float[num_chosen * num_hidden]);
        const TileMatrices up_tiles{up.as<std::uint8_t>(), up_scale.as<float>(), num_hidden, width};
        multiply_tiles(context, rows, up_tiles, chosen.groups, chosen.token.data(), place, hidden.get());
        const QuantisedRows hidden_rows =
            quantise_activated(context, activations_, hidden.get(), num_chosen, num_hidden);
        const TileMatrices down_tiles{down.as<std::uint8_t>(), down_scale.as<float>(), width, num_hidden};
        if (tile_idx.size(1) == 1) {
            multiply_tiles(context, hidden_rows, down_tiles, chosen.groups, place, chosen.token.data(), y);
            weigh(context, x.size(0), weight.as<float>(), width, y);
            return;
        }
        const std::unique_ptr<float[]> parts(new float[num_chosen * width]);
        multiply_tiles(context, hidden_rows, down_tiles, chosen.groups, place, place, parts.get());
        add_up(context, x.size(0), tile_idx.size(1), weight.as<float>(), chosen.groups.order, parts.get(),
               width, y);
    }

    static void infer_shapes(const ShapeContext& context) {
        context.set_output(
            0, kOutputs[0].type,
            {context.input_dimension(kX, kInputs[kX], 0), context.input_dimension(kX, kInputs[kX], 1)});
    }

  private:
    void check_sizes(const TensorView& x, const TensorView& up, const TensorView& up_scale,
                     const TensorView& down, const TensorView& down_scale) const {
        for (const TensorView* other : {&up_scale, &down, &down_scale}) {
            if (other->dim(0) != up.dim(0)) {
                reject("number of tiles of ", other->name, " (", other->dim(0), ") must be that of up (",
                       up.dim(0), ")");
            }
        }
        if (down_scale.dim(1) != x.dim(1)) {
            reject("rows of down_scale (", down_scale.dim(1), ") must be the width of x (", x.dim(1), ")");
        }
        up_.check(up, up_scale.dim(1), x.dim(1));
        down_.check(down, x.dim(1), up_scale.dim(1));
        check_columns("x", x.dim(1));
        check_columns("hidden values", up_scale.dim(1));
    }

    static void check_choice(const TensorView& x, const TensorView& tile_idx, const TensorView& weight,
                             std::int64_t num_tiles) {
        if (tile_idx.dim(0) != x.dim(0)) {
            reject("length of tile_idx (", tile_idx.dim(0), ") must be the number of tokens of x (", x.dim(0),
                   ")");
        }
        if (weight.shape != tile_idx.shape) {
            reject("shape of weight ", shape_text(weight.shape), " must be that of tile_idx ",
                   shape_text(tile_idx.shape));
        }
        const auto* tile = tile_idx.as<std::int64_t>();
        for (std::size_t i = 0; i < tile_idx.size(0) * tile_idx.size(1); ++i) {
            if (tile[i] < 0 || tile[i] >= num_tiles) {
                reject("tile_idx (", tile[i], ", at place ", i, ") must be >= 0 and < the number of tiles (",
                       num_tiles, ")");
            }
        }
    }

    static Assignments assignments(const TensorView& tile_idx, const TensorView& weight,
                                   std::size_t num_tiles) {
        const std::size_t top_k = tile_idx.size(1), count = tile_idx.size(0) * top_k;
        std::vector<std::int64_t> used, tile;
        for (std::size_t i = 0; i < count; ++i) {
            if (weight.as<float>()[i] == 0.0f) continue;
            used.push_back(static_cast<std::int64_t>(i));
            tile.push_back(tile_idx.as<std::int64_t>()[i]);
        }
        Assignments chosen{
            group_tokens(tile.data(), tile.size(), num_tiles), {}, std::vector<std::int64_t>(used.size())};
        for (std::size_t i = 0; i < used.size(); ++i) {
            std::int64_t& row = chosen.groups.order[i];
            row = used[static_cast<std::size_t>(row)];
            chosen.token.push_back(row / static_cast<std::int64_t>(top_k));
            chosen.place[i] = static_cast<std::int64_t>(i);
        }
        return chosen;
    }

    // y[t] times the weight of the token's only tile; what no tile computed is 0.
    static void weigh(const KernelContext& context, std::size_t num_tokens, const float* weight,
                      std::size_t width, float* y) {
        for_row_units(context, num_tokens, [&](std::size_t begin, std::size_t end) {
            kernels().scale_rows({weight, y, width, begin, end});
        });
    }

    // y[t] = the parts of its tiles, weighted, in the order of k.
    static void add_up(const KernelContext& context, std::size_t num_tokens, std::size_t top_k,
                       const float* weight, const std::vector<std::int64_t>& order, const float* parts,
                       std::size_t width, float* y) {
        std::vector<std::int64_t> part_of(num_tokens * top_k, -1);
        for (std::size_t i = 0; i < order.size(); ++i)
            part_of[static_cast<std::size_t>(order[i])] = static_cast<std::int64_t>(i);
        for_row_units(context, num_tokens, [&](std::size_t begin, std::size_t end) {
            kernels().sum_parts({parts, part_of.data(), weight, y, width, top_k, begin, end});
        });
    }

    // Calls body(begin, end) for the rows in units, on the session's threads. `body` must not throw.
    template <typename Body>
    static void for_row_units(const KernelContext& context, std::size_t num_rows, const Body& body) {
        context.parallel_for(ceil_div(num_rows, kRowsPerUnit), [&](std::size_t unit) noexcept {
            const std::size_t begin = unit * kRowsPerUnit;
            body(begin, std::min(begin + kRowsPerUnit, num_rows));
        });
    }

    Inputs<std::size(kInputTable)> inputs_;
    Activations activations_;
    PackedInput up_;
    PackedInput down_;
};

}  // namespace

std::unique_ptr<ort_abi::OrtCustomOp> make_ternary_ffn_op(const OrtApi* api) {
    return std::make_unique<CustomOp<TernaryFFN>>(api);
}

}  // namespace trix
