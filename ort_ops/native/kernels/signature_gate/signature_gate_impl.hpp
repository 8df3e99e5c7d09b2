// The kernel for files that differ in their flags and in TRIX_LANES, the floats of a register. Everything is
// static: see the rules in kernels/README.md.
#pragma once

#include "kernels/signature_gate/signature_gate.hpp"

namespace trix {
namespace {

constexpr std::size_t kLanes = 8;  // of the sums whose order the contract states
constexpr std::size_t kVectorLanes = TRIX_LANES;
constexpr std::size_t kVectors = kLanes / kVectorLanes;
constexpr float kInfinity = __builtin_inff();

// GCC's and Clang's vectors; a comparison gives a vector of 0 and -1, and `?:` takes such a vector.
typedef float Vector __attribute__((vector_size(TRIX_LANES * sizeof(float))));
typedef std::int32_t Integers __attribute__((vector_size(TRIX_LANES * sizeof(std::int32_t))));

template <typename To, typename From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}

inline Vector load(const float* from) {
    Vector vector;
    __builtin_memcpy(&vector, from, sizeof(vector));
    return vector;
}

template <typename Float>
inline Float all(float value) {
    return Float{} + value;
}

// e^x of a float or of a vector of them. x = n ln 2 + r: adding and taking away 1.5 * 2^23 rounds, and leaves
// n in the low bits.
template <typename Float, typename Integer>
inline Float exp_of(Float x) {
    const Float least = all<Float>(-87.0f), most = all<Float>(88.0f), shift = all<Float>(12582912.0f);
    Float clamped = x > least ? x : least;
    clamped = clamped < most ? clamped : most;
    const Float shifted = clamped * 1.44269504f + shift;
    const Float n = shifted - shift;
    const Float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    Float series = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
    series = series * r + 1.0f / 120.0f;
    series = series * r + 1.0f / 24.0f;
    series = series * r + 1.0f / 6.0f;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    const Integer exponent = (bits_as<Integer>(shifted) - bits_as<Integer>(shift) + 127) << 23;
    Float power = series * bits_as<Float>(exponent);
    power = x > most ? all<Float>(kInfinity) : power;
    power = x < least ? all<Float>(0.0f) : power;
    return x == x ? power : x;
}

inline float exp_of_one(float x) {
    return exp_of<float, std::int32_t>(x);
}

/// The tiles of one token.
struct Row {
    const float* score;
    const float* bias;
    const float* log_mass;
    std::size_t num_tiles;

