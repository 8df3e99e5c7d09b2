// ai.trix::SignatureRoute: score[t, e] = <x_t, s_e> / sqrt(max(nnz(s_e), 1)); tile_idx = the top_k tiles by
// score + bias; weight = how much each of them counts. With several groups of tiles, as those of the layers
// that read the same x, each group is routed as if it were alone.
#include <algorithm>
#include <limits>
#include <memory>

#include "ops/custom_op.hpp"
#include "ops/fine_choice.hpp"
#include "ops/signature_table.hpp"

namespace trix {
namespace {

// clang-format off
constexpr TensorSpec kInputTable[] = {
    {"x", ElementType::kFloat, 2, "[T, D]"},
    {"signatures", ElementType::kUint8, 3, "[G * ceil(E/32), ceil(D/16), 128]"},
    {"bias", ElementType::kFloat, 1, "[G * E]"},
    {"log_mass", ElementType::kFloat, 1, "[G * E]"},
};
constexpr TensorSpec kOutputTable[] = {
    {"tile_idx", ElementType::kInt64, 2, "[T, G * top_k]"},
    {"weight", ElementType::kFloat, 2, "[T, G * top_k]"},
    {"score", ElementType::kFloat, 2, "[T, G * E]", true},
};
// clang-format on

constexpr const char* kTopKAttribute = "top_k";
constexpr const char* kGateAttribute = "gate";
constexpr const char* kThresholdAttribute = "confidence_threshold";
constexpr const char* kGroupsAttribute = "num_groups";
constexpr std::int64_t kTopKDefault = 1;
constexpr std::int64_t kGateDefault = 1;
constexpr float kThresholdDefault = 0.3f;
constexpr std::int64_t kGroupsDefault = 1;

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
          num_groups_(info.int_attribute(kGroupsAttribute, kGroupsDefault)),
          table_(info, kSignatures, kInputs[kSignatures]) {
        if (top_k_ < 1) reject("top_k (", top_k_, ") must be >= 1");
        if (!(confidence_threshold_ >= 0.0f))
            reject("confidence_threshold (", confidence_threshold_, ") must be >= 0");
        if (num_groups_ < 1) reject("num_groups (", num_groups_, ") must be >= 1");
    }

    void compute(KernelContext& context) const {
        const TensorView x = inputs_.view(context, kX);
        const TensorView signatures = inputs_.view(context, kSignatures);
        const TensorView bias = inputs_.view(context, kBias);
        const TensorView log_mass = inputs_.view(context, kLogMass);
        const GroupSizes sizes = check_sizes(x, signatures, bias, log_mass);

        const std::int64_t num_chosen = num_groups_ * top_k_;
        auto* tile_idx =
            context.output<std::int64_t>(kTileIdx, kOutputs[kTileIdx].name, {x.dim(0), num_chosen});
        auto* weight = context.output<float>(kWeight, kOutputs[kWeight].name, {x.dim(0), num_chosen});
        auto* score = context.output<float>(kScore, kOutputs[kScore].name, {x.dim(0), bias.dim(0)});
        std::vector<float> run_norms;
        const TileMatrices table = table_.matrix(signatures, sizes.num_rows, x.dim(1), run_norms);
        SignatureGateJob gate{};
        gate.bias = bias.as<float>();
        gate.log_mass = log_mass.as<float>();
        gate.tile_idx = tile_idx;
        gate.weight = weight;
        gate.num_tiles = sizes.num_tiles;
        gate.top_k = static_cast<std::size_t>(top_k_);
        gate.gate = gate_;
        gate.confidence_threshold = confidence_threshold_;
        if (score == nullptr && gate_ == Gate::kSigmoid && num_groups_ == 1 && gate.num_tiles >= kManyTiles) {
            // Only the scores of the chosen tiles count: there is no need for those of all others.
            choose_fine(context, table, x.as<float>(), x.size(0), gate.bias, gate.top_k, tile_idx, weight);
            gate.chosen_score = weight;
            weigh_tiles(context, gate, x.size(0));
            return;
        }
        std::unique_ptr<float[]> row_scores;
        float* scored = sizes.stride == sizes.num_tiles ? score : nullptr;
        if (scored == nullptr) {
            checked_bytes("scores", {x.dim(0), sizes.num_rows}, sizeof(float));
            row_scores.reset(new float[x.size(0) * static_cast<std::size_t>(sizes.num_rows)]);
            scored = row_scores.get();
        }
        score_tiles(context, table, x.as<float>(), x.size(0), scored);
        gate.score = scored;
        if (num_groups_ == 1) {
            choose_tiles(context, x.size(0), gate.num_tiles, gate.top_k, scored, gate.bias, tile_idx);
            weigh_tiles(context, gate, x.size(0));
            return;
        }
        const auto num_groups = static_cast<std::size_t>(num_groups_);
        route_groups(context, gate, tile_idx, num_groups, sizes.stride, x.size(0));
        if (score == nullptr || score == scored) return;
        for (std::size_t row = 0; row < x.size(0) * num_groups; ++row)
            std::copy_n(scored + row * sizes.stride, sizes.num_tiles, score + row * sizes.num_tiles);
    }

