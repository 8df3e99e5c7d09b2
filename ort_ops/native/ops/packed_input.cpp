#include "ops/packed_input.hpp"

#include <algorithm>
#include <cstdio>

#include "ops/large_pages.hpp"

namespace trix {
namespace {

std::string hex(std::uint8_t byte) {
    char text[8];
    std::snprintf(text, sizeof(text), "0x%02x", byte);
    return text;
}

// "packed[1, 2, 3, 4] (0xc0)": the byte at a flat position.
std::string byte_text(const TensorView& packed, std::size_t position) {
    std::vector<std::int64_t> index(packed.shape.size());
    std::size_t rest = position;
    for (std::size_t axis = index.size(); axis-- > 0;) {
        index[axis] = static_cast<std::int64_t>(rest % packed.size(axis));
        rest /= packed.size(axis);
    }
    return packed.name + shape_text(index) + " (" + hex(packed.as<std::uint8_t>()[position]) + ")";
}

std::size_t count_bytes(const TensorView& packed) {
    std::size_t num_bytes = 1;
    for (std::size_t axis = 0; axis < packed.shape.size(); ++axis) num_bytes *= packed.size(axis);
    return num_bytes;
}

void check_codes(const TensorView& packed) {
    const std::size_t position = find_reserved_code(packed.as<std::uint8_t>(), count_bytes(packed));
    if (position != kNotFound) {
        reject("byte ", byte_text(packed, position), " must hold only the codes 00, 01 and 10, it holds 11");
    }
}

// The largest over all matrices.
UsedSize used_size_of(const TensorView& packed) {
    const std::size_t rank = packed.shape.size();
    const std::size_t num_panels = packed.size(rank - 3), num_blocks = packed.size(rank - 2);
    UsedSize used{0, 0};
    const std::size_t matrix_bytes = num_panels * num_blocks * packed.size(rank - 1);
    if (matrix_bytes == 0 || packed.size(rank - 1) != kBlockBytes) return used;
    const std::size_t num_bytes = count_bytes(packed);
    for (std::size_t begin = 0; begin < num_bytes; begin += matrix_bytes) {
        const UsedSize one = used_size(packed.as<std::uint8_t>() + begin, num_panels, num_blocks);
        used = {std::max(used.rows, one.rows), std::max(used.columns, one.columns)};
    }
    return used;
}

void check_padding(const TensorView& packed, const char* what, std::size_t used, std::size_t size) {
    if (used <= size) return;
    reject(packed.name, " must hold 0 (code 01) past the last of ", size, " ", what, ", ", what, " up to ",
           used, " hold another code");
}

}  // namespace

PackedInput::PackedInput(const KernelInfo& info, std::size_t index, const TensorSpec& spec) {
    is_constant_ = info.constant_input(index, spec, &constant_);
    if (!is_constant_) return;
    check_codes(constant_);
    constant_size_ = used_size_of(constant_);
    advise_large_pages(constant_.data, count_bytes(constant_));
}

void PackedInput::check(const TensorView& packed, std::int64_t num_rows, std::int64_t num_columns) const {
    const std::size_t rank = packed.shape.size();
    const auto rows = static_cast<std::size_t>(num_rows), columns = static_cast<std::size_t>(num_columns);
    const std::size_t num_panels = ceil_div(rows, kPanelRows), num_blocks = ceil_div(columns, kBlockColumns);
    if (packed.size(rank - 3) != num_panels || packed.size(rank - 2) != num_blocks ||
        packed.size(rank - 1) != kBlockBytes) {
        reject("shape of ", packed.name, " ", shape_text(packed.shape),
               " must end in [ceil(rows / 32), ceil(columns / 16), 128] = [", num_panels, ", ", num_blocks,
               ", ", kBlockBytes, "] for ", num_rows, " rows and the ", num_columns, " columns of x");
    }
    if (!is_constant_) check_codes(packed);
    const UsedSize used = is_constant_ ? constant_size_ : used_size_of(packed);
    check_padding(packed, "rows", used.rows, rows);
    check_padding(packed, "columns", used.columns, columns);
}

}  // namespace trix
