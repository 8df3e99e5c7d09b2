// ai.trix::SparseLookup, a whole layer: h = layer_norm(x), the best tiles by their signatures, and
// y[t] = x[t] + sum_k gate * magnitude_e(point(h[t])) * direction_e; see the kernels layer_norm and
// sparse_lookup.
#include <algorithm>
#include <array>
#include <atomic>
#include <new>

#include "kernels/dispatch.hpp"
#include "kernels/layer_norm/layer_norm.hpp"
#include "kernels/signature_route/signature_route.hpp"
#include "kernels/sparse_lookup/sparse_lookup.hpp"
#include "ops/custom_op.hpp"
#include "ops/signature_table.hpp"
#include "ops/thread_scratch.hpp"

namespace trix {
namespace {

// clang-format off
constexpr TensorSpec kInputTable[] = {
    {"x", ElementType::kFloat, 2, "[T, D]"},
    {"routing_x", ElementType::kFloat, 2, "[T, D]"},
    {"norm_weight", ElementType::kFloat, 1, "[D]"},
    {"norm_bias", ElementType::kFloat, 1, "[D]"},
    {"signatures", ElementType::kUint8, 3, "[ceil(E/32), ceil(D/16), 128]"},
    {"bias", ElementType::kFloat, 1, "[E]"},
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
    {"tile_idx", ElementType::kInt64, 2, "[T, top_k]"},
};
// clang-format on

constexpr const char* kTopKAttribute = "top_k";
constexpr std::int64_t kTopKDefault = 1;
constexpr const char* kGridAttribute = "grid_size";
constexpr std::int64_t kGridDefault = 16;
constexpr const char* kHingesAttribute = "has_hinges";
constexpr std::int64_t kHingesDefault = 0;
constexpr const char* kRouteOnNormAttribute = "route_on_norm";
constexpr std::int64_t kRouteOnNormDefault = 1;
constexpr const char* kEpsilonAttribute = "epsilon";
constexpr float kEpsilonDefault = 1e-5f;
constexpr std::int64_t kMaxGrid = 1 << 20;  // places on a longer side would be no whole floats

enum Input : std::size_t {
    kX,
    kRoutingX,
    kNormWeight,
    kNormBias,
    kSignatures,
    kBias,
    kGateCurve,
    kCompress,
    kCompressBias,
    kPointWeight,
    kPointBias,
    kSplines,
    kDirection,
    kNumInputs
};
enum Output : std::size_t { kY, kTileIdx };

using Views = std::array<TensorView, kNumInputs>;

// One rule: dimension `axis` of `input` is that of `other`.
struct SameDimension {
    Input input;
    std::size_t axis;
    Input other;
    std::size_t other_axis;
};

constexpr SameDimension kRules[] = {
    {kRoutingX, 0, kX, 0},           {kRoutingX, 1, kX, 1},  {kNormWeight, 0, kX, 1},
    {kNormBias, 0, kX, 1},           {kCompress, 0, kX, 1},  {kCompressBias, 0, kCompress, 1},
    {kPointWeight, 1, kCompress, 1}, {kDirection, 1, kX, 1}, {kBias, 0, kDirection, 0},
    {kSplines, 0, kDirection, 0},
};

void check_flag(const char* name, std::int64_t value) {
    if (value != 0 && value != 1) reject(name, " (", value, ") must be 0 or 1");
}

class SparseLookup {
  public:
    static constexpr const char* kName = "SparseLookup";
    static constexpr auto& kInputs = kInputTable;
    static constexpr auto& kOutputs = kOutputTable;

