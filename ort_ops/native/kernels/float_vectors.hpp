// Vectors of TRIX_LANES floats, and the sums whose order the contracts state, for files that differ in their
// flags. Everything is in an anonymous namespace: see the rules in README.md.
#pragma once

#include <cstddef>

namespace trix {
namespace {

constexpr std::size_t kLanes = 16;  // of a sum over a row: lane j holds the summands j, j + 16, ...
constexpr std::size_t kVectorLanes = TRIX_LANES;
constexpr std::size_t kVectors = kLanes / kVectorLanes;

// GCC's and Clang's vectors: the compiler's own arithmetic, in registers whatever it makes of the loops
// around.
typedef float Vector __attribute__((vector_size(TRIX_LANES * sizeof(float))));

inline Vector load(const float* from) {
    Vector vector;
    __builtin_memcpy(&vector, from, sizeof(vector));
    return vector;
}

inline void store(float* to, const Vector& vector) {
    __builtin_memcpy(to, &vector, sizeof(vector));
}

// The lanes by halves: j and j + 8, then j and j + 4, and so on. Written out: a loop is made into vectors
// that wait for each other's way through memory.
inline float sum_of_lanes(const float (&lane)[kLanes]) {
    const float first = (lane[0] + lane[8]) + (lane[4] + lane[12]);
    const float second = (lane[1] + lane[9]) + (lane[5] + lane[13]);
    const float third = (lane[2] + lane[10]) + (lane[6] + lane[14]);
    const float fourth = (lane[3] + lane[11]) + (lane[7] + lane[15]);
    return (first + third) + (second + fourth);
}

// The same of whole vectors and `rest`, one more summand of each of the first lanes.
inline float lane_sum(const Vector (&sum)[kVectors], const float* rest, std::size_t num_rest) {
    float lanes[kLanes];
    for (std::size_t i = 0; i < kVectors; ++i) store(lanes + i * kVectorLanes, sum[i]);
    for (std::size_t j = 0; j < num_rest; ++j) lanes[j] += rest[j];
    return sum_of_lanes(lanes);
}

}  // namespace
}  // namespace trix
