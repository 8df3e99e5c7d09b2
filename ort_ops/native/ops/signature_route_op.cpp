// ai.trix::SignatureRoute: score[t, e] = <x_t, s_e> / sqrt(max(nnz(s_e), 1)); tile_idx = the top_k tiles by
// score + bias; weight = how much each of them counts.
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
          gate_(checked_gate(info)),
          confidence_threshold_(info.float_attribute(kThresholdAttribute, kThresholdDefault)),
          table_(info, kSignatures, kInputs[kSignatures]) {
        if (top_k_ < 1) reject("top_k (", top_k_, ") must be >= 1");
        if (!(confidence_threshold_ >= 0.0f))
            reject("confidence_threshold (", confidence_threshold_, ") must be >= 0");
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
        const auto top_k = static_cast<std::size_t>(top_k_);
        SignatureGateJob gate{};
        gate.bias = bias.as<float>();
        gate.log_mass = log_mass.as<float>();
        gate.tile_idx = tile_idx;
        gate.weight = weight;
        gate.num_tiles = bias.size(0);
        gate.top_k = top_k;
        gate.gate = gate_;
        gate.confidence_threshold = confidence_threshold_;
        if (score == nullptr && gate_ == Gate::kSigmoid && bias.size(0) >= kManyTiles) {
            // Only the scores of the chosen tiles count: there is no need for those of all others.
            choose_fine(context, table, x.as<float>(), x.size(0), gate.bias, top_k, tile_idx, weight);
            gate.chosen_score = weight;
            weigh_tiles(context, gate, x.size(0));
            return;
        }
        std::unique_ptr<float[]> unread;
        if (score == nullptr) {
            checked_bytes("scores", {x.dim(0), bias.dim(0)}, sizeof(float));
            unread.reset(new float[x.size(0) * bias.size(0)]);
            score = unread.get();
        }
        score_tiles(context, table, x.as<float>(), x.size(0), score);
        choose_tiles(context, x.size(0), bias.size(0), top_k, score, gate.bias, tile_idx);
        gate.score = score;
        weigh_tiles(context, gate, x.size(0));
    }

    static void infer_shapes(const ShapeContext& context) {
        const Dimension tokens = context.input_dimension(kX, kInputs[kX], 0);
        const std::int64_t top_k = context.int_attribute(kTopKAttribute, kTopKDefault);
        if (top_k < 1) return;
        context.set_output(kTileIdx, kOutputs[kTileIdx].type, {tokens, {top_k, ""}});
        context.set_output(kWeight, kOutputs[kWeight].type, {tokens, {top_k, ""}});
    }

  private:
    static Gate checked_gate(const KernelInfo& info) {
        const std::int64_t gate = info.int_attribute(kGateAttribute, kGateDefault);
        if (gate < 0 || gate > 2)
            reject("gate (", gate, ") must be 0 (sigmoid), 1 (softmax) or 2 (adaptive)");
        return static_cast<Gate>(gate);
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
    Gate gate_;
    float confidence_threshold_;
    SignatureTable table_;
};

}  // namespace

std::unique_ptr<ort_abi::OrtCustomOp> make_signature_route_op(const OrtApi* api) {
    return std::make_unique<CustomOp<SignatureRoute>>(api);
}

}  // namespace trix
