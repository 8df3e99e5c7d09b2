// The kernel for files that differ in their flags, in TRIX_LANES, the floats of a register, and in
// TRIX_TOKENS, how many tokens' sums over a strip fit the registers. Everything is static: see the rules in
// kernels/README.md.
#pragma once

#include "kernels/float_vectors.hpp"
#include "kernels/sparse_lookup/sparse_lookup.hpp"

namespace trix {
namespace {

constexpr std::size_t kStripVectors = kStripColumns / kVectorLanes;
constexpr std::size_t kStripRows = 128;  // half of a first-level cache

inline std::size_t smaller(std::size_t a, std::size_t b) {
    return a < b ? a : b;
}

inline std::uint32_t bits_of(float x) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof(bits));
    return bits;
}

inline float float_of(std::uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof(x));
    return x;
}

// Bits, as a branch on a float would keep the loops over it from being vectorised.
inline float magnitude_of(float x) {
    return float_of(bits_of(x) & 0x7fffffffu);
}

inline float with_sign_of(float size, float x) {
    return float_of(bits_of(size) | (bits_of(x) & 0x80000000u));
}

// e^-size for size >= 0, relative error 2e-7; e^-87 above 87 and for NaN. The bits of such numbers compare
// like the numbers. x = n ln 2 + r: adding and taking away 1.5 * 2^23 rounds, and leaves n in the low bits.
inline float exp_of_minus(float size) {
    constexpr float kShift = 12582912.0f;
    const std::uint32_t bits = bits_of(size), most = bits_of(87.0f);
    const float clamped = -float_of(bits < most ? bits : most);
    const float shifted = clamped * 1.44269504f + kShift;
    const float n = shifted - kShift;
    const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    float series = 1.0f / 5040.0f;
    series = series * r + 1.0f / 720.0f;
    series = series * r + 1.0f / 120.0f;
    series = series * r + 1.0f / 24.0f;
    series = series * r + 1.0f / 6.0f;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    return series * float_of((bits_of(shifted) - bits_of(kShift) + 127u) << 23);
}

inline float tanh_of(float x) {
    const float fraction = exp_of_minus(2.0f * magnitude_of(x));
    return x == x ? with_sign_of((1.0f - fraction) / (1.0f + fraction), x) : x;
}

inline float sigmoid_of(float x) {
    return 0.5f + 0.5f * tanh_of(0.5f * x);
}

// Abramowitz and Stegun 7.1.26: erf(z) = 1 - polynomial(1 / (1 + 0.3275911 z)) e^(-z^2), within 1.5e-7.
inline float gelu_of(float v) {
    const float z = magnitude_of(v) * 0.707106781f;
    const float t = 1.0f / (1.0f + 0.3275911f * z);
    float polynomial = 1.061405429f;
    polynomial = polynomial * t - 1.453152027f;
    polynomial = polynomial * t + 1.421413741f;
    polynomial = polynomial * t - 0.284496736f;
    polynomial = polynomial * t + 0.254829592f;
    const float erf = with_sign_of(1.0f - polynomial * t * exp_of_minus(z * z), v);
    return 0.5f * v * (1.0f + erf);
}

// The part of some rows of a strip in the sums of kTokens tokens, which stay in registers meanwhile: a
// function of its own, so that the pointers to the tokens do, too.
template <std::size_t kTokens>
__attribute__((noinline)) void multiply_strip(const SparseLookupJob& job, const StripRow* strip,
                                              std::size_t first_row, std::size_t num_rows, const float* h,
                                              float* hidden) {
    const std::size_t stride = whole_strips(job.num_hidden);
    Vector sum[kTokens][kStripVectors] = {};
    for (std::size_t t = 0; first_row > 0 && t < kTokens; ++t)
        for (std::size_t i = 0; i < kStripVectors; ++i)
            sum[t][i] = load(hidden + t * stride + i * kVectorLanes);
    for (std::size_t d = 0; d < num_rows; ++d) {
        Vector row[kStripVectors];
        for (std::size_t i = 0; i < kStripVectors; ++i) row[i] = load(strip[d].value + i * kVectorLanes);
        for (std::size_t t = 0; t < kTokens; ++t)
            for (std::size_t i = 0; i < kStripVectors; ++i) sum[t][i] += row[i] * h[t * job.width + d];
    }
    for (std::size_t t = 0; t < kTokens; ++t)
        for (std::size_t i = 0; i < kStripVectors; ++i)
            store(hidden + t * stride + i * kVectorLanes, sum[t][i]);
}

// hidden = h W, in pieces of W that stay in the cache for all tokens.
inline void compress(const SparseLookupJob& job) {
    const std::size_t stride = whole_strips(job.num_hidden);
    const StripRow* strip = job.compress;
    for (std::size_t column = 0; column < stride; column += kStripColumns) {
        std::size_t row = 0;
        do {  // once where h has no columns, so that sums are 0
            const std::size_t num_rows = smaller(kStripRows, job.width - row);
            std::size_t token = job.token_begin;
            const auto multiply = [&](auto kernel, std::size_t num_tokens) {
                for (; token + num_tokens <= job.token_end; token += num_tokens)
                    kernel(job, strip, row, num_rows, job.h + token * job.width + row,
                           job.hidden + token * stride + column);
            };
            multiply(multiply_strip<TRIX_TOKENS>, TRIX_TOKENS);
            if (TRIX_TOKENS > 2) multiply(multiply_strip<2>, 2);
            multiply(multiply_strip<1>, 1);
            strip += num_rows;
            row += kStripRows;
        } while (row < job.width);
    }
}

