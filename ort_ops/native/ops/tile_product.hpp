// The product of every token with the matrix of its tile, spread over the session's threads: what the ops
// share.
#pragma once

#include <cstdint>

#include "kernels/work_plan.hpp"
#include "ops/ort_calls.hpp"

namespace trix {

/// How x meets the ternary weights: the attributes activation_bits (24: as exact as float32; 8) and
/// group_size (of the columns that share a scale; 0: all).
class Activations {
  public:
    static constexpr const char* kBitsAttribute = "activation_bits";
    static constexpr const char* kGroupAttribute = "group_size";
    static constexpr std::int64_t kBitsDefault = 24;
    static constexpr std::int64_t kGroupDefault = 128;

    /// The defaults.
    Activations() : bits_(kBitsDefault), group_size_(kGroupDefault) {}

    explicit Activations(const KernelInfo& info);

    /// 24 or 8 bits, a scale for each 128 columns.
    explicit Activations(std::int64_t bits) : bits_(bits), group_size_(kGroupDefault) {}

    std::size_t num_planes() const { return bits_ == 8 ? 1 : 3; }

    /// Columns that share a scale, a multiple of 16: 128, or num_columns rounded up.
    std::size_t group_columns(std::size_t num_columns) const;

  private:
    std::int64_t bits_;
    std::int64_t group_size_;
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
    std::vector<float> squared_rest;  // empty unless asked for
    std::size_t group_columns;
    std::size_t num_planes;
};

/// x [num_rows, num_columns]. with_rest: squared_rest, too, of 8 bits.
QuantisedRows quantise(const KernelContext& context, const Activations& activations, const float* x,
                       std::size_t num_rows, std::size_t num_columns, bool with_rest = false);

/// The same of relu(x)^2, which takes the place of x.
QuantisedRows quantise_activated(const KernelContext& context, const Activations& activations, float* x,
                                 std::size_t num_rows, std::size_t num_columns);

/// y[y_idx[i], :] = tile e times row token_idx[i] of x, for the places i of tile e in the groups.
void multiply_tiles(const KernelContext& context, const QuantisedRows& x, const TileMatrices& tiles,
                    const TokenGroups& groups, const std::int64_t* token_idx, const std::int64_t* y_idx,
                    float* y);

}  // namespace trix
