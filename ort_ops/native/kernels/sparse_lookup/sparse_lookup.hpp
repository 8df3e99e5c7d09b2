// Contract of the kernel: a sparse lookup layer for the tokens [token_begin, token_end).
//
//   v = h W + b    a = v / 2 (1 + erf(v / sqrt 2))    point[i] = tanh(<a, point_weight[i]> + point_bias[i])
//   size_k = gate(sigmoid(score[t, e])) * magnitude_e(point) with e = tile_idx[t, k]
//   y[t] = x[t] + size_0 direction[e_0] + size_1 direction[e_1] + ...
//
// gate is the piecewise linear curve through (i / (num_knots - 1), gate_curve[i]). magnitude_e, by row e of
// splines: the bilinear spline on grid_size^2 cells over [-1, 1]^2, corners row by row; or, with has_hinges,
// base + sum_g height_g max(slope_g p + slope'_g p' + offset_g, 0), a row being the G slopes along the first
// axis, the G along the second, the G offsets, the G heights and the base.
//
// Sums are float32: over columns of h one after the other, from 0, b added at the end; over hidden values and
// hinges in 16 lanes (lane j holds j, j + 16, ...), which are then added up by halves (j and j + 8, then j
// and j + 4, ...). erf, tanh and sigmoid are within 3e-7. A NaN in x, h, a chosen score or a weight makes
// what depends on it NaN.
//
// W lies in strips (compress_strips.hpp). hidden [T, H up to whole strips] is scratch. Only rows
// [token_begin, token_end) of y and hidden are written; thread-safe on disjoint ones. Every tile_idx lies in
// [0, E). No alignment asked; nothing outside the arrays is read.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernel_list.hpp"
#include "kernels/sparse_lookup/compress_strips.hpp"

namespace trix {

struct SparseLookupJob {
    const float* x;                // [T, D]
    const float* h;                // [T, D]
    const std::int64_t* tile_idx;  // [T, top_k]
    const float* score;            // [T, E]
    const float* gate_curve;       // [num_knots], at least 2
    const StripRow* compress;      // W [D, H]
    const float* compress_bias;    // [H]
    const float* point_weight;     // [2, H]
    const float* point_bias;       // [2]
    const float* splines;          // [E, spline_size]
    const float* direction;        // [E, D]
    float* hidden;                 // [T, H up to whole strips]
    float* y;                      // [T, D]
    std::size_t width;             // D
    std::size_t num_hidden;        // H
    std::size_t num_tiles;         // E
    std::size_t top_k;
    std::size_t num_knots;
    std::size_t grid_size;  // G
    std::size_t spline_size;
    bool has_hinges;
    std::size_t token_begin;
    std::size_t token_end;
};

}  // namespace trix
