// ai.trix::TernaryTileMatMul: y[t, n] = row_scale[e, n] * sum_k x[t, k] * w[e, n, k] with e = tile_idx[t].
#include "kernels/work_plan.hpp"
#include "ops/custom_op.hpp"
#include "ops/packed_input.hpp"
#include "ops/tile_product.hpp"

namespace trix {
namespace {

// clang-format off
constexpr TensorSpec kInputTable[] = {
    {"x", ElementType::kFloat, 2, "[T, K]"},
    {"packed", ElementType::kUint8, 4, "[E, ceil(N/32), ceil(K/16), 128]"},
    {"row_scale", ElementType::kFloat, 2, "[E, N]"},
    {"tile_idx", ElementType::kInt64, 1, "[T]"},
};
constexpr TensorSpec kOutputTable[] = {
    {"y", ElementType::kFloat, 2, "[T, N]"},
};
// clang-format on

enum Input : std::size_t { kX, kPacked, kRowScale, kTileIdx };

class TernaryTileMatMul {
  public:
    static constexpr const char* kName = "TernaryTileMatMul";
    static constexpr auto& kInputs = kInputTable;
    static constexpr auto& kOutputs = kOutputTable;

    explicit TernaryTileMatMul(const KernelInfo& info)
        : inputs_(info, kInputs), activations_(info), packed_(info, kPacked, kInputs[kPacked]) {}

    void compute(KernelContext& context) const {
        const TensorView x = inputs_.view(context, kX);
        const TensorView packed = inputs_.view(context, kPacked);
        const TensorView row_scale = inputs_.view(context, kRowScale);
        const TensorView tile_idx = inputs_.view(context, kTileIdx);
        check_sizes(x, packed, row_scale, tile_idx);

        float* y = context.output<float>(0, kOutputs[0].name, {x.dim(0), row_scale.dim(1)});
        // Tiles without rows hold no bytes, so there may be any number of them: keep no list of them.
        if (row_scale.dim(1) == 0) return;
        const TokenGroups groups = group_tokens(tile_idx.as<std::int64_t>(), x.size(0), packed.size(0));
        const TileMatrices tiles{packed.as<std::uint8_t>(), row_scale.as<float>(), row_scale.size(1),
                                 x.size(1)};
        const QuantisedRows rows = quantise(context, activations_, x.as<float>(), x.size(0), x.size(1));
        multiply_tiles(context, rows, tiles, groups, groups.order.data(), groups.order.data(), y);
    }

    static void infer_shapes(const ShapeContext& context) {
        context.set_output(0, kOutputs[0].type,
                           {context.input_dimension(kX, kInputs[kX], 0),
                            context.input_dimension(kRowScale, kInputs[kRowScale], 1)});
    }

  private:
    void check_sizes(const TensorView& x, const TensorView& packed, const TensorView& row_scale,
                     const TensorView& tile_idx) const {
        if (row_scale.dim(0) != packed.dim(0)) {
            reject("shape of row_scale ", shape_text(row_scale.shape),
                   " must be [E, N] with the E tiles of packed ", shape_text(packed.shape));
        }
        packed_.check(packed, row_scale.dim(1), x.dim(1));
        check_columns("x", x.dim(1));
        if (tile_idx.dim(0) != x.dim(0)) {
            reject("length of tile_idx (", tile_idx.dim(0), ") must be the number of tokens of x (", x.dim(0),
                   ")");
        }
        const auto* tile = tile_idx.as<std::int64_t>();
        for (std::size_t t = 0; t < tile_idx.size(0); ++t) {
            if (tile[t] < 0 || tile[t] >= packed.dim(0)) {
                reject("tile_idx[", t, "] (", tile[t], ") must be >= 0 and < the number of tiles (",
                       packed.dim(0), ")");
            }
        }
    }

    Inputs<std::size(kInputTable)> inputs_;
    Activations activations_;
    PackedInput packed_;
};

}  // namespace

std::unique_ptr<ort_abi::OrtCustomOp> make_ternary_tile_matmul_op(const OrtApi* api) {
    return std::make_unique<CustomOp<TernaryTileMatMul>>(api);
}

}  // namespace trix
