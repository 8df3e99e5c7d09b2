// ai.trix::ResolventMix: S[t] = G[t] (k[t] u[t] - c[t] S[t - 1]), y[t] = q[t] S[t], a linear recurrence over
// the tokens with a complex matrix as the state of each head.
#include <algorithm>

#include "kernels/dispatch.hpp"
#include "kernels/resolvent_mix/resolvent_mix.hpp"
#include "ops/custom_op.hpp"

namespace trix {
namespace {

// clang-format off
constexpr TensorSpec kInputTable[] = {
    {"G_re", ElementType::kFloat, 3, "[B, H, T]"},
    {"G_im", ElementType::kFloat, 3, "[B, H, T]"},
    {"c_re", ElementType::kFloat, 3, "[B, H, T]"},
    {"c_im", ElementType::kFloat, 3, "[B, H, T]"},
    {"u", ElementType::kFloat, 4, "[B, H, T, P]"},
    {"q", ElementType::kFloat, 4, "[B or 1, H or 1, T or 1, N]"},
    {"k", ElementType::kFloat, 4, "[B or 1, H or 1, T or 1, N]"},
    {"first_re", ElementType::kFloat, 4, "[B, H, N, P]"},
    {"first_im", ElementType::kFloat, 4, "[B, H, N, P]"},
};
constexpr TensorSpec kOutputTable[] = {
    {"y_re", ElementType::kFloat, 4, "[B, H, T, P]"},
    {"y_im", ElementType::kFloat, 4, "[B, H, T, P]"},
    {"last_re", ElementType::kFloat, 4, "[B, H, N, P]"},
    {"last_im", ElementType::kFloat, 4, "[B, H, N, P]"},
};
// clang-format on

constexpr std::size_t kProductsPerUnit = 1 << 15;  // complex ones, of the state and its decay

enum Input : std::size_t { kGRe, kGIm, kCRe, kCIm, kU, kQ, kK, kFirstRe, kFirstIm };
enum Output : std::size_t { kYRe, kYIm, kLastRe, kLastIm };

// A query or key of each token, where axes of size 1 are shared.
struct Rows {
    explicit Rows(const TensorView& view)
        : data(view.as<float>()),
          token_stride(view.dim(2) == 1 ? 0 : view.size(3)),
          head_stride(view.dim(1) == 1 ? 0 : view.size(2) * view.size(3)),
          batch_stride(view.dim(0) == 1 ? 0 : view.size(1) * view.size(2) * view.size(3)) {}

    const float* of(std::size_t text, std::size_t head) const {
        return data + text * batch_stride + head * head_stride;
    }

    const float* data;
    std::size_t token_stride;
    std::size_t head_stride;
    std::size_t batch_stride;
};

class ResolventMix {
  public:
    static constexpr const char* kName = "ResolventMix";
    static constexpr auto& kInputs = kInputTable;
    static constexpr auto& kOutputs = kOutputTable;

    explicit ResolventMix(const KernelInfo& info) : inputs_(info, kInputs) {}

    void compute(KernelContext& context) const {
        TensorView input[std::size(kInputTable)];
        for (std::size_t i = 0; i < std::size(kInputTable); ++i) input[i] = inputs_.view(context, i);
        check_sizes(input);

        const TensorView& u = input[kU];
        const std::int64_t B = u.dim(0), H = u.dim(1), T = u.dim(2), P = u.dim(3), N = input[kK].dim(3);
        auto* y_re = context.output<float>(kYRe, kOutputs[kYRe].name, {B, H, T, P});
        auto* y_im = context.output<float>(kYIm, kOutputs[kYIm].name, {B, H, T, P});
        auto* last_re = context.output<float>(kLastRe, kOutputs[kLastRe].name, {B, H, N, P});
        auto* last_im = context.output<float>(kLastIm, kOutputs[kLastIm].name, {B, H, N, P});
        if (P == 0) return;  // there may be any number of empty rows

        const std::size_t num_tokens = u.size(2), num_channels = u.size(3), width = input[kK].size(3);
        const std::size_t num_heads = u.size(1), num_rows = u.size(0) * num_heads;
        const std::size_t state_size = width * num_channels;
        std::copy_n(input[kFirstRe].as<float>(), num_rows * state_size, last_re);
        std::copy_n(input[kFirstIm].as<float>(), num_rows * state_size, last_im);
        if (num_tokens == 0) return;

        const Rows q(input[kQ]), k(input[kK]);
        const std::size_t products = num_tokens * state_size;
        const std::size_t rows = std::max<std::size_t>(kProductsPerUnit / products, 1);
        context.parallel_for((num_rows + rows - 1) / rows, [&](std::size_t unit) noexcept {
            for (std::size_t row = unit * rows; row < std::min((unit + 1) * rows, num_rows); ++row) {
                const std::size_t text = row / num_heads, head = row % num_heads, token = row * num_tokens;
                kernels().resolvent_mix({input[kGRe].as<float>() + token, input[kGIm].as<float>() + token,
                                         input[kCRe].as<float>() + token, input[kCIm].as<float>() + token,
                                         u.as<float>() + token * num_channels, q.of(text, head),
                                         k.of(text, head), y_re + token * num_channels,
                                         y_im + token * num_channels, last_re + row * state_size,
                                         last_im + row * state_size, num_tokens, num_channels, width,
                                         q.token_stride, k.token_stride});
            }
        });
    }

    static void infer_shapes(const ShapeContext& context) {
        const auto of = [&](Input input, std::size_t axis) {
            return context.input_dimension(input, kInputs[input], axis);
        };
        for (std::size_t output : {kYRe, kYIm})
            context.set_output(output, kOutputs[output].type, {of(kU, 0), of(kU, 1), of(kU, 2), of(kU, 3)});
        for (std::size_t output : {kLastRe, kLastIm})
            context.set_output(output, kOutputs[output].type, {of(kU, 0), of(kU, 1), of(kK, 3), of(kU, 3)});
    }

  private:
    static void check_sizes(const TensorView (&input)[std::size(kInputTable)]) {
        const TensorView& u = input[kU];
        for (std::size_t i : {kGRe, kGIm, kCRe, kCIm})
            check_shape(input[i], {u.dim(0), u.dim(1), u.dim(2)}, u);
        for (std::size_t i : {kQ, kK}) {
            for (std::size_t axis = 0; axis < 3; ++axis) {
                if (input[i].dim(axis) != 1 && input[i].dim(axis) != u.dim(axis)) {
                    reject("axis ", axis, " of ", input[i].name, " ", shape_text(input[i].shape),
                           " must be 1 or ", u.dim(axis), ", as u ", shape_text(u.shape), " has it");
                }
            }
        }
        const TensorView &q = input[kQ], &k = input[kK];
        if (q.dim(3) != k.dim(3)) {
            reject("width of q ", shape_text(q.shape), " must be that of k ", shape_text(k.shape));
        }
        if (k.dim(3) < 1) reject("width of k ", shape_text(k.shape), " must be >= 1");
        for (std::size_t i : {kFirstRe, kFirstIm})
            check_shape(input[i], {u.dim(0), u.dim(1), k.dim(3), u.dim(3)}, u);
    }

    Inputs<std::size(kInputTable)> inputs_;
};

}  // namespace

std::unique_ptr<ort_abi::OrtCustomOp> make_resolvent_mix_op(const OrtApi* api) {
    return std::make_unique<CustomOp<ResolventMix>>(api);
}

}  // namespace trix
