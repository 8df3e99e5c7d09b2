// Contract of the kernel: a linear recurrence with a complex matrix as its state, for one row of tokens.
//
//   A[t] = -c[t] * G[t]    S[n, p] <- A[t] * S[n, p] + k[t, n] * (G[t] * u[t, p])
//   y[t, p] = sum_n q[t, n] * S[n, p]
//
// complex numbers in two arrays, real (re) and imaginary part (im), in float32, each operation rounded: a
// product is (a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re), what is added to the state comes last,
// and y is summed over n one after the other, from 0. |A| may exceed 1, nothing is clamped. Infinities and
// NaN give what float32 makes of them, in their own column p, and in all columns where they stand in c, G, k
// or q.
//
// G and c [T]; u and y [T, P]; S [n, P], read and written. q and k [n] of each token lie q_stride and
// k_stride floats apart, 0 where all tokens share them. Thread-safe on different rows. No alignment asked;
// nothing outside the arrays is read.
#pragma once

#include <cstddef>

#include "kernels/kernel_list.hpp"

namespace trix {

struct ResolventMixJob {
    const float* G_re;
    const float* G_im;
    const float* c_re;
    const float* c_im;
    const float* u;
    const float* q;
    const float* k;
    float* y_re;
    float* y_im;
    float* state_re;
    float* state_im;
    std::size_t num_tokens;    // T
    std::size_t num_channels;  // P
    std::size_t query_width;   // n
    std::size_t q_stride;
    std::size_t k_stride;
};

}  // namespace trix
