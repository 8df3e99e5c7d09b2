// The C face of an op. `CustomOp<Op>` fills the runtime's OrtCustomOp from a class that has
//   static constexpr const char* kName;   static constexpr TensorSpec kInputs[], kOutputs[];
//   Op(const KernelInfo&)               checks what is known when a session is created
//   void compute(KernelContext&) const  checks everything else and runs; called from any thread
//   static void infer_shapes(const ShapeContext&)
// All inputs are required: omitted optional ones crash shape inference in onnxruntime 1.17 to 1.22. An
// optional output is the last, and infer_shapes must not name it: the runtime would write past the outputs
// that there are.
#pragma once

#include <exception>
#include <iterator>
#include <memory>
#include <new>

#include "ops/ort_calls.hpp"
#include "ort_abi.hpp"

namespace trix {

/// Runs `body` and turns whatever it throws into a status: no exception crosses the C boundary.
template <typename Body>
ort_abi::OrtStatus* guarded(const OrtApi* api, const char* where, const Body& body) noexcept {
    try {
        try {
            body();
            return nullptr;
        } catch (const RuntimeStatus& failure) {
            return failure.status;
        } catch (const OpError& error) {
            return ort_abi::CreateStatus(api, error.code, concat(where, ": ", error.text).c_str());
        } catch (const std::bad_alloc&) {
            return ort_abi::CreateStatus(api, ErrorCode::kFail, "ai.trix: out of memory");
        } catch (const std::exception& error) {
            return ort_abi::CreateStatus(api, ErrorCode::kFail, concat(where, ": ", error.what()).c_str());
        }
    } catch (...) {
        return ort_abi::CreateStatus(api, ErrorCode::kFail, "ai.trix: unknown error");
    }
}

/// Logs once per process which instruction set runs, as soon as a session shows messages of level info.
void log_instruction_set(const KernelInfo& info);

template <typename Op>
class CustomOp : public ort_abi::OrtCustomOp {
  public:
    explicit CustomOp(const OrtApi* api) : ort_abi::OrtCustomOp{}, api_(api) {
        using Base = ort_abi::OrtCustomOp;
        version = ort_abi::kApiVersion;
        GetName = [](const Base*) { return Op::kName; };
        GetExecutionProviderType = [](const Base*) -> const char* {
            return nullptr;
        };  // null: the CPU provider
        GetInputType = [](const Base*, std::size_t i) { return Op::kInputs[i].type; };
        GetInputTypeCount = [](const Base*) { return std::size(Op::kInputs); };
        GetOutputType = [](const Base*, std::size_t i) { return Op::kOutputs[i].type; };
        GetOutputTypeCount = [](const Base*) { return std::size(Op::kOutputs); };
        GetInputCharacteristic = [](const Base*, std::size_t) { return ort_abi::Characteristic::kRequired; };
        GetOutputCharacteristic = [](const Base*, std::size_t i) {
            return Op::kOutputs[i].is_optional ? ort_abi::Characteristic::kOptional
                                               : ort_abi::Characteristic::kRequired;
        };
        GetInputMemoryType = [](const Base*, std::size_t) { return ort_abi::MemoryType::kDefault; };
        GetVariadicInputMinArity = [](const Base*) { return 0; };
        GetVariadicInputHomogeneity = [](const Base*) { return 0; };
        GetVariadicOutputMinArity = [](const Base*) { return 0; };
        GetVariadicOutputHomogeneity = [](const Base*) { return 0; };
        GetStartVersion = [](const Base*) { return 1; };
        GetEndVersion = [](const Base*) { return 1; };
        CreateKernelV2 = create;
        KernelComputeV2 = compute;
        KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
        InferOutputShapeFn = infer_shapes;
    }

  private:
    struct Kernel {
        Kernel(const OrtApi* used_api, const KernelInfo& info) : api(used_api), op(info) {}
        const OrtApi* api;
        Op op;
    };

    static ort_abi::OrtStatus* create(const ort_abi::OrtCustomOp*, const OrtApi* api,
                                      const ort_abi::OrtKernelInfo* raw_info, void** kernel) {
        return guarded(api, Op::kName, [&] {
            const KernelInfo info(api, raw_info);
            log_instruction_set(info);
            *kernel = new Kernel(api, info);
        });
    }

    static ort_abi::OrtStatus* compute(void* raw_kernel, ort_abi::OrtKernelContext* raw_context) {
        const auto* kernel = static_cast<const Kernel*>(raw_kernel);
        return guarded(kernel->api, Op::kName, [&] {
            KernelContext context(kernel->api, raw_context);
            kernel->op.compute(context);
        });
    }

    static ort_abi::OrtStatus* infer_shapes(const ort_abi::OrtCustomOp* self,
                                            ort_abi::OrtShapeInferContext* raw_context) {
        const OrtApi* api = static_cast<const CustomOp*>(self)->api_;
        return guarded(api, Op::kName, [&] { Op::infer_shapes(ShapeContext(api, raw_context)); });
    }

    const OrtApi* api_;
};

/// make_<file>_op: the ops of this library, made once and never freed: a domain keeps pointers to them.
#define TRIX_OP(file, Name) std::unique_ptr<ort_abi::OrtCustomOp> make_##file##_op(const OrtApi* api);
#include "ops/ops.inc"
#undef TRIX_OP

}  // namespace trix
