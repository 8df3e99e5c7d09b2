// The kernel for files that differ in their flags and in TRIX_LANES, the floats of a register. Everything is
// static: see the rules in kernels/README.md.
#pragma once

#include "kernels/float_vectors.hpp"
#include "kernels/resolvent_mix/resolvent_mix.hpp"

namespace trix {
namespace {

typedef float Quarter __attribute__((vector_size(16)));

template <typename Values>
inline Values read(const float* from) {
    Values values;
    __builtin_memcpy(&values, from, sizeof(values));
    return values;
}

template <typename Values>
inline void write(float* to, const Values& values) {
    __builtin_memcpy(to, &values, sizeof(values));
}

// All tokens for kCount vectors of channels from `channel` on.
template <typename Values, std::size_t kCount>
inline void mix_strip(const ResolventMixJob& job, std::size_t channel) {
    constexpr std::size_t kStep = sizeof(Values) / sizeof(float);
    const float *q = job.q, *k = job.k;
    for (std::size_t t = 0; t < job.num_tokens; ++t, q += job.q_stride, k += job.k_stride) {
        const float G_re = job.G_re[t], G_im = job.G_im[t], c_re = job.c_re[t], c_im = job.c_im[t];
        const float decay_re = -(c_re * G_re - c_im * G_im), decay_im = -(c_re * G_im + c_im * G_re);
        const std::size_t place = t * job.num_channels + channel;
        Values drive_re[kCount], drive_im[kCount], y_re[kCount] = {}, y_im[kCount] = {};
        for (std::size_t i = 0; i < kCount; ++i) {
            const Values u = read<Values>(job.u + place + i * kStep);
            drive_re[i] = u * G_re;
            drive_im[i] = u * G_im;
        }
        float *state_re = job.state_re + channel, *state_im = job.state_im + channel;
        for (std::size_t n = 0; n < job.query_width; ++n) {
            for (std::size_t i = 0; i < kCount; ++i) {
                const Values old_re = read<Values>(state_re + i * kStep);
                const Values old_im = read<Values>(state_im + i * kStep);
                const Values re = (old_re * decay_re - old_im * decay_im) + drive_re[i] * k[n];
                const Values im = (old_im * decay_re + old_re * decay_im) + drive_im[i] * k[n];
                write(state_re + i * kStep, re);
                write(state_im + i * kStep, im);
                y_re[i] += re * q[n];
                y_im[i] += im * q[n];
            }
            state_re += job.num_channels;
            state_im += job.num_channels;
        }
        for (std::size_t i = 0; i < kCount; ++i) {
            write(job.y_re + place + i * kStep, y_re[i]);
            write(job.y_im + place + i * kStep, y_im[i]);
        }
    }
}

inline void resolvent_mix(const ResolventMixJob& job) {
    std::size_t channel = 0;
    for (; channel + 2 * kVectorLanes <= job.num_channels; channel += 2 * kVectorLanes)
        mix_strip<Vector, 2>(job, channel);
    for (; channel + kVectorLanes <= job.num_channels; channel += kVectorLanes)
        mix_strip<Vector, 1>(job, channel);
    for (; channel + 4 <= job.num_channels; channel += 4) mix_strip<Quarter, 1>(job, channel);
    for (; channel < job.num_channels; ++channel) mix_strip<float, 1>(job, channel);
}

}  // namespace
}  // namespace trix
