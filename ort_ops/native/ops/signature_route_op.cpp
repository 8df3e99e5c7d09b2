// ai.trix::SignatureRoute: score[t, e] = <x_t, s_e> / sqrt(max(nnz(s_e), 1)); tile_idx = the top_k tiles by
// score + bias.
#include "ops/custom_op.hpp"
#include "ops/signature_table.hpp"

namespace trix {
namespace {

// clang-format off
constexpr TensorSpec kInputTable[] = {
    {"x", ElementType::kFloat, 2, "[T, D]"},
    {"signatures", ElementType::kUint8, 3, "[ceil(E/32), ceil(D/16), 128]"},
    {"bias", ElementType::kFloat, 1, "[E]"},
};
constexpr TensorSpec kOutputTable[] = {
    {"tile_idx", ElementType::kInt64, 2, "[T, top_k]"},
    {"score", ElementType::kFloat, 2, "[T, E]"},
};
// clang-format on

constexpr const char* kTopKAttribute = "top_k";
constexpr std::int64_t kTopKDefault = 1;

enum Input : std::size_t { kX, kSignatures, kBias };
enum Output : std::size_t { kTileIdx, kScore };

class SignatureRoute {
  public:
    static constexpr const char* kName = "SignatureRoute";
    static constexpr auto& kInputs = kInputTable;
    static constexpr auto& kOutputs = kOutputTable;

    explicit SignatureRoute(const KernelInfo& info)
        : inputs_(info, kInputs),
          top_k_(info.int_attribute(kTopKAttribute, kTopKDefault)),
          table_(info, kSignatures, kInputs[kSignatures]) {
        if (top_k_ < 1) reject("top_k (", top_k_, ") must be >= 1");
    }

    void compute(KernelContext& context) const {
        const TensorView x = inputs_.view(context, kX);
        const TensorView signatures = inputs_.view(context, kSignatures);
        const TensorView bias = inputs_.view(context, kBias);
        check_sizes(x, signatures, bias);

        auto* tile_idx = context.output<std::int64_t>(kTileIdx, kOutputs[kTileIdx].name, {x.dim(0), top_k_});
        auto* score = context.output<float>(kScore, kOutputs[kScore].name, {x.dim(0), bias.dim(0)});
        table_.score(context, signatures, x.as<float>(), x.size(0), x.size(1), bias.size(0), score);
        choose_tiles(context, x.size(0), bias.size(0), static_cast<std::size_t>(top_k_), score,
                     bias.as<float>(), tile_idx);
    }

    static void infer_shapes(const ShapeContext& context) {
        const Dimension tokens = context.input_dimension(kX, kInputs[kX], 0);
        const std::int64_t top_k = context.int_attribute(kTopKAttribute, kTopKDefault);
        if (top_k >= 1) context.set_output(kTileIdx, kOutputs[kTileIdx].type, {tokens, {top_k, ""}});
        context.set_output(kScore, kOutputs[kScore].type,
                           {tokens, context.input_dimension(kBias, kInputs[kBias], 0)});
    }

  private:
    void check_sizes(const TensorView& x, const TensorView& signatures, const TensorView& bias) const {
        if (top_k_ > bias.dim(0)) {
            reject("top_k (", top_k_, ") must be <= the number of tiles in bias (", bias.dim(0), ")");
        }
        table_.check(signatures, bias.dim(0), x.dim(1));
    }

    Inputs<std::size(kInputTable)> inputs_;
    std::int64_t top_k_;
    SignatureTable table_;
};

}  // namespace

std::unique_ptr<ort_abi::OrtCustomOp> make_signature_route_op(const OrtApi* api) {
    return std::make_unique<CustomOp<SignatureRoute>>(api);
}

}  // namespace trix
