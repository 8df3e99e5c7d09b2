// ai.trix::TernaryTileMatMul: y[t, n] = row_scale[e, n] * sum_k x[t, k] * code[e, n, k] with e = tile_idx[t].
#include "kernels/dispatch.hpp"
#include "kernels/packed_codes.hpp"
#include "kernels/work_plan.hpp"
#include "ops/custom_op.hpp"
#include "ops/packed_input.hpp"

namespace trix {
namespace {

// clang-format off
constexpr TensorSpec kInputTable[] = {
    {"x", ElementType::kFloat, 2, "[T, K]"},
    {"packed", ElementType::kUint8, 3, "[E, N, ceil(K/4)]"},
    {"row_scale", ElementType::kFloat, 2, "[E, N]"},
    {"tile_idx", ElementType::kInt64, 1, "[T]"},
};
constexpr TensorSpec kOutputTable[] = {
    {"y", ElementType::kFloat, 2, "[T, N]"},
};
// clang-format on

enum Input : std::size_t { kX, kPacked, kRowScale, kTileIdx };

class TernaryTileMatMul {
  public:
    static constexpr const char* kName = "TernaryTileMatMul";
    static constexpr auto& kInputs = kInputTable;
    static constexpr auto& kOutputs = kOutputTable;

    explicit TernaryTileMatMul(const KernelInfo& info) : packed_(info, kPacked, kInputs[kPacked]) {}

    void compute(KernelContext& context) const {
        const TensorView x = context.input(kX, kInputs[kX]);
        const TensorView packed = context.input(kPacked, kInputs[kPacked]);
        const TensorView row_scale = context.input(kRowScale, kInputs[kRowScale]);
        const TensorView tile_idx = context.input(kTileIdx, kInputs[kTileIdx]);
        check_sizes(x, packed, row_scale, tile_idx);

        const std::size_t num_rows = packed.size(1);
        const std::size_t num_columns = x.size(1);
        float* y = context.output<float>(0, kOutputs[0].name, {x.dim(0), packed.dim(1)});
        // Tiles without rows hold no bytes, so there may be any number of them: keep no list of them.
        if (num_rows == 0) return;

        const TokenGroups groups = group_tokens(tile_idx.as<std::int64_t>(), x.size(0), packed.size(0));
        const std::vector<WorkUnit> units = plan_units(groups, num_rows, num_columns);
        const std::size_t tile_bytes = num_rows * packed.size(2);
        const TernaryTileMatMulKernel kernel = kernels().ternary_tile_matmul;
        context.parallel_for(units.size(), [&](std::size_t i) noexcept {
            const WorkUnit& unit = units[i];
            TernaryTileMatMulJob job{};
            job.x = x.as<float>();
            job.packed = packed.as<std::uint8_t>() + unit.tile * tile_bytes;
            job.row_scale = row_scale.as<float>() + unit.tile * num_rows;
            job.token_idx = groups.order.data() + unit.token_begin;
            job.y = y;
            job.num_tokens = unit.token_end - unit.token_begin;
            job.num_columns = num_columns;
            job.num_rows = num_rows;
            job.row_begin = unit.row_begin;
            job.row_end = unit.row_end;
            kernel(job);
        });
    }

    static void infer_shapes(const ShapeContext& context) {
        context.set_output(0, kOutputs[0].type,
                           {context.input_dimension(kX, kInputs[kX], 0),
                            context.input_dimension(kRowScale, kInputs[kRowScale], 1)});
    }

  private:
    void check_sizes(const TensorView& x, const TensorView& packed, const TensorView& row_scale,
                     const TensorView& tile_idx) const {
        packed_.check_rows(packed, x.dim(1));
        if (row_scale.dim(0) != packed.dim(0) || row_scale.dim(1) != packed.dim(1)) {
            reject("shape of row_scale ", shape_text(row_scale.shape),
                   " must be [E, N], the first two dimensions of packed ", shape_text(packed.shape));
        }
        if (tile_idx.dim(0) != x.dim(0)) {
            reject("length of tile_idx (", tile_idx.dim(0), ") must be the number of tokens of x (", x.dim(0),
                   ")");
        }
        const auto* tile = tile_idx.as<std::int64_t>();
        for (std::size_t t = 0; t < tile_idx.size(0); ++t) {
            if (tile[t] < 0 || tile[t] >= packed.dim(0)) {
                reject("tile_idx[", t, "] (", tile[t], ") must be >= 0 and < the number of tiles (",
                       packed.dim(0), ")");
            }
        }
    }

    PackedInput packed_;
};

}  // namespace

std::unique_ptr<ort_abi::OrtCustomOp> make_ternary_tile_matmul_op(const OrtApi* api) {
    return std::make_unique<CustomOp<TernaryTileMatMul>>(api);
}

}  // namespace trix
