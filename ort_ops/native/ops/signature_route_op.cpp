// ai.trix::SignatureRoute: score[t, e] = <x_t, s_e> / sqrt(max(nnz(s_e), 1)); tile_idx = the top_k tiles by
// score + bias.
#include <numeric>

#include "kernels/dispatch.hpp"
#include "ops/custom_op.hpp"
#include "ops/packed_input.hpp"
#include "ops/tile_product.hpp"

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
constexpr std::size_t kTokensPerSelection = 64;

enum Input : std::size_t { kX, kSignatures, kBias };
enum Output : std::size_t { kTileIdx, kScore };

class SignatureRoute {
  public:
    static constexpr const char* kName = "SignatureRoute";
    static constexpr auto& kInputs = kInputTable;
    static constexpr auto& kOutputs = kOutputTable;

    explicit SignatureRoute(const KernelInfo& info)
        : top_k_(info.int_attribute(kTopKAttribute, kTopKDefault)),
          signatures_(info, kSignatures, kInputs[kSignatures]) {
        if (top_k_ < 1) reject("top_k (", top_k_, ") must be >= 1");
        if (signatures_.is_constant()) constant_norms_ = inverse_norms(signatures_.constant());
    }

    void compute(KernelContext& context) const {
        const TensorView x = context.input(kX, kInputs[kX]);
        const TensorView signatures = context.input(kSignatures, kInputs[kSignatures]);
        const TensorView bias = context.input(kBias, kInputs[kBias]);
        check_sizes(x, signatures, bias);

        auto* tile_idx = context.output<std::int64_t>(kTileIdx, kOutputs[kTileIdx].name, {x.dim(0), top_k_});
        auto* score = context.output<float>(kScore, kOutputs[kScore].name, {x.dim(0), bias.dim(0)});
        const std::vector<float> run_norms =
            signatures_.is_constant() ? std::vector<float>{} : inverse_norms(signatures);
        // The table of signatures is a ternary matrix with one row per tile, and the norms are its row
        // scales.
        const TileMatrices table{signatures.as<std::uint8_t>(),
                                 signatures_.is_constant() ? constant_norms_.data() : run_norms.data(),
                                 bias.size(0), x.size(1)};
        TokenGroups all_tokens{std::vector<std::int64_t>(x.size(0)), {0, x.size(0)}};
        std::iota(all_tokens.order.begin(), all_tokens.order.end(), std::int64_t{0});
        const QuantisedRows rows = quantise(context, Activations(), x.as<float>(), x.size(0), x.size(1));
        multiply_tiles(context, rows, table, all_tokens, all_tokens.order.data(), all_tokens.order.data(),
                       score);
        choose_tiles(context, x.size(0), bias.size(0), score, bias.as<float>(), tile_idx);
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
        signatures_.check(signatures, bias.dim(0), x.dim(1));
        check_columns("x", x.dim(1));
    }

    static std::vector<float> inverse_norms(const TensorView& signatures) {
        if (signatures.size(2) != kBlockBytes) return {};  // check_sizes will say so
        std::vector<float> norms(signatures.size(0) * kPanelRows);
        inverse_row_norms(signatures.as<std::uint8_t>(), norms.size(), signatures.size(1) * kBlockColumns,
                          norms.data());
        return norms;
    }

    void choose_tiles(const KernelContext& context, std::size_t num_tokens, std::size_t num_tiles,
                      const float* score, const float* bias, std::int64_t* tile_idx) const {
        const SignatureRouteKernel kernel = kernels().signature_route;
        const std::size_t num_blocks = (num_tokens + kTokensPerSelection - 1) / kTokensPerSelection;
        context.parallel_for(num_blocks, [&](std::size_t block) noexcept {
            SignatureRouteJob job{};
            job.score = score;
            job.bias = bias;
            job.tile_idx = tile_idx;
            job.num_tiles = num_tiles;
            job.top_k = static_cast<std::size_t>(top_k_);
            job.token_begin = block * kTokensPerSelection;
            job.token_end = std::min(job.token_begin + kTokensPerSelection, num_tokens);
            kernel(job);
        });
    }

    std::int64_t top_k_;
    PackedInput signatures_;
    std::vector<float> constant_norms_;
};

}  // namespace

std::unique_ptr<ort_abi::OrtCustomOp> make_signature_route_op(const OrtApi* api) {
    return std::make_unique<CustomOp<SignatureRoute>>(api);
}

}  // namespace trix