    static void infer_shapes(const ShapeContext& context) {
        const Dimension tokens = context.input_dimension(kX, kInputs[kX], 0);
        const std::int64_t top_k = context.int_attribute(kTopKAttribute, kTopKDefault);
        const std::int64_t num_groups = context.int_attribute(kGroupsAttribute, kGroupsDefault);
        if (top_k < 1 || num_groups < 1 || top_k > std::numeric_limits<std::int64_t>::max() / num_groups)
            return;
        const std::int64_t num_chosen = num_groups * top_k;
        context.set_output(kTileIdx, kOutputs[kTileIdx].type, {tokens, {num_chosen, ""}});
        context.set_output(kWeight, kOutputs[kWeight].type, {tokens, {num_chosen, ""}});
    }

  private:
    // num_tiles: E, of one group. stride: rows of the table from one group to the next. num_rows: of all
    // groups.
    struct GroupSizes {
        std::size_t num_tiles, stride;
        std::int64_t num_rows;
    };

    static Gate checked_gate(const KernelInfo& info) {
        const std::int64_t gate = info.int_attribute(kGateAttribute, kGateDefault);
        if (gate < 0 || gate > 2)
            reject("gate (", gate, ") must be 0 (sigmoid), 1 (softmax) or 2 (adaptive)");
        return static_cast<Gate>(gate);
    }

    GroupSizes check_sizes(const TensorView& x, const TensorView& signatures, const TensorView& bias,
                           const TensorView& log_mass) const {
        if (bias.dim(0) % num_groups_ != 0) {
            reject("the number of tiles in bias (", bias.dim(0), ") must be a multiple of num_groups (",
                   num_groups_, ")");
        }
        const std::int64_t num_tiles = bias.dim(0) / num_groups_;
        if (top_k_ > num_tiles) {
            const char* where = num_groups_ == 1 ? ") must be <= the number of tiles in bias ("
                                                 : ") must be <= the number of tiles in a group (";
            reject("top_k (", top_k_, where, num_tiles, ")");
        }
        if (log_mass.dim(0) != bias.dim(0)) {
            reject("length of log_mass (", log_mass.dim(0), ") must be the number of tiles in bias (",
                   bias.dim(0), ")");
        }
        // Each of several groups begins with a panel of its own.
        const auto tiles = static_cast<std::size_t>(num_tiles);
        const std::size_t stride = num_groups_ == 1 ? tiles : ceil_div(tiles, kPanelRows) * kPanelRows;
        const std::int64_t num_rows = num_groups_ * static_cast<std::int64_t>(stride);
        table_.check(signatures, num_rows, x.dim(1));
        return {tiles, stride, num_rows};
    }

    Inputs<std::size(kInputTable)> inputs_;
    std::int64_t top_k_;
    Gate gate_;
    float confidence_threshold_;
    std::int64_t num_groups_;
    SignatureTable table_;
};

}  // namespace

std::unique_ptr<ort_abi::OrtCustomOp> make_signature_route_op(const OrtApi* api) {
    return std::make_unique<CustomOp<SignatureRoute>>(api);
}

}  // namespace trix
