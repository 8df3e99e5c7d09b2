// The reference, in plain C++. A chunk of 16 codes is decoded once and used for up to four tokens; the loops
// over 16 lanes are ones that a compiler vectorises for the baseline of any CPU.
#include "kernels/ternary_tile_matmul/ternary_tile_matmul.hpp"

namespace trix {
namespace {

constexpr std::size_t kLanes = 16;
constexpr std::size_t kTokenBlock = 4;
constexpr float kValueOfCode[4] = {0.0f, 1.0f, -1.0f, 0.0f};

// Codes of columns [0, count) of a chunk; the rest of the 16 values are 0.
void decode_chunk(const std::uint8_t* packed, std::size_t count, float value[kLanes]) {
    for (std::size_t j = 0; j < kLanes; ++j) {
        value[j] = j < count ? kValueOfCode[(packed[j / 4] >> (2 * (j % 4))) & 3] : 0.0f;
    }
}

float sum_lanes(float lane[kLanes]) {
    for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
        for (std::size_t j = 0; j < half; ++j) lane[j] += lane[j + half];
    }
    return lane[0];
}

void dot_tokens(const float* const* x, std::size_t num_tokens, const std::uint8_t* packed,
                std::size_t num_columns, float* dot) {
    float lane[kTokenBlock][kLanes] = {};
    float value[kLanes];
    std::size_t k = 0;
    for (; k + kLanes <= num_columns; k += kLanes) {
        decode_chunk(packed + k / 4, kLanes, value);
        for (std::size_t m = 0; m < num_tokens; ++m) {
            for (std::size_t j = 0; j < kLanes; ++j) lane[m][j] += x[m][k + j] * value[j];
        }
    }
    const std::size_t tail = num_columns - k;
    if (tail > 0) {
        decode_chunk(packed + k / 4, tail, value);
        for (std::size_t m = 0; m < num_tokens; ++m) {
            for (std::size_t j = 0; j < tail; ++j) lane[m][j] += x[m][k + j] * value[j];
        }
    }
    for (std::size_t m = 0; m < num_tokens; ++m) dot[m] = sum_lanes(lane[m]);
}

}  // namespace

void ternary_tile_matmul_scalar(const TernaryTileMatMulJob& job) {
    const std::size_t row_bytes = (job.num_columns + 3) / 4;
    for (std::size_t begin = 0; begin < job.num_tokens; begin += kTokenBlock) {
        const std::size_t left = job.num_tokens - begin;
        const std::size_t num_tokens = left < kTokenBlock ? left : kTokenBlock;
        const float* x[kTokenBlock];
        float* y[kTokenBlock];
        for (std::size_t m = 0; m < num_tokens; ++m) {
            const auto token = static_cast<std::size_t>(job.token_idx[begin + m]);
            x[m] = job.x + token * job.num_columns;
            y[m] = job.y + token * job.num_rows;
        }
        for (std::size_t n = job.row_begin; n < job.row_end; ++n) {
            float dot[kTokenBlock];
            dot_tokens(x, num_tokens, job.packed + n * row_bytes, job.num_columns, dot);
            for (std::size_t m = 0; m < num_tokens; ++m) y[m][n] = job.row_scale[n] * dot[m];
        }
    }
}

}  // namespace trix
