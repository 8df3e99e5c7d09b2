// What the variants share: the places of a few tokens, and the loop over them. Everything is static: see
// kernels/README.md.
#pragma once

#include "kernels/ternary_matmul/ternary_matmul.hpp"

namespace trix {

static constexpr std::size_t kMaxTokenBlock = 8;
static constexpr std::size_t kMaxPlanes = 3;

struct GroupShape {
    std::size_t num_blocks;
    std::size_t group_blocks;
    std::size_t num_groups;
};

/// Tokens of one step: q of plane p of token m is q[m * planes + p], its scale in group g is scale[m][g *
/// planes + p].
struct TokenBlock {
    const std::int8_t* q[kMaxTokenBlock * kMaxPlanes];
    const float* scale[kMaxTokenBlock];
    const std::int32_t* sum[kMaxTokenBlock];
    float* y[kMaxTokenBlock];
};

static inline GroupShape group_shape(const TernaryMatMulJob& job) {
    const std::size_t num_blocks = ceil_div(job.num_columns, kBlockColumns);
    return {num_blocks, job.group_columns / kBlockColumns,
            ceil_div(num_blocks * kBlockColumns, job.group_columns)};
}

/// End of the blocks of group g.
static inline std::size_t group_end(const GroupShape& shape, std::size_t g) {
    const std::size_t left = shape.num_blocks - g * shape.group_blocks;
    return g * shape.group_blocks + (left < shape.group_blocks ? left : shape.group_blocks);
}

/// Calls body(tokens, count) for the job's tokens, at most max_tokens at a time, in even shares: nine run as
/// 4 + 5, not 8 + 1.
template <typename Body>
static inline void for_token_blocks(const TernaryMatMulJob& job, const GroupShape& shape,
                                    std::size_t max_tokens, const Body& body) {
    const std::size_t num_steps = ceil_div(job.num_tokens, max_tokens);
    const std::size_t stride = shape.num_blocks * kBlockColumns,
                      num_scales = shape.num_groups * job.num_planes;
    std::size_t begin = 0;
    for (std::size_t step = 0; step < num_steps; ++step) {
        const std::size_t end = job.num_tokens * (step + 1) / num_steps;
        TokenBlock tokens;
        for (std::size_t m = 0; m < end - begin; ++m) {
            const auto token = static_cast<std::size_t>(job.token_idx[begin + m]);
            for (std::size_t p = 0; p < job.num_planes; ++p)
                tokens.q[m * job.num_planes + p] = job.q + (token * job.num_planes + p) * stride;
            tokens.scale[m] = job.scale + token * num_scales;
            tokens.sum[m] = job.sum + token * num_scales;
            tokens.y[m] = job.y + static_cast<std::size_t>(job.y_idx[begin + m]) * job.num_rows;
        }
        body(tokens, end - begin);
        begin = end;
    }
}

}  // namespace trix
