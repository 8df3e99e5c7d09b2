// The library's only exported symbol.
#include <atomic>
#include <mutex>

#include "kernels/dispatch.hpp"
#include "ops/custom_op.hpp"

namespace trix {
namespace {

constexpr const char* kDomainName = "ai.trix";

// Sessions keep a borrowed pointer to the domain and its ops, so it is made once and lives as long as the
// process.
ort_abi::OrtCustomOpDomain* shared_domain(const OrtApi* api) {
    static std::mutex mutex;
    static ort_abi::OrtCustomOpDomain* domain = nullptr;
    const std::lock_guard<std::mutex> lock(mutex);
    if (domain == nullptr) {
        std::unique_ptr<ort_abi::OrtCustomOp> ops[] = {
#define TRIX_OP(file, Name) make_##file##_op(api),
#include "ops/ops.inc"
#undef TRIX_OP
        };
        ort_abi::OrtCustomOpDomain* created = nullptr;
        check(ort_abi::CreateCustomOpDomain(api, kDomainName, &created));
        for (auto& op : ops) check(ort_abi::CustomOpDomain_Add(api, created, op.release()));
        domain = created;
    }
    return domain;
}

}  // namespace

void log_instruction_set(const KernelInfo& info) {
    static std::atomic<bool> is_logged{false};
    if (is_logged.load()) return;
    if (info.log_info(concat("ai.trix: kernels run with instruction set ", isa_name(kernels().isa))))
        is_logged = true;
}

}  // namespace trix

extern "C" __attribute__((visibility("default"))) trix::ort_abi::OrtStatus* RegisterCustomOps(
    trix::ort_abi::OrtSessionOptions* options, const trix::ort_abi::OrtApiBase* api_base) {
    using namespace trix;
    const OrtApi* api = api_base->GetApi(ort_abi::kApiVersion);
    if (api == nullptr) {
        // Every runtime has version 1, whose first function makes the status to return.
        return ort_abi::CreateStatus(
            api_base->GetApi(1), ErrorCode::kNotImplemented,
            "ai.trix: onnxruntime must be >= 1.17 (its C API version 17); this one is older");
    }
    return guarded(api, "ai.trix", [&] {
        kernels();  // an unusable TRIX_ORT_ISA fails here, before a session exists
        check(ort_abi::AddCustomOpDomain(api, options, shared_domain(api)));
    });
}
