// The kernel for files that differ in their flags and in TRIX_LANES, the floats of a register. Everything is
// static: see the rules in kernels/README.md.
#pragma once

#include "kernels/float_vectors.hpp"
#include "kernels/layer_norm/layer_norm.hpp"

namespace trix {
namespace {

inline float sum_of(const float* x, std::size_t count) {
    Vector sum[kVectors] = {};
    std::size_t d = 0;
    for (; d + kLanes <= count; d += kLanes)
        for (std::size_t i = 0; i < kVectors; ++i) sum[i] += load(x + d + i * kVectorLanes);
    return lane_sum(sum, x + d, count - d);
}

inline float sum_of_squares(const float* x, float mean, std::size_t count) {
    Vector sum[kVectors] = {};
    std::size_t d = 0;
    for (; d + kLanes <= count; d += kLanes) {
        for (std::size_t i = 0; i < kVectors; ++i) {
            const Vector difference = load(x + d + i * kVectorLanes) - mean;
            sum[i] += difference * difference;
        }
    }
    float rest[kLanes];
    for (std::size_t left = d; left < count; ++left) rest[left - d] = (x[left] - mean) * (x[left] - mean);
    return lane_sum(sum, rest, count - d);
}

inline void layer_norm(const LayerNormJob& job) {
    const auto width = static_cast<float>(job.width);
    for (std::size_t token = job.token_begin; token < job.token_end; ++token) {
        const float* x = job.x + token * job.width;
        float* y = job.y + token * job.width;
        const float mean = sum_of(x, job.width) / width;
        const float variance = sum_of_squares(x, mean, job.width) / width;
        const float scale = 1.0f / __builtin_sqrtf(variance + job.epsilon);
        std::size_t d = 0;
        for (; d + kVectorLanes <= job.width; d += kVectorLanes)
            store(y + d, (load(x + d) - mean) * scale * load(job.weight + d) + load(job.bias + d));
        for (; d < job.width; ++d) y[d] = (x[d] - mean) * scale * job.weight[d] + job.bias[d];
    }
}

}  // namespace
}  // namespace trix
