// The product of every token with the matrix of its tile, spread over the session's threads: what the ops
// share.
#pragma once

#include <cstdint>

#include "kernels/quantize_rows/quantize_rows.hpp"
#include "kernels/ternary_matmul/ternary_matmul.hpp"
#include "kernels/work_plan.hpp"
#include "ops/ort_calls.hpp"

namespace trix {

/// Tokens of 24 bits that are wide are multiplied again, by what 24 bits leave of them (add_rest). Without
/// that a huge activation would take the bits of the others of its group even where its own weight is 0.
/// Others keep an error of at most 2^-23 m for each weight of a group whose largest activation is m.
///
/// A signature may be active in just the small dimensions, so scores tolerate few of them. Normal and uniform
/// rows of 128 columns are wide once in 1000 times.
inline constexpr WideRule kWideForScores = {{{0x1p-8f, 4}, {0x1p-12f, 32}, {0x1p-19f, kMaxShare}}};
/// Squared hidden values spread twice as far.
inline constexpr WideRule kWideForProducts = {{{0x1p-12f, 4}, {}, {}}};

inline constexpr std::size_t kFinePlanes = 3;  // of activations of 24 bits

/// How x meets the ternary weights: the attributes activation_bits (24 or 8), group_size (of the columns that
/// share a scale; 0: all) and, of 8 bits, min_magnitude (the least that a scale is made for).
class Activations {
  public:
    static constexpr const char* kBitsAttribute = "activation_bits";
    static constexpr const char* kGroupAttribute = "group_size";
    static constexpr const char* kMinMagnitudeAttribute = "min_magnitude";
    static constexpr std::int64_t kBitsDefault = 24;
    static constexpr std::int64_t kGroupDefault = 128;
    static constexpr float kMinMagnitudeDefault = 0.0f;

    /// The defaults, with the rule for scores.
    Activations() : bits_(kBitsDefault), group_size_(kGroupDefault), wide_rule_(kWideForScores) {}

    explicit Activations(const KernelInfo& info);

    /// 24 or 8 bits, a scale for each 128 columns.
    explicit Activations(std::int64_t bits) : bits_(bits), group_size_(kGroupDefault) {}

    std::size_t num_planes() const { return bits_ == 8 ? 1 : kFinePlanes; }

    /// Columns that share a scale, a multiple of 16: 128, or num_columns rounded up.
    std::size_t group_columns(std::size_t num_columns) const;

    const WideRule& wide_rule() const { return wide_rule_; }

    float min_magnitude() const { return min_magnitude_; }

  private:
    std::int64_t bits_;
    std::int64_t group_size_;
    float min_magnitude_ = kMinMagnitudeDefault;
    WideRule wide_rule_{};
};

/// Rejects more columns than the kernels can sum.
void check_columns(const char* what, std::int64_t num_columns);

/// Matrices [E, N, K] in panels one after the other, and their row scales [E, N].
struct TileMatrices {
    const std::uint8_t* panels;
    const float* row_scale;
    std::size_t num_rows;
    std::size_t num_columns;
};

/// Rows of activations as the kernels take them, quantised.
struct QuantisedRows {
    std::vector<std::int8_t> q;
    std::vector<float> scale;
    std::vector<std::int32_t> sum;
    std::vector<float> squared_rest;    // empty unless asked for
    std::vector<std::uint8_t> is_wide;  // of 24 bits
    const float* x;                     // what was quantised
    std::size_t group_columns;
    std::size_t num_planes;
};

/// x [num_rows, num_columns]. with_rest: squared_rest, too, of 8 bits.
QuantisedRows quantise(const KernelContext& context, const Activations& activations, const float* x,
                       std::size_t num_rows, std::size_t num_columns, bool with_rest = false);

/// The same of relu(x)^2, which takes the place of x.
QuantisedRows quantise_activated(const KernelContext& context, const Activations& activations, float* x,
                                 std::size_t num_rows, std::size_t num_columns);

/// The whole tile times quantised rows, or those that a quantiser's job writes: the caller adds which tokens,
/// and y.
TernaryMatMulJob product_job(const TileMatrices& tile, const QuantisedRows& rows);
TernaryMatMulJob product_job(const TileMatrices& tile, const QuantizeRowsJob& rows);

/// Rows quantised with 24 bits in scratch of plane_bytes, aligned to 4 bytes: a job for rows [0, num_rows),
/// without x. scratch holds the scales, the sums and then q, whose end is aligned to 4 bytes again.
QuantizeRowsJob plane_job(std::uint8_t* scratch, std::size_t num_rows, std::size_t num_columns,
                          std::size_t group_columns);
std::size_t plane_bytes(std::size_t num_rows, std::size_t num_columns, std::size_t group_columns);

/// Bytes that add_rest needs.
std::size_t rest_bytes(std::size_t num_columns, std::size_t group_columns, std::size_t num_rows);

/// y [num_rows] += the tile times what the three planes q and scale leave of the row x, quantised in its turn
/// until float32 would round the rest away, on the calling thread. `scratch` is aligned to 4 bytes.
void add_rest(const TileMatrices& tile, const float* x, const std::int8_t* q, const float* scale,
              std::size_t group_columns, std::uint8_t* scratch, float* y) noexcept;

/// The same for row `token` of x.
void add_rest(const TileMatrices& tile, const QuantisedRows& x, std::size_t token, std::uint8_t* scratch,
              float* y) noexcept;

/// y[y_idx[i], :] = tile e times row token_idx[i] of x, for the places i of tile e in the groups.
void multiply_tiles(const KernelContext& context, const QuantisedRows& x, const TileMatrices& tiles,
                    const TokenGroups& groups, const std::int64_t* token_idx, const std::int64_t* y_idx,
                    float* y);

}  // namespace trix
