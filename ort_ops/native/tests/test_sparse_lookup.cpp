// A sparse lookup layer against one in double, and its variants bit for bit.
#include "kernels/sparse_lookup/sparse_lookup.hpp"
#include "tests/kernel_test.hpp"

namespace trix_tests {
namespace {

// A layer in double, token by token; see the contract.
double lookup_magnitude(const SparseLookupJob& job, const float* row, const double* p) {
    const std::size_t size = job.grid_size;
    const auto at = [&](std::size_t i) { return static_cast<double>(row[i]); };
    if (job.has_hinges) {
        double sum = at(4 * size);
        for (std::size_t g = 0; g < size; ++g)
            sum += at(3 * size + g) * std::max(at(g) * p[0] + at(size + g) * p[1] + at(2 * size + g), 0.0);
        return sum;
    }
    double part[2];
    std::size_t cell[2];
    for (int axis = 0; axis < 2; ++axis) {
        const double place = (p[axis] + 1) / 2 * static_cast<double>(size);
        cell[axis] = std::min(static_cast<std::size_t>(place), size - 1);
        part[axis] = place - static_cast<double>(cell[axis]);
    }
    const std::size_t first = cell[0] * (size + 1) + cell[1], next = first + size + 1;
    return (1 - part[0]) * ((1 - part[1]) * at(first) + part[1] * at(first + 1)) +
           part[0] * ((1 - part[1]) * at(next) + part[1] * at(next + 1));
}

std::vector<double> reference_lookup(const SparseLookupJob& job, const std::vector<float>& compress,
                                     std::size_t t) {
    double p[2];
    for (std::size_t i = 0; i < 2; ++i) {
        double sum = static_cast<double>(job.point_bias[i]);
        for (std::size_t c = 0; c < job.num_hidden; ++c) {
            double v = static_cast<double>(job.compress_bias[c]);
            for (std::size_t d = 0; d < job.width; ++d)
                v += static_cast<double>(job.h[t * job.width + d]) *
                     static_cast<double>(compress[d * job.num_hidden + c]);
            sum += v / 2 * (1 + std::erf(v / std::sqrt(2.0))) *
                   static_cast<double>(job.point_weight[i * job.num_hidden + c]);
        }
        p[i] = std::tanh(sum);
    }
    std::vector<double> y(job.x + t * job.width, job.x + (t + 1) * job.width);
    for (std::size_t k = 0; k < job.top_k; ++k) {
        const auto tile = static_cast<std::size_t>(job.tile_idx[t * job.top_k + k]);
        const double score = static_cast<double>(job.score[t * job.num_tiles + tile]);
        const double place = static_cast<double>(job.num_knots - 1) / (1 + std::exp(-score));
        const auto segment = std::min(static_cast<std::size_t>(place), job.num_knots - 2);
        const double start = static_cast<double>(job.gate_curve[segment]);
        const double rise = static_cast<double>(job.gate_curve[segment + 1]) - start;
        const double gate = start + rise * (place - static_cast<double>(segment));
        const double size = gate * lookup_magnitude(job, job.splines + tile * job.spline_size, p);
        for (std::size_t d = 0; d < job.width; ++d)
            y[d] += size * static_cast<double>(job.direction[tile * job.width + d]);
    }
    return y;
}

}  // namespace

void test_sparse_lookup(const KernelVariant<SparseLookupKernel>& variant) {
    for (int round = 0; round < 300; ++round) {
        const auto draw = [](std::size_t count, float scale = 1.0f) {
            std::vector<float> values(count);
            for (float& value : values) value = (static_cast<float>(random_below(2001)) / 1000 - 1) * scale;
            return values;
        };
        SparseLookupJob job{};
        const std::size_t num_tokens = random_below(30);
        job.width = random_below(round % 10 == 0 ? 600 : 70);
        job.num_hidden = random_below(80);
        job.num_tiles = 1 + random_below(5);
        job.top_k = random_below(4);
        job.num_knots = 2 + random_below(8);
        job.grid_size = 1 + random_below(36);
        job.has_hinges = round % 2 == 0;
        job.spline_size = job.has_hinges ? 4 * job.grid_size + 1 : (job.grid_size + 1) * (job.grid_size + 1);
        const float scale = 1.0f / std::sqrt(static_cast<float>(1 + job.width));
        const auto x = draw(num_tokens * job.width), h = draw(num_tokens * job.width);
        const auto score = draw(num_tokens * job.num_tiles, 8.0f), gate_curve = draw(job.num_knots);
        const auto compress = draw(job.width * job.num_hidden, 3 * scale);
        const auto compress_bias = draw(job.num_hidden), point_bias = draw(2);
        const auto point_weight = draw(2 * job.num_hidden, 0.3f);
        const auto splines = draw(job.num_tiles * job.spline_size);
        const auto direction = draw(job.num_tiles * job.width);
        std::vector<std::int64_t> tile_idx(num_tokens * job.top_k);
        for (auto& tile : tile_idx) tile = static_cast<std::int64_t>(random_below(job.num_tiles));
        job.x = x.data(), job.h = h.data(), job.score = score.data(), job.gate_curve = gate_curve.data();
        std::vector<StripRow> strips(num_strip_rows(job.width, job.num_hidden));
        lay_in_strips(compress.data(), job.width, job.num_hidden, strips.data());
        job.compress = strips.data(), job.compress_bias = compress_bias.data();
        job.point_weight = point_weight.data(), job.point_bias = point_bias.data();
        job.splines = splines.data(), job.direction = direction.data(), job.tile_idx = tile_idx.data();
        const auto run = [&](SparseLookupKernel kernel, std::size_t begin) {
            std::vector<float> hidden(num_tokens * whole_strips(job.num_hidden)), y(x.size(), kUntouched);
            job.hidden = hidden.data(), job.y = y.data();
            job.token_begin = begin, job.token_end = num_tokens;
            kernel(job);
            return y;
        };
        const std::size_t begin = random_below(num_tokens + 1);
        const std::vector<float> got = run(variant.function, begin), all = run(sparse_lookup_scalar, 0);
        for (std::size_t t = 0; t < num_tokens; ++t) {
            const std::vector<double> exact = reference_lookup(job, compress, t);
            for (std::size_t d = 0; d < job.width; ++d) {
                const float value = got[t * job.width + d];
                EXPECT(same(value, t < begin ? kUntouched : all[t * job.width + d]), "%s: round %d token %zu",
                       variant.name, round, t);
                const double error = std::abs(static_cast<double>(all[t * job.width + d]) - exact[d]);
                EXPECT(error <= 2e-5 * std::sqrt(static_cast<double>(job.grid_size)),
                       "%s: round %d token %zu: error %g", variant.name, round, t, error);
            }
        }
    }
}

}  // namespace trix_tests
