#include "kernels/signature_norms/signature_norms.hpp"
#include "tests/products.hpp"

namespace trix_tests {

void test_signature_norms(const KernelVariant<SignatureNormsKernel>& variant) {
    for (int round = 0; round < 300; ++round) {
        const Product p = random_product(0, random_below(80), random_below(90), false);
        std::vector<float> got(p.num_rows);
        variant.function({p.panels.data(), got.data(), p.num_rows, p.num_columns});
        for (std::size_t n = 0; n < p.num_rows; ++n) {
            float nnz = 0;
            for (std::size_t k = 0; k < p.num_columns; ++k)
                nnz += p.weight[n * p.num_columns + k] != 0 ? 1.0f : 0.0f;
            EXPECT(same(got[n], 1.0f / std::sqrt(std::max(nnz, 1.0f))), "%s: row %zu", variant.name, n);
        }
    }
}

}  // namespace trix_tests
