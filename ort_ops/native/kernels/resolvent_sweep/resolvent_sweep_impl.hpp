// The kernel for files that differ in their flags and in TRIX_LANES, the floats of a register. Everything is
// static: see the rules in kernels/README.md.
#pragma once

#include "kernels/float_vectors.hpp"
#include "kernels/resolvent_sweep/resolvent_sweep.hpp"

namespace trix {
namespace {

// Each pivot has to wait for the division of the one before, so several rows are computed at once, one per
// lane. Blocks of tokens are transposed for that.
constexpr std::size_t kRows = 8;
constexpr std::size_t kTokens = 16;
constexpr std::size_t kRowVectors = kRows / kVectorLanes;

struct Block {
    float values[kTokens][kRows];
};

inline void read_block(const float* x, std::size_t stride, std::size_t rows, std::size_t tokens,
                       Block& block) {
    for (std::size_t row = 0; row < rows; ++row)
        for (std::size_t t = 0; t < tokens; ++t) block.values[t][row] = x[row * stride + t];
}

inline void write_block(const Block& block, std::size_t stride, std::size_t rows, std::size_t tokens,
                        float* x) {
    for (std::size_t row = 0; row < rows; ++row)
        for (std::size_t t = 0; t < tokens; ++t) x[row * stride + t] = block.values[t][row];
}

inline void sweep_rows(const ResolventSweepJob& job, std::size_t first_row, std::size_t rows) {
    Block alpha_re = {}, alpha_im = {}, w = {}, G_re, G_im;  // lanes without a row hold zeros
    float carry_re[kRows] = {}, carry_im[kRows] = {};
    for (std::size_t row = 0; row < rows; ++row) {
        carry_re[row] = job.first_re[first_row + row];
        carry_im[row] = job.first_im[first_row + row];
    }
    Vector re[kRowVectors], im[kRowVectors];
    for (std::size_t i = 0; i < kRowVectors; ++i) {
        re[i] = load(carry_re + i * kVectorLanes);
        im[i] = load(carry_im + i * kVectorLanes);
    }
    for (std::size_t begin = 0; begin < job.num_tokens; begin += kTokens) {
        const std::size_t left = job.num_tokens - begin, tokens = left < kTokens ? left : kTokens;
        const std::size_t place = first_row * job.num_tokens + begin;
        read_block(job.alpha_re + place, job.num_tokens, rows, tokens, alpha_re);
        read_block(job.alpha_im + place, job.num_tokens, rows, tokens, alpha_im);
        read_block(job.w + place, job.num_tokens, rows, tokens, w);
        for (std::size_t t = 0; t < tokens; ++t) {
            for (std::size_t i = 0; i < kRowVectors; ++i) {
                const std::size_t lane = i * kVectorLanes;
                const Vector hop = load(w.values[t] + lane);
                const Vector d_re = load(alpha_re.values[t] + lane) - hop * re[i];
                const Vector d_im = load(alpha_im.values[t] + lane) - hop * im[i];
                const Vector square = d_re * d_re + d_im * d_im;
                re[i] = d_re / square;
                im[i] = -d_im / square;
                store(G_re.values[t] + lane, re[i]);
                store(G_im.values[t] + lane, im[i]);
            }
        }
        write_block(G_re, job.num_tokens, rows, tokens, job.G_re + place);
        write_block(G_im, job.num_tokens, rows, tokens, job.G_im + place);
    }
}

inline void resolvent_sweep(const ResolventSweepJob& job) {
    for (std::size_t row = job.row_begin; row < job.row_end; row += kRows) {
        const std::size_t left = job.row_end - row;
        sweep_rows(job, row, left < kRows ? left : kRows);
    }
}

}  // namespace
}  // namespace trix
