// ai.trix::TernaryMatMul: y[b, t, n] = row_scale[n] * sum_k x[b, t, k] * w[n, k], one matrix for all tokens.
#include <numeric>

#include "kernels/work_plan.hpp"
#include "ops/custom_op.hpp"
#include "ops/packed_input.hpp"
#include "ops/tile_product.hpp"

namespace trix {
namespace {

// clang-format off
constexpr TensorSpec kInputTable[] = {
    {"x", ElementType::kFloat, 3, "[B, T, K]"},
    {"packed", ElementType::kUint8, 3, "[ceil(N/32), ceil(K/16), 128]"},
    {"row_scale", ElementType::kFloat, 1, "[N]"},
};
constexpr TensorSpec kOutputTable[] = {
    {"y", ElementType::kFloat, 3, "[B, T, N]"},
};
// clang-format on

enum Input : std::size_t { kX, kPacked, kRowScale };

class TernaryMatMul {
  public:
    static constexpr const char* kName = "TernaryMatMul";
    static constexpr auto& kInputs = kInputTable;
    static constexpr auto& kOutputs = kOutputTable;

    explicit TernaryMatMul(const KernelInfo& info)
        : inputs_(info, kInputs), activations_(info), packed_(info, kPacked, kInputs[kPacked]) {}

    void compute(KernelContext& context) const {
        const TensorView x = inputs_.view(context, kX);
        const TensorView packed = inputs_.view(context, kPacked);
        const TensorView row_scale = inputs_.view(context, kRowScale);
        packed_.check(packed, row_scale.dim(0), x.dim(2));
        check_columns("x", x.dim(2));

        float* y = context.output<float>(0, kOutputs[0].name, {x.dim(0), x.dim(1), row_scale.dim(0)});
        // No bytes: B times T may be any number.
        if (row_scale.dim(0) == 0) return;
        const std::size_t num_tokens = x.size(0) * x.size(1);
        TokenGroups all{std::vector<std::int64_t>(num_tokens), {0, num_tokens}};
        std::iota(all.order.begin(), all.order.end(), 0);
        const TileMatrices matrix{packed.as<std::uint8_t>(), row_scale.as<float>(), row_scale.size(0),
                                  x.size(2)};
        const QuantisedRows rows = quantise(context, activations_, x.as<float>(), num_tokens, x.size(2));
        multiply_tiles(context, rows, matrix, all, all.order.data(), all.order.data(), y);
    }

    static void infer_shapes(const ShapeContext& context) {
        context.set_output(
            0, kOutputs[0].type,
            {context.input_dimension(kX, kInputs[kX], 0), context.input_dimension(kX, kInputs[kX], 1),
             context.input_dimension(kRowScale, kInputs[kRowScale], 0)});
    }

  private:
    Inputs<std::size(kInputTable)> inputs_;
    Activations activations_;
    PackedInput packed_;
};

}  // namespace

std::unique_ptr<ort_abi::OrtCustomOp> make_ternary_matmul_op(const OrtApi* api) {
    return std::make_unique<CustomOp<TernaryMatMul>>(api);
}

}  // namespace trix
