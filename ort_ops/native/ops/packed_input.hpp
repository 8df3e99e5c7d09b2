// Validation of an input that holds packed ternary codes in panels (ternary_panels.hpp).
#pragma once

#include <cstdint>

#include "kernels/ternary_panels.hpp"
#include "ops/ort_calls.hpp"

namespace trix {

/// An input [..., panels, blocks, 128]: one matrix of codes for each index of the dimensions before. Rejects
/// the reserved code 11 and padding that is not 0. Constant weights are scanned once, when the session is
/// created; others at every run.
class PackedInput {
  public:
    PackedInput(const KernelInfo& info, std::size_t index, const TensorSpec& spec);

    bool is_constant() const { return is_constant_; }

    /// The constant tensor (valid as long as the session). Empty unless is_constant().
    const TensorView& constant() const { return constant_; }

    /// `packed` is the input of this run: its matrices must have num_rows rows and num_columns columns.
    void check(const TensorView& packed, std::int64_t num_rows, std::int64_t num_columns) const;

  private:
    bool is_constant_ = false;
    TensorView constant_;
    UsedSize constant_size_{};
};

}  // namespace trix
