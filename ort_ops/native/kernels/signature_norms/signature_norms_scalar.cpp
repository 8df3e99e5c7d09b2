#include <cmath>
#include <cstring>

#include "kernels/signature_norms/signature_norms.hpp"

namespace trix {

void signature_norms_scalar(const SignatureNormsJob& job) {
    constexpr std::uint32_t kLowBits = 0x55555555u;
    const std::size_t num_blocks = ceil_div(job.num_columns, kBlockColumns);
    for (std::size_t panel = 0; panel * kPanelRows < job.num_rows; ++panel) {
        std::size_t nnz[kPanelRows] = {};
        for (std::size_t block = 0; block < num_blocks; ++block) {
            const std::uint8_t* bytes = job.panels + (panel * num_blocks + block) * kBlockBytes;
            for (std::size_t row = 0; row < kPanelRows; ++row) {
                std::uint32_t codes;
                std::memcpy(&codes, bytes + 4 * row, sizeof(codes));
                // 00 and 10 are the codes with an even low bit.
                nnz[row] += static_cast<std::size_t>(__builtin_popcount(~codes & kLowBits));
            }
        }
        for (std::size_t row = 0; row < kPanelRows && panel * kPanelRows + row < job.num_rows; ++row) {
            const auto count = static_cast<float>(nnz[row] > 0 ? nnz[row] : 1);
            job.inverse_norm[panel * kPanelRows + row] = 1.0f / std::sqrt(count);
        }
    }
}

}  // namespace trix