    explicit SparseLookup(const KernelInfo& info)
        : inputs_(info, kInputs),
          top_k_(info.int_attribute(kTopKAttribute, kTopKDefault)),
          grid_size_(info.int_attribute(kGridAttribute, kGridDefault)),
          has_hinges_(info.int_attribute(kHingesAttribute, kHingesDefault)),
          route_on_norm_(info.int_attribute(kRouteOnNormAttribute, kRouteOnNormDefault)),
          epsilon_(info.float_attribute(kEpsilonAttribute, kEpsilonDefault)),
          table_(info, kSignatures, kInputs[kSignatures]) {
        if (top_k_ < 1) reject(kTopKAttribute, " (", top_k_, ") must be >= 1");
        if (grid_size_ < 1 || grid_size_ > kMaxGrid)
            reject(kGridAttribute, " (", grid_size_, ") must be >= 1 and <= ", kMaxGrid);
        check_flag(kHingesAttribute, has_hinges_);
        check_flag(kRouteOnNormAttribute, route_on_norm_);
        if (!(epsilon_ >= 0.0f)) reject(kEpsilonAttribute, " (", epsilon_, ") must be >= 0");
        TensorView compress;
        if (info.constant_input(kCompress, kInputs[kCompress], &compress))
            constant_strips_ = in_strips(compress);
    }

    void compute(KernelContext& context) const {
        Views inputs;
        for (std::size_t i = 0; i < kNumInputs; ++i)
            inputs[i] = i == kRoutingX && route_on_norm_ == 1 ? inputs[kX] : inputs_.view(context, i);
        check_sizes(inputs);

        Run run{};
        run.job = make_job(inputs);
        run.norm_weight = inputs[kNormWeight].as<float>();
        run.norm_bias = inputs[kNormBias].as<float>();
        run.bias = inputs[kBias].as<float>();
        const std::int64_t num_tokens = inputs[kX].dim(0);
        run.job.y = context.output<float>(kY, kOutputs[kY].name, {num_tokens, inputs[kX].dim(1)});
        run.tile_idx = context.output<std::int64_t>(kTileIdx, kOutputs[kTileIdx].name, {num_tokens, top_k_});
        run.routing_x = route_on_norm_ == 1 ? nullptr : inputs[kRoutingX].as<float>();
        std::vector<float> run_norms;
        run.table = table_.matrix(inputs[kSignatures], inputs[kBias].dim(0), inputs[kX].dim(1), run_norms);
        std::vector<StripRow> run_strips;
        if (!inputs_.is_constant(kCompress)) run_strips = in_strips(inputs[kCompress]);
        run.job.compress = inputs_.is_constant(kCompress) ? constant_strips_.data() : run_strips.data();

        std::atomic<bool> has_memory{true};
        const std::size_t end = inputs[kX].size(0);
        // Few tokens are one unit: a layer is small, and to wake a thread takes longer than one token.
        context.parallel_for(ceil_div(end, kScoreBlock), [&](std::size_t unit) noexcept {
            const std::size_t begin = unit * kScoreBlock;
            if (!compute_unit(run, begin, std::min(kScoreBlock, end - begin))) has_memory = false;
        });
        if (!has_memory) throw std::bad_alloc();
    }

    static void infer_shapes(const ShapeContext& context) {
        const Dimension tokens = context.input_dimension(kX, kInputs[kX], 0);
        context.set_output(kY, kOutputs[kY].type, {tokens, context.input_dimension(kX, kInputs[kX], 1)});
        const std::int64_t top_k = context.int_attribute(kTopKAttribute, kTopKDefault);
        if (top_k >= 1) context.set_output(kTileIdx, kOutputs[kTileIdx].type, {tokens, {top_k, ""}});
    }

  private:
    // What all units of a run share.
    struct Run {
        SparseLookupJob job;  // of the whole run, without what a unit keeps for itself
        const float* norm_weight;
        const float* norm_bias;
        TileMatrices table;
        const float* routing_x;  // null: the signatures read the norm
        const float* bias;
        std::int64_t* tile_idx;
    };

