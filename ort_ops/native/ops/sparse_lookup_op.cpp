// ai.trix::SparseLookup: y[t] = x[t] + sum_k gate * magnitude_e(point[t]) * direction_e with e = tile_idx[t,
// k]; see kernels/sparse_lookup/sparse_lookup.hpp.
#include <algorithm>
#include <array>

#include "kernels/dispatch.hpp"
#include "kernels/ternary_panels.hpp"
#include "ops/custom_op.hpp"

namespace trix {
namespace {

// clang-format off
constexpr TensorSpec kInputTable[] = {
    {"x", ElementType::kFloat, 2, "[T, D]"},
    {"h", ElementType::kFloat, 2, "[T, D]"},
    {"tile_idx", ElementType::kInt64, 2, "[T, top_k]"},
    {"score", ElementType::kFloat, 2, "[T, E]"},
    {"gate_curve", ElementType::kFloat, 1, "[N]"},
    {"compress", ElementType::kFloat, 2, "[D, H]"},
    {"compress_bias", ElementType::kFloat, 1, "[H]"},
    {"point_weight", ElementType::kFloat, 2, "[2, H]"},
    {"point_bias", ElementType::kFloat, 1, "[2]"},
    {"splines", ElementType::kFloat, 2, "[E, S]"},
    {"direction", ElementType::kFloat, 2, "[E, D]"},
};
constexpr TensorSpec kOutputTable[] = {
    {"y", ElementType::kFloat, 2, "[T, D]"},
    {"point", ElementType::kFloat, 2, "[T, 2]"},
};
// clang-format on

constexpr const char* kGridAttribute = "grid_size";
constexpr const char* kHingesAttribute = "has_hinges";
constexpr std::int64_t kGridDefault = 16;
constexpr std::int64_t kHingesDefault = 0;
constexpr std::int64_t kMaxGrid = 1 << 20;  // places on a longer side would be no whole floats
constexpr std::size_t kTokensPerUnit = 24;

enum Input : std::size_t {
    kX,
    kH,
    kTileIdx,
    kScore,
    kGateCurve,
    kCompress,
    kCompressBias,
    kPointWeight,
    kPointBias,
    kSplines,
    kDirection,
    kNumInputs
};
enum Output : std::size_t { kY, kPoint };

using Views = std::array<TensorView, kNumInputs>;

// One rule: dimension `axis` of `input` is that of `other`.
struct SameDimension {
    Input input;
    std::size_t axis;
    Input other;
    std::size_t other_axis;
};

constexpr SameDimension kRules[] = {
    {kH, 0, kX, 0},
    {kH, 1, kX, 1},
    {kTileIdx, 0, kX, 0},
    {kScore, 0, kX, 0},
    {kCompress, 0, kX, 1},
    {kCompressBias, 0, kCompress, 1},
    {kPointWeight, 1, kCompress, 1},
    {kDirection, 1, kX, 1},
    {kScore, 1, kDirection, 0},
    {kSplines, 0, kDirection, 0},
};

class SparseLookup {
  public:
    static constexpr const char* kName = "SparseLookup";
    static constexpr auto& kInputs = kInputTable;
    static constexpr auto& kOutputs = kOutputTable;

    explicit SparseLookup(const KernelInfo& info)
        : inputs_(info, kInputs),
          grid_size_(info.int_attribute(kGridAttribute, kGridDefault)),
          has_hinges_(info.int_attribute(kHingesAttribute, kHingesDefault)) {
        if (grid_size_ < 1 || grid_size_ > kMaxGrid)
            reject(kGridAttribute, " (", grid_size_, ") must be >= 1 and <= ", kMaxGrid);
        if (has_hinges_ != 0 && has_hinges_ != 1)
            reject(kHingesAttribute, " (", has_hinges_, ") must be 0 or 1");
    }

    void compute(KernelContext& context) const {
        Views inputs;
        for (std::size_t i = 0; i < kNumInputs; ++i) inputs[i] = inputs_.view(context, i);
        check_sizes(inputs);
        check_choice(inputs[kTileIdx], inputs[kDirection].dim(0));

        const std::int64_t num_tokens = inputs[kX].dim(0), num_hidden = inputs[kCompress].dim(1);
        SparseLookupJob job = make_job(inputs);
        job.y = context.output<float>(kY, kOutputs[kY].name, {num_tokens, inputs[kX].dim(1)});
        job.point = context.output<float>(kPoint, kOutputs[kPoint].name, {num_tokens, 2});
        checked_bytes("hidden values", {num_tokens, num_hidden}, sizeof(float));
        std::vector<float> hidden(inputs[kX].size(0) * job.num_hidden);
        job.hidden = hidden.data();
        const SparseLookupKernel kernel = kernels().sparse_lookup;
        const std::size_t end = inputs[kX].size(0);
        context.parallel_for(ceil_div(end, kTokensPerUnit), [&](std::size_t unit) noexcept {
            SparseLookupJob part = job;
            part.token_begin = unit * kTokensPerUnit;
            part.token_end = std::min(part.token_begin + kTokensPerUnit, end);
            kernel(part);
        });
    }

