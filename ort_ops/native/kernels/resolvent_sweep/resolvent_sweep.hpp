// Contract of the kernel: the pivots of tridiagonal operators, one for each row, from left to right.
//
//   d = alpha[r, t] - w[r, t] * G[r, t - 1]    G[r, t] = conj(d) / |d|^2    G[r, -1] = first[r]
//
// complex numbers in two arrays, real (re) and imaginary part (im), in float32, each operation rounded:
// |d|^2 = d_re * d_re + d_im * d_im. Nothing is clamped: d = 0, infinities and NaN give what float32 makes of
// them, in their own row.
//
// alpha, w and G [R, T], first [R]. Only rows [row_begin, row_end) are read and written; thread-safe on
// disjoint ones. No alignment asked; nothing outside the arrays is read.
#pragma once

#include <cstddef>

#include "kernels/kernel_list.hpp"

namespace trix {

struct ResolventSweepJob {
    const float* alpha_re;
    const float* alpha_im;
    const float* w;
    const float* first_re;
    const float* first_im;
    float* G_re;
    float* G_im;
    std::size_t num_tokens;  // T
    std::size_t row_begin;
    std::size_t row_end;
};

}  // namespace trix