    // The whole layer for some tokens, which stay in the cache from the norm to the sum. False without
    // memory.
    bool compute_unit(const Run& run, std::size_t begin, std::size_t num_tokens) const noexcept {
        SparseLookupJob job = run.job;
        const std::size_t num_h = num_tokens * job.width, num_scores = num_tokens * job.num_tiles;
        const std::size_t num_floats = num_h + num_scores + num_tokens * whole_strips(job.num_hidden);
        const std::size_t float_bytes = ceil_div(num_floats, 2) * 2 * sizeof(float);
        std::uint8_t* scratch = thread_scratch(float_bytes + score_block_bytes(job.num_tiles, job.width));
        if (scratch == nullptr) return false;
        float* h = reinterpret_cast<float*>(scratch);
        float* score = h + num_h;
        std::int64_t* tile_idx = run.tile_idx + begin * job.top_k;

        job.x += begin * job.width;
        job.y += begin * job.width;
        kernels().layer_norm({job.x, run.norm_weight, run.norm_bias, h, epsilon_, job.width, 0, num_tokens});
        score_block(run.table, run.routing_x == nullptr ? h : run.routing_x + begin * job.width, num_tokens,
                    scratch + float_bytes, score);
        kernels().signature_route({score, run.bias, tile_idx, job.num_tiles, job.top_k, 0, num_tokens});
        job.h = h;
        job.score = score;
        job.tile_idx = tile_idx;
        job.hidden = score + num_scores;
        job.token_end = num_tokens;
        kernels().sparse_lookup(job);
        return true;
    }

    void check_sizes(const Views& inputs) const {
        for (const SameDimension& rule : kRules) {
            const TensorView &input = inputs[rule.input], &other = inputs[rule.other];
            if (input.dim(rule.axis) != other.dim(rule.other_axis)) {
                reject("dimension ", rule.axis, " of ", input.name, " (", input.dim(rule.axis),
                       ") must be dimension ", rule.other_axis, " of ", other.name, " (",
                       other.dim(rule.other_axis), ")");
            }
        }
        if (top_k_ > inputs[kBias].dim(0)) {
            reject(kTopKAttribute, " (", top_k_, ") must be <= the number of tiles in bias (",
                   inputs[kBias].dim(0), ")");
        }
        table_.check(inputs[kSignatures], inputs[kBias].dim(0), inputs[kX].dim(1));
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

    static std::vector<StripRow> in_strips(const TensorView& compress) {
        std::vector<StripRow> strips(num_strip_rows(compress.size(0), compress.size(1)));
        lay_in_strips(compress.as<float>(), compress.size(0), compress.size(1), strips.data());
        return strips;
    }

    SparseLookupJob make_job(const Views& inputs) const {
        SparseLookupJob job{};
        job.x = inputs[kX].as<float>();
        job.gate_curve = inputs[kGateCurve].as<float>();
        job.compress_bias = inputs[kCompressBias].as<float>();
        job.point_weight = inputs[kPointWeight].as<float>();
        job.point_bias = inputs[kPointBias].as<float>();
        job.splines = inputs[kSplines].as<float>();
        job.direction = inputs[kDirection].as<float>();
        job.width = inputs[kX].size(1);
        job.num_hidden = inputs[kCompress].size(1);
        job.num_tiles = inputs[kDirection].size(0);
        job.top_k = static_cast<std::size_t>(top_k_);
        job.num_knots = inputs[kGateCurve].size(0);
        job.grid_size = static_cast<std::size_t>(grid_size_);
        job.spline_size = inputs[kSplines].size(1);
        job.has_hinges = has_hinges_ == 1;
        return job;
    }

    Inputs<kNumInputs> inputs_;
    std::int64_t top_k_;
    std::int64_t grid_size_;
    std::int64_t has_hinges_;
    std::int64_t route_on_norm_;
    float epsilon_;
    SignatureTable table_;
    std::vector<StripRow> constant_strips_;
};

}  // namespace

std::unique_ptr<ort_abi::OrtCustomOp> make_sparse_lookup_op(const OrtApi* api) {
    return std::make_unique<CustomOp<SparseLookup>>(api);
}

}  // namespace trix