inline float dot(const float* a, const float* b, std::size_t count) {
    Vector sum[kVectors] = {};
    std::size_t j = 0;
    for (; j + kLanes <= count; j += kLanes)
        for (std::size_t i = 0; i < kVectors; ++i)
            sum[i] += load(a + j + i * kVectorLanes) * load(b + j + i * kVectorLanes);
    float rest[kLanes];
    for (std::size_t left = j; left < count; ++left) rest[left - j] = a[left] * b[left];
    return lane_sum(sum, rest, count - j);
}

inline float hinge_value(const float* row, std::size_t size, std::size_t g, const float* point) {
    const float crease = row[2 * size + g] + row[g] * point[0] + row[size + g] * point[1];
    return (crease < 0.0f ? 0.0f : crease) * row[3 * size + g];
}

inline float hinge_magnitude(const SparseLookupJob& job, const float* row, const float* point) {
    const std::size_t size = job.grid_size;
    float lanes[kLanes] = {};
    std::size_t g = 0;
    for (; g + kLanes <= size; g += kLanes)
        for (std::size_t j = 0; j < kLanes; ++j) lanes[j] += hinge_value(row, size, g + j, point);
    for (std::size_t j = 0; g + j < size; ++j) lanes[j] += hinge_value(row, size, g + j, point);
    return sum_of_lanes(lanes) + row[4 * size];
}

// The whole number of steps in `position`, at most last; 0 for NaN.
inline std::size_t step_of(float position, std::size_t last) {
    if (!(position > 0.0f)) return 0;
    return position < static_cast<float>(last) ? static_cast<std::size_t>(position) : last;
}

inline float grid_magnitude(const SparseLookupJob& job, const float* row, const float* point) {
    const std::size_t corners = job.grid_size + 1;
    const float scale = 0.5f * static_cast<float>(job.grid_size);
    std::size_t cell[2];
    float high[2];
    for (int axis = 0; axis < 2; ++axis) {
        const float position = (point[axis] + 1.0f) * scale;
        cell[axis] = step_of(position, job.grid_size - 1);
        high[axis] = position - static_cast<float>(cell[axis]);
    }
    const float* corner = row + cell[0] * corners + cell[1];
    const float low[2] = {1.0f - high[0], 1.0f - high[1]};
    return low[0] * low[1] * corner[0] + low[0] * high[1] * corner[1] + high[0] * low[1] * corner[corners] +
           high[0] * high[1] * corner[corners + 1];
}

inline float gate_of(const SparseLookupJob& job, float score) {
    const float position = sigmoid_of(score) * static_cast<float>(job.num_knots - 1);
    const std::size_t segment = step_of(position, job.num_knots - 2);
    const float start = job.gate_curve[segment];
    return start + (job.gate_curve[segment + 1] - start) * (position - static_cast<float>(segment));
}

inline void add_direction(const float* from, float size, const float* direction, std::size_t width,
                          float* y) {
    std::size_t d = 0;
    for (; d + kVectorLanes <= width; d += kVectorLanes)
        store(y + d, load(from + d) + load(direction + d) * size);
    for (; d < width; ++d) y[d] = from[d] + direction[d] * size;
}

inline void activate(const float* bias, std::size_t count, float* hidden) {
    for (std::size_t j = 0; j < count; ++j) hidden[j] = gelu_of(hidden[j] + bias[j]);
}

inline void look_up(const SparseLookupJob& job, std::size_t token) {
    float* hidden = job.hidden + token * whole_strips(job.num_hidden);
    activate(job.compress_bias, job.num_hidden, hidden);
    float point[2];
    for (std::size_t i = 0; i < 2; ++i) {
        const float sum = dot(hidden, job.point_weight + i * job.num_hidden, job.num_hidden);
        point[i] = tanh_of(sum + job.point_bias[i]);
    }
    const float* from = job.x + token * job.width;
    float* y = job.y + token * job.width;
    for (std::size_t k = 0; k < job.top_k; ++k, from = y) {
        const auto tile = static_cast<std::size_t>(job.tile_idx[token * job.top_k + k]);
        const float* row = job.splines + tile * job.spline_size;
        const float magnitude =
            job.has_hinges ? hinge_magnitude(job, row, point) : grid_magnitude(job, row, point);
        const float size = gate_of(job, job.score[token * job.num_tiles + tile]) * magnitude;
        add_direction(from, size, job.direction + tile * job.width, job.width, y);
    }
    for (std::size_t d = 0; job.top_k == 0 && d < job.width; ++d) y[d] = from[d];
}

inline void sparse_lookup(const SparseLookupJob& job) {
    compress(job);
    for (std::size_t token = job.token_begin; token < job.token_end; ++token) look_up(job, token);
}

}  // namespace
}  // namespace trix
