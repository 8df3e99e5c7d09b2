// The kernel for files that differ in their flags and in TRIX_LANES, the floats of a register. Everything is
// static: see the rules in kernels/README.md.
#pragma once

#include "kernels/float_vectors.hpp"
#include "kernels/layer_norm/layer_norm.hpp"

namespace trix {
namespace {

constexpr std::size_t kRows = 4;  // whose sums run side by side: one alone waits for its additions

// sum_d of x[d], or of (x[d] - mean)^2, for kCount rows.
template <std::size_t kCount, bool kIsSquared>
inline void sum_rows(const float* x, std::size_t width, const float* mean, float* result) {
    Vector sum[kCount][kVectors] = {};
    std::size_t d = 0;
    for (; d + kLanes <= width; d += kLanes) {
        for (std::size_t row = 0; row < kCount; ++row) {
            for (std::size_t i = 0; i < kVectors; ++i) {
                const Vector value = load(x + row * width + d + i * kVectorLanes);
                sum[row][i] += kIsSquared ? (value - mean[row]) * (value - mean[row]) : value;
            }
        }
    }
    for (std::size_t row = 0; row < kCount; ++row) {
        float rest[kLanes];
        for (std::size_t left = d; left < width; ++left) {
            const float value = x[row * width + left];
            rest[left - d] = kIsSquared ? (value - mean[row]) * (value - mean[row]) : value;
        }
        result[row] = lane_sum(sum[row], rest, width - d) / static_cast<float>(width);
    }
}

template <std::size_t kCount>
inline void normalise_rows(const LayerNormJob& job, std::size_t token) {
    float mean[kCount] = {}, variance[kCount];
    const float* x = job.x + token * job.width;
    float* y = job.y + token * job.width;
    sum_rows<kCount, false>(x, job.width, mean, mean);
    sum_rows<kCount, true>(x, job.width, mean, variance);
    for (std::size_t row = 0; row < kCount; ++row, x += job.width, y += job.width) {
        const float scale = 1.0f / __builtin_sqrtf(variance[row] + job.epsilon);
        std::size_t d = 0;
        for (; d + kVectorLanes <= job.width; d += kVectorLanes)
            store(y + d, (load(x + d) - mean[row]) * scale * load(job.weight + d) + load(job.bias + d));
        for (; d < job.width; ++d) y[d] = (x[d] - mean[row]) * scale * job.weight[d] + job.bias[d];
    }
}

inline void layer_norm(const LayerNormJob& job) {
    std::size_t token = job.token_begin;
    for (; token + kRows <= job.token_end; token += kRows) normalise_rows<kRows>(job, token);
    for (; token < job.token_end; ++token) normalise_rows<1>(job, token);
}

}  // namespace
}  // namespace trix
