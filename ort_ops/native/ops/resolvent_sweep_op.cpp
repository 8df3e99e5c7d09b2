// ai.trix::ResolventSweep: G[t] = 1 / (alpha[t] - w[t] G[t - 1]), the pivots of a tridiagonal operator.
#include <algorithm>

#include "kernels/dispatch.hpp"
#include "kernels/resolvent_sweep/resolvent_sweep.hpp"
#include "ops/custom_op.hpp"

namespace trix {
namespace {

// clang-format off
constexpr TensorSpec kInputTable[] = {
    {"alpha_re", ElementType::kFloat, 3, "[B, H, T]"},
    {"alpha_im", ElementType::kFloat, 3, "[B, H, T]"},
    {"w", ElementType::kFloat, 3, "[B, H, T]"},
    {"first_re", ElementType::kFloat, 2, "[B, H]"},
    {"first_im", ElementType::kFloat, 2, "[B, H]"},
};
constexpr TensorSpec kOutputTable[] = {
    {"G_re", ElementType::kFloat, 3, "[B, H, T]"},
    {"G_im", ElementType::kFloat, 3, "[B, H, T]"},
};
// clang-format on

constexpr std::size_t kRowsAtOnce = 8;  // of the kernel
constexpr std::size_t kPivotsPerUnit = 1 << 13;

enum Input : std::size_t { kAlphaRe, kAlphaIm, kW, kFirstRe, kFirstIm };
enum Output : std::size_t { kGRe, kGIm };

class ResolventSweep {
  public:
    static constexpr const char* kName = "ResolventSweep";
    static constexpr auto& kInputs = kInputTable;
    static constexpr auto& kOutputs = kOutputTable;

    explicit ResolventSweep(const KernelInfo& info) : inputs_(info, kInputs) {}

    void compute(KernelContext& context) const {
        const TensorView alpha_re = inputs_.view(context, kAlphaRe);
        const TensorView alpha_im = inputs_.view(context, kAlphaIm), w = inputs_.view(context, kW);
        const TensorView first_re = inputs_.view(context, kFirstRe);
        const TensorView first_im = inputs_.view(context, kFirstIm);
        const std::int64_t B = alpha_re.dim(0), H = alpha_re.dim(1), T = alpha_re.dim(2);
        check_shape(alpha_im, {B, H, T}, alpha_re);
        check_shape(w, {B, H, T}, alpha_re);
        check_shape(first_re, {B, H}, alpha_re);
        check_shape(first_im, {B, H}, alpha_re);
        auto* G_re = context.output<float>(kGRe, kOutputs[kGRe].name, {B, H, T});
        auto* G_im = context.output<float>(kGIm, kOutputs[kGIm].name, {B, H, T});

        const std::size_t num_tokens = alpha_re.size(2), num_rows = alpha_re.size(0) * alpha_re.size(1);
        if (num_tokens == 0) return;
        const std::size_t groups = std::max<std::size_t>(kPivotsPerUnit / num_tokens / kRowsAtOnce, 1);
        const std::size_t rows = groups * kRowsAtOnce;
        context.parallel_for((num_rows + rows - 1) / rows, [&](std::size_t unit) noexcept {
            const std::size_t begin = unit * rows, end = std::min(begin + rows, num_rows);
            kernels().resolvent_sweep({alpha_re.as<float>(), alpha_im.as<float>(), w.as<float>(),
                                       first_re.as<float>(), first_im.as<float>(), G_re, G_im, num_tokens,
                                       begin, end});
        });
    }

    static void infer_shapes(const ShapeContext& context) {
        const std::vector<Dimension> shape = {context.input_dimension(kAlphaRe, kInputs[kAlphaRe], 0),
                                              context.input_dimension(kAlphaRe, kInputs[kAlphaRe], 1),
                                              context.input_dimension(kAlphaRe, kInputs[kAlphaRe], 2)};
        for (std::size_t output : {kGRe, kGIm}) context.set_output(output, kOutputs[output].type, shape);
    }

  private:
    Inputs<std::size(kInputTable)> inputs_;
};

}  // namespace

std::unique_ptr<ort_abi::OrtCustomOp> make_resolvent_sweep_op(const OrtApi* api) {
    return std::make_unique<CustomOp<ResolventSweep>>(api);
}

}  // namespace trix
