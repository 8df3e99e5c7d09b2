#include "ops/packed_input.hpp"

#include <cstdio>

#include "kernels/packed_codes.hpp"

namespace trix {
namespace {

std::string hex(std::uint8_t byte) {
    char text[8];
    std::snprintf(text, sizeof(text), "0x%02x", byte);
    return text;
}

// "packed[1, 2, 3] (0xc0)": the byte at a flat position.
std::string byte_text(const TensorView& packed, std::size_t position) {
    std::vector<std::int64_t> index(packed.shape.size());
    std::size_t rest = position;
    for (std::size_t axis = index.size(); axis-- > 0;) {
        index[axis] = static_cast<std::int64_t>(rest % packed.size(axis));
        rest /= packed.size(axis);
    }
    return packed.name + shape_text(index) + " (" + hex(packed.as<std::uint8_t>()[position]) + ")";
}

void check_codes(const TensorView& packed) {
    const std::size_t num_bytes = count_packed_rows(packed) * packed.size(packed.shape.size() - 1);
    const std::size_t position = find_reserved_code(packed.as<std::uint8_t>(), num_bytes);
    if (position != kNotFound) {
        reject("byte ", byte_text(packed, position), " must hold only the codes 00, 01 and 10, it holds 11");
    }
}

std::uint8_t last_bytes(const TensorView& packed) {
    return union_of_last_bytes(packed.as<std::uint8_t>(), count_packed_rows(packed),
                               packed.size(packed.shape.size() - 1));
}

[[noreturn]] void reject_padding(const TensorView& packed, std::int64_t num_columns) {
    const std::size_t row_bytes = packed.size(packed.shape.size() - 1);
    std::size_t position = row_bytes - 1;
    while ((packed.as<std::uint8_t>()[position] & padding_mask(num_columns)) == 0) position += row_bytes;
    reject("byte ", byte_text(packed, position), " must have zero padding bits past the last column (",
           num_columns - 1, " of x), mask ", hex(padding_mask(num_columns)));
}

}  // namespace

std::size_t count_packed_rows(const TensorView& packed) {
    std::size_t num_rows = 1;
    for (std::size_t axis = 0; axis + 1 < packed.shape.size(); ++axis) num_rows *= packed.size(axis);
    return num_rows;
}

PackedInput::PackedInput(const KernelInfo& info, std::size_t index, const TensorSpec& spec) {
    is_constant_ = info.constant_input(index, spec, &constant_);
    if (!is_constant_) return;
    check_codes(constant_);
    constant_last_bytes_ = last_bytes(constant_);
}

void PackedInput::check_rows(const TensorView& packed, std::int64_t num_columns) const {
    const std::int64_t row_bytes = packed.dim(packed.shape.size() - 1);
    if (row_bytes != packed_row_bytes(num_columns)) {
        reject("row width of ", packed.name, " (", row_bytes,
               " bytes) must be ceil(columns / 4) = ", packed_row_bytes(num_columns), " for the ",
               num_columns, " columns of x");
    }
    if (!is_constant_) check_codes(packed);
    const std::uint8_t used_bits = is_constant_ ? constant_last_bytes_ : last_bytes(packed);
    if ((used_bits & padding_mask(num_columns)) != 0) reject_padding(packed, num_columns);
}

}  // namespace trix