    static void infer_shapes(const ShapeContext& context) {
        const Dimension tokens = context.input_dimension(kX, kInputs[kX], 0);
        context.set_output(kY, kOutputs[kY].type, {tokens, context.input_dimension(kX, kInputs[kX], 1)});
        context.set_output(kPoint, kOutputs[kPoint].type, {tokens, {2, ""}});
    }

  private:
    void check_sizes(const Views& inputs) const {
        for (const SameDimension& rule : kRules) {
            const TensorView &input = inputs[rule.input], &other = inputs[rule.other];
            if (input.dim(rule.axis) != other.dim(rule.other_axis)) {
                reject("dimension ", rule.axis, " of ", input.name, " (", input.dim(rule.axis),
                       ") must be dimension ", rule.other_axis, " of ", other.name, " (",
                       other.dim(rule.other_axis), ")");
            }
        }
        if (inputs[kPointWeight].dim(0) != 2)
            reject("rows of point_weight (", inputs[kPointWeight].dim(0), ") must be 2");
        if (inputs[kPointBias].dim(0) != 2)
            reject("length of point_bias (", inputs[kPointBias].dim(0), ") must be 2");
        if (inputs[kGateCurve].dim(0) < 2)
            reject("length of gate_curve (", inputs[kGateCurve].dim(0), ") must be >= 2");
        const std::int64_t spline_size =
            has_hinges_ == 1 ? 4 * grid_size_ + 1 : (grid_size_ + 1) * (grid_size_ + 1);
        if (inputs[kSplines].dim(1) != spline_size) {
            reject("columns of splines (", inputs[kSplines].dim(1), ") must be ",
                   has_hinges_ == 1 ? "4 grid_size + 1" : "(grid_size + 1)^2", " (", spline_size,
                   ") for grid_size ", grid_size_);
        }
    }

    static void check_choice(const TensorView& tile_idx, std::int64_t num_tiles) {
        const auto* tile = tile_idx.as<std::int64_t>();
        for (std::size_t i = 0; i < tile_idx.size(0) * tile_idx.size(1); ++i) {
            if (tile[i] < 0 || tile[i] >= num_tiles) {
                reject("tile_idx (", tile[i], ", at place ", i, ") must be >= 0 and < the number of tiles (",
                       num_tiles, ")");
            }
        }
    }

    SparseLookupJob make_job(const Views& inputs) const {
        SparseLookupJob job{};
        job.x = inputs[kX].as<float>();
        job.h = inputs[kH].as<float>();
        job.tile_idx = inputs[kTileIdx].as<std::int64_t>();
        job.score = inputs[kScore].as<float>();
        job.gate_curve = inputs[kGateCurve].as<float>();
        job.compress = inputs[kCompress].as<float>();
        job.compress_bias = inputs[kCompressBias].as<float>();
        job.point_weight = inputs[kPointWeight].as<float>();
        job.point_bias = inputs[kPointBias].as<float>();
        job.splines = inputs[kSplines].as<float>();
        job.direction = inputs[kDirection].as<float>();
        job.width = inputs[kX].size(1);
        job.num_hidden = inputs[kCompress].size(1);
        job.num_tiles = inputs[kDirection].size(0);
        job.top_k = inputs[kTileIdx].size(1);
        job.num_knots = inputs[kGateCurve].size(0);
        job.grid_size = static_cast<std::size_t>(grid_size_);
        job.spline_size = inputs[kSplines].size(1);
        job.has_hinges = has_hinges_ == 1;
        return job;
    }

    Inputs<kNumInputs> inputs_;
    std::int64_t grid_size_;
    std::int64_t has_hinges_;
};

}  // namespace

std::unique_ptr<ort_abi::OrtCustomOp> make_sparse_lookup_op(const OrtApi* api) {
    return std::make_unique<CustomOp<SparseLookup>>(api);
}

}  // namespace trix
