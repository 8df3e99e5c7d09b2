// Compile-time comparison of ort_abi.hpp with the official header; built only with
// -DONNXRUNTIME_INCLUDE_DIR=<folder>.
//
// A function agrees when it stands at the same offset of OrtApi and each parameter and the result have the
// same kind on both sides: pointer against pointer, or integer/enum of the same size.
#include <onnxruntime_c_api.h>

#include <cstddef>
#include <type_traits>

#include "ort_abi.hpp"

namespace {

namespace abi = trix::ort_abi;

template <typename Ours, typename Theirs>
constexpr bool same_kind() {
    if constexpr (std::is_void_v<Ours> || std::is_void_v<Theirs>) {
        return std::is_void_v<Ours> && std::is_void_v<Theirs>;
    } else {
        return std::is_pointer_v<Ours> == std::is_pointer_v<Theirs> && sizeof(Ours) == sizeof(Theirs);
    }
}

template <typename Ours, typename Theirs>
struct SameSignature : std::false_type {};

template <typename R1, typename... A1, typename R2, typename... A2>
struct SameSignature<R1 (*)(A1...), R2 (*)(A2...)> {
    static constexpr bool value = [] {
        if constexpr (sizeof...(A1) == sizeof...(A2)) {
            return same_kind<R1, R2>() && (same_kind<A1, A2>() && ...);
        } else {
            return false;
        }
    }();
};

// The official table marks its functions noexcept in C++.
template <typename R1, typename... A1, typename R2, typename... A2>
struct SameSignature<R1 (*)(A1...), R2 (*)(A2...) noexcept> : SameSignature<R1 (*)(A1...), R2 (*)(A2...)> {};

#define CHECK_FUNCTION(name)                                                                                 \
    static_assert(offsetof(::OrtApi, name) == decltype(abi::name)::kSlot * sizeof(void*), "slot of " #name); \
    static_assert(SameSignature<decltype(abi::name)::Pointer, decltype(::OrtApi::name)>::value,              \
                  "signature of " #name)

CHECK_FUNCTION(CreateStatus);
CHECK_FUNCTION(ReleaseStatus);
CHECK_FUNCTION(CreateCustomOpDomain);
CHECK_FUNCTION(CustomOpDomain_Add);
CHECK_FUNCTION(AddCustomOpDomain);
CHECK_FUNCTION(GetTensorMutableData);
CHECK_FUNCTION(GetTensorTypeAndShape);
CHECK_FUNCTION(CreateTensorTypeAndShapeInfo);
CHECK_FUNCTION(SetTensorElementType);
CHECK_FUNCTION(SetDimensions);
CHECK_FUNCTION(GetTensorElementType);
CHECK_FUNCTION(GetDimensionsCount);
CHECK_FUNCTION(GetDimensions);
CHECK_FUNCTION(GetSymbolicDimensions);
CHECK_FUNCTION(ReleaseTensorTypeAndShapeInfo);
CHECK_FUNCTION(SetSymbolicDimensions);
CHECK_FUNCTION(KernelInfoGetAttribute_float);
CHECK_FUNCTION(KernelInfoGetAttribute_int64);
CHECK_FUNCTION(KernelInfoGetAttribute_string);
CHECK_FUNCTION(KernelInfoGetAttributeArray_float);
CHECK_FUNCTION(KernelInfoGetAttributeArray_int64);
CHECK_FUNCTION(KernelInfo_GetLogger);
CHECK_FUNCTION(KernelInfoGetConstantInput_tensor);
CHECK_FUNCTION(Logger_LogMessage);
CHECK_FUNCTION(Logger_GetLoggingSeverityLevel);
CHECK_FUNCTION(KernelContext_GetInput);
CHECK_FUNCTION(KernelContext_GetOutput);
CHECK_FUNCTION(KernelContext_ParallelFor);
CHECK_FUNCTION(ShapeInferContext_GetInputTypeShape);
CHECK_FUNCTION(ShapeInferContext_GetAttribute);
CHECK_FUNCTION(ShapeInferContext_SetOutputTypeShape);
CHECK_FUNCTION(ReadOpAttr);

static_assert(offsetof(::OrtApiBase, GetApi) == offsetof(abi::OrtApiBase, GetApi));
static_assert(offsetof(::OrtApiBase, GetVersionString) == offsetof(abi::OrtApiBase, GetVersionString));

#define CHECK_FIELD(name)                                                                                 \
    static_assert(offsetof(::OrtCustomOp, name) == offsetof(abi::OrtCustomOp, name), "offset of " #name); \
    static_assert(SameSignature<decltype(abi::OrtCustomOp::name), decltype(::OrtCustomOp::name)>::value,  \
                  "signature of " #name)

static_assert(offsetof(::OrtCustomOp, version) == offsetof(abi::OrtCustomOp, version));
CHECK_FIELD(CreateKernel);
CHECK_FIELD(GetName);
CHECK_FIELD(GetExecutionProviderType);
CHECK_FIELD(GetInputType);
CHECK_FIELD(GetInputTypeCount);
CHECK_FIELD(GetOutputType);
CHECK_FIELD(GetOutputTypeCount);
CHECK_FIELD(KernelCompute);
CHECK_FIELD(KernelDestroy);
CHECK_FIELD(GetInputCharacteristic);
CHECK_FIELD(GetOutputCharacteristic);
CHECK_FIELD(GetInputMemoryType);
CHECK_FIELD(GetVariadicInputMinArity);
CHECK_FIELD(GetVariadicInputHomogeneity);
CHECK_FIELD(GetVariadicOutputMinArity);
CHECK_FIELD(GetVariadicOutputHomogeneity);
CHECK_FIELD(CreateKernelV2);
CHECK_FIELD(KernelComputeV2);
CHECK_FIELD(InferOutputShapeFn);
CHECK_FIELD(GetStartVersion);
CHECK_FIELD(GetEndVersion);

#define CHECK_VALUE(ours, theirs) static_assert(static_cast<int>(ours) == static_cast<int>(theirs), #theirs)

CHECK_VALUE(abi::ErrorCode::kFail, ::ORT_FAIL);
CHECK_VALUE(abi::ErrorCode::kInvalidArgument, ::ORT_INVALID_ARGUMENT);
CHECK_VALUE(abi::ErrorCode::kNotImplemented, ::ORT_NOT_IMPLEMENTED);
CHECK_VALUE(abi::ErrorCode::kInvalidGraph, ::ORT_INVALID_GRAPH);
CHECK_VALUE(abi::ElementType::kFloat, ::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
CHECK_VALUE(abi::ElementType::kUint8, ::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8);
CHECK_VALUE(abi::ElementType::kInt64, ::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
CHECK_VALUE(abi::Characteristic::kRequired, ::INPUT_OUTPUT_REQUIRED);
CHECK_VALUE(abi::Characteristic::kOptional, ::INPUT_OUTPUT_OPTIONAL);
CHECK_VALUE(abi::MemoryType::kDefault, ::OrtMemTypeDefault);
CHECK_VALUE(abi::LogLevel::kInfo, ::ORT_LOGGING_LEVEL_INFO);
CHECK_VALUE(abi::AttributeType::kInt, ::ORT_OP_ATTR_INT);

}  // namespace
