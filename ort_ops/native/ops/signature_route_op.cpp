// ai.trix::SignatureRoute: score[t, e] = <x_t, s_e> / sqrt(max(nnz(s_e), 1)); tile_idx = the top_k tiles by
// score + bias; weight = how much each of them counts.
#include <cmath>
#include <memory>

#include "ops/custom_op.hpp"
#include "ops/fine_choice.hpp"
#include "ops/signature_table.hpp"

namespace trix {
namespace {

// clang-format off
constexpr TensorSpec kInputTable[] = {
    {"x", ElementType::kFloat, 2, "[T, D]"},
    {"signatures", ElementType::kUint8, 3, "[ceil(E/32), ceil(D/16), 128]"},
    {"bias", ElementType::kFloat, 1, "[E]"},
    {"log_mass", ElementType::kFloat, 1, "[E]"},
};
constexpr TensorSpec kOutputTable[] = {
    {"tile_idx", ElementType::kInt64, 2, "[T, top_k]"},
    {"weight", ElementType::kFloat, 2, "[T, top_k]"},
    {"score", ElementType::kFloat, 2, "[T, E]", true},
};
// clang-format on

constexpr const char* kTopKAttribute = "top_k";
constexpr const char* kGateAttribute = "gate";
constexpr const char* kThresholdAttribute = "confidence_threshold";
constexpr std::int64_t kTopKDefault = 1;
constexpr std::int64_t kGateDefault = 1;
constexpr float kThresholdDefault = 0.3f;

enum Input : std::size_t { kX, kSignatures, kBias, kLogMass };
enum Output : std::size_t { kTileIdx, kWeight, kScore };

class SignatureRoute {
  public:
    static constexpr const char* kName = "SignatureRoute";
    static constexpr auto& kInputs = kInputTable;
    static constexpr auto& kOutputs = kOutputTable;

    explicit SignatureRoute(const KernelInfo& info)
        : inputs_(info, kInputs),
          top_k_(info.int_attribute(kTopKAttribute, kTopKDefault)),
          rule_(gate_rule(info)),
          table_(info, kSignatures, kInputs[kSignatures]) {
        if (top_k_ < 1) reject("top_k (", top_k_, ") must be >= 1");
    }

    void compute(KernelContext& context) const {
        const TensorView x = inputs_.view(context, kX);
        const TensorView signatures = inputs_.view(context, kSignatures);
        const TensorView bias = inputs_.view(context, kBias);
        const TensorView log_mass = inputs_.view(context, kLogMass);
        check_sizes(x, signatures, bias, log_mass);

        auto* tile_idx = context.output<std::int64_t>(kTileIdx, kOutputs[kTileIdx].name, {x.dim(0), top_k_});
        auto* weight = context.output<float>(kWeight, kOutputs[kWeight].name, {x.dim(0), top_k_});
        auto* score = context.output<float>(kScore, kOutputs[kScore].name, {x.dim(0), bias.dim(0)});
        std::vector<float> run_norms;
        const TileMatrices table = table_.matrix(signatures, bias.dim(0), x.dim(1), run_norms);
        if (score == nullptr && rule_.gate == Gate::kSigmoid && bias.size(0) >= kManyTiles) {
            choose_among_many(context, table, x, bias.as<float>(), tile_idx, weight);
            return;
        }
        std::unique_ptr<float[]> unread;
        if (score == nullptr) {
            checked_bytes("scores", {x.dim(0), bias.dim(0)}, sizeof(float));
            unread.reset(new float[x.size(0) * bias.size(0)]);
            score = unread.get();
        }
        const auto top_k = static_cast<std::size_t>(top_k_);
        score_tiles(context, table, x.as<float>(), x.size(0), score);
        choose_tiles(context, x.size(0), bias.size(0), top_k, score, bias.as<float>(), tile_idx);
        weigh_tiles(context, rule_, x.size(0), bias.size(0), top_k, score, bias.as<float>(),
                    log_mass.as<float>(), tile_idx, weight);
    }

    static void infer_shapes(const ShapeContext& context) {
        const Dimension tokens = context.input_dimension(kX, kInputs[kX], 0);
        const std::int64_t top_k = context.int_attribute(kTopKAttribute, kTopKDefault);
        if (top_k < 1) return;
        context.set_output(kTileIdx, kOutputs[kTileIdx].type, {tokens, {top_k, ""}});
        context.set_output(kWeight, kOutputs[kWeight].type, {tokens, {top_k, ""}});
    }

  private:
    // Where only the scores of the chosen tiles count, there is no need for those of all others.
    void choose_among_many(const KernelContext& context, const TileMatrices& table, const TensorView& x,
                           const float* bias, std::int64_t* tile_idx, float* weight) const {
        const auto top_k = static_cast<std::size_t>(top_k_);
        choose_fine(context, table, x.as<float>(), x.size(0), bias, top_k, tile_idx, weight);
        // A weight by sigmoid looks at its own score alone, in whose place it goes, as if there were no other
        // tile.
        const std::size_t count = x.size(0) * top_k;
        const std::vector<std::int64_t> only(count, 0);
        const float in_use = 0.0f, no_mass = 0.0f;
        weigh_tiles(context, rule_, count, 1, 1, weight, &in_use, &no_mass, only.data(), weight);
        for (std::size_t i = 0; i < count; ++i) {
            if (bias[tile_idx[i]] == -HUGE_VALF) weight[i] *= 0.0f;  // NaN stays NaN
        }
    }

    static GateRule gate_rule(const KernelInfo& info) {
        const std::int64_t gate = info.int_attribute(kGateAttribute, kGateDefault);
        const float threshold = info.float_attribute(kThresholdAttribute, kThresholdDefault);
        if (gate < 0 || gate > 2)
            reject("gate (", gate, ") must be 0 (sigmoid), 1 (softmax) or 2 (adaptive)");
        if (!(threshold >= 0.0f)) reject("confidence_threshold (", threshold, ") must be >= 0");
        return {static_cast<Gate>(gate), threshold};
    }

    void check_sizes(const TensorView& x, const TensorView& signatures, const TensorView& bias,
                     const TensorView& log_mass) const {
        if (top_k_ > bias.dim(0)) {
            reject("top_k (", top_k_, ") must be <= the number of tiles in bias (", bias.dim(0), ")");
        }
        if (log_mass.dim(0) != bias.dim(0)) {
            reject("length of log_mass (", log_mass.dim(0), ") must be the number of tiles in bias (",
                   bias.dim(0), ")");
        }
        table_.check(signatures, bias.dim(0), x.dim(1));
    }

    Inputs<std::size(kInputTable)> inputs_;
    std::int64_t top_k_;
    GateRule rule_;
    SignatureTable table_;
};

}  // namespace

std::unique_ptr<ort_abi::OrtCustomOp> make_signature_route_op(const OrtApi* api) {
    return std::make_unique<CustomOp<SignatureRoute>>(api);
}

}  // namespace trix