    bool is_free(std::size_t tile) const { return bias[tile] == -kInfinity; }
};

// Calls visit(i, value, is_free), vectors all, for the i-th of kVectors vectors of each eight tiles: value =
// score, plus log_mass where has_mass. Beside the last tile stand free ones.
template <bool has_mass, typename Visit>
inline void visit_tiles(const Row& row, const Visit& visit) {
    const Vector no_bias = all<Vector>(-kInfinity);
    std::size_t tile = 0;
    for (; tile + kLanes <= row.num_tiles; tile += kLanes) {
        for (std::size_t i = 0; i < kVectors; ++i) {
            const std::size_t at = tile + i * kVectorLanes;
            const Vector score = load(row.score + at);
            visit(i, has_mass ? score + load(row.log_mass + at) : score, load(row.bias + at) == no_bias);
        }
    }
    if (tile == row.num_tiles) return;
    float value[kLanes], bias[kLanes];
    for (std::size_t j = 0; j < kLanes; ++j, ++tile) {
        const bool is_there = tile < row.num_tiles;
        bias[j] = is_there ? row.bias[tile] : -kInfinity;
        value[j] = is_there ? row.score[tile] : 0.0f;
        if (has_mass && is_there) value[j] += row.log_mass[tile];
    }
    for (std::size_t i = 0; i < kVectors; ++i)
        visit(i, load(value + i * kVectorLanes), load(bias + i * kVectorLanes) == no_bias);
}

// The largest value among the tiles that are not free; minus infinity without any. NaN is passed over.
template <bool has_mass>
inline float largest(const Row& row) {
    Vector lanes[kVectors];
    for (Vector& lane : lanes) lane = all<Vector>(-kInfinity);
    visit_tiles<has_mass>(row, [&](std::size_t i, Vector value, Integers is_free) {
        lanes[i] = (value > lanes[i]) & ~is_free ? value : lanes[i];
    });
    float best = -kInfinity;
    for (const Vector& lane : lanes)
        for (std::size_t j = 0; j < kVectorLanes; ++j) best = lane[j] > best ? lane[j] : best;
    return best;
}

inline void weigh_by_sigmoid(const Row& row, const float* chosen_score, const std::int64_t* tile_idx,
                             std::size_t top_k, float* weight) {
    for (std::size_t k = 0; k < top_k; ++k) {
        const auto tile = static_cast<std::size_t>(tile_idx[k]);
        const float score = chosen_score == nullptr ? row.score[tile] : chosen_score[k];
        // A product, as NaN stays NaN.
        weight[k] = (row.is_free(tile) ? 0.0f : 1.0f) * (1.0f / (1.0f + exp_of_one(-score)));
    }
}

inline void weigh_by_softmax(const Row& row, const std::int64_t* tile_idx, std::size_t top_k, float scale,
                             float* weight) {
    const float best = largest<true>(row);
    Vector lanes[kVectors] = {};
    visit_tiles<true>(row, [&](std::size_t i, Vector value, Integers is_free) {
        const Vector power = exp_of<Vector, Integers>(value - best);
        lanes[i] += is_free ? all<Vector>(0.0f) : power;
    });
    float sum = 0.0f;
    for (const Vector& lane : lanes)
        for (std::size_t j = 0; j < kVectorLanes; ++j) sum += lane[j];
    for (std::size_t k = 0; k < top_k; ++k) {
        const auto tile = static_cast<std::size_t>(tile_idx[k]);
        const float power = row.is_free(tile) ? 0.0f : exp_of_one(row.score[tile] - best);
        weight[k] = power / sum * scale;
    }
}

// In [1, top_k]; 0 where a score is NaN.
inline std::size_t count_used(const Row& row, std::size_t top_k, float confidence_threshold) {
    const float best = largest<false>(row);
    Integers num_close[kVectors] = {}, has_nan = {};
    visit_tiles<false>(row, [&](std::size_t i, Vector value, Integers is_free) {
        num_close[i] -= (best - value <= confidence_threshold) & ~is_free;
        has_nan |= (value != value) & ~is_free;
    });
    std::size_t count = 0;
    bool is_bad = false;
    for (std::size_t j = 0; j < kVectorLanes; ++j) {
        for (const Integers& vector : num_close) count += static_cast<std::size_t>(vector[j]);
        is_bad |= has_nan[j] != 0;
    }
    if (is_bad) return 0;
    return count < 1 ? 1 : count < top_k ? count : top_k;
}

inline void weigh_adaptively(const Row& row, const std::int64_t* tile_idx, std::size_t top_k,
                             float confidence_threshold, float* weight) {
    const std::size_t num_used = count_used(row, top_k, confidence_threshold);
    float best = -kInfinity, sum = 0.0f;
    for (std::size_t k = 0; k < num_used; ++k) {
        const auto tile = static_cast<std::size_t>(tile_idx[k]);
        if (!row.is_free(tile) && row.score[tile] > best) best = row.score[tile];
    }
    for (std::size_t k = 0; k < top_k; ++k) {
        const auto tile = static_cast<std::size_t>(tile_idx[k]);
        weight[k] = k < num_used && !row.is_free(tile) ? exp_of_one(row.score[tile] - best) : 0.0f;
        sum += weight[k];
    }
    for (std::size_t k = 0; k < top_k; ++k) weight[k] /= sum;
}

inline void signature_gate(const SignatureGateJob& job) {
    for (std::size_t t = job.token_begin; t < job.token_end; ++t) {
        const float* score = job.score == nullptr ? nullptr : job.score + t * job.num_tiles;
        const float* chosen_score = job.chosen_score == nullptr ? nullptr : job.chosen_score + t * job.top_k;
        const Row row{score, job.bias, job.log_mass, job.num_tiles};
        const std::int64_t* tile_idx = job.tile_idx + t * job.top_k;
        float* weight = job.weight + t * job.top_k;
        if (job.gate == Gate::kSigmoid)
            weigh_by_sigmoid(row, chosen_score, tile_idx, job.top_k, weight);
        else if (job.gate == Gate::kSoftmax)
            weigh_by_softmax(row, tile_idx, job.top_k, job.scale, weight);
        else
            weigh_adaptively(row, tile_idx, job.top_k, job.confidence_threshold, weight);
    }
}

}  // namespace
}  // namespace trix
