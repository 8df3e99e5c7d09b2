// Validation of an input that holds packed ternary codes.
#pragma once

#include <cstdint>

#include "ops/ort_calls.hpp"

namespace trix {

/// Rejects the reserved code 11 and nonzero padding bits. Constant weights are scanned once, when the session
/// is created; others at every run.
class PackedInput {
  public:
    PackedInput(const KernelInfo& info, std::size_t index, const TensorSpec& spec);

    bool is_constant() const { return is_constant_; }

    /// The constant tensor (valid as long as the session). Empty unless is_constant().
    const TensorView& constant() const { return constant_; }

    /// `packed` is the input of this run: its rows must hold exactly num_columns codes, the columns of x.
    void check_rows(const TensorView& packed, std::int64_t num_columns) const;

  private:
    bool is_constant_ = false;
    TensorView constant_;
    std::uint8_t constant_last_bytes_ = 0;
};

/// The number of rows of codes: the product of all dimensions but the last.
std::size_t count_packed_rows(const TensorView& packed);

}  // namespace trix
