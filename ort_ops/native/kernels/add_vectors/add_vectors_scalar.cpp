#include "kernels/add_vectors/add_vectors.hpp"

namespace trix {

void add_vectors_scalar(const AddVectorsJob& job) {
    for (std::size_t i = 0; i < job.size; ++i) job.y[i] += job.x[i];
}

}  // namespace trix
