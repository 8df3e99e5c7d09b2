// The small part of the onnxruntime C ABI that this library uses, declared in its own words.
//
// onnxruntime hands a custom-op library a table of function pointers (`OrtApi`). The table only ever grows at
// its end, so the slot of a function is a stable fact, and a library needs no header of the runtime to be
// built. Each function below names its slot and its signature; abi_check.cpp compares both with the official
// header when a build is given one. API version 17 (onnxruntime 1.17) is the floor: it brought shape
// inference and ParallelFor.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trix::ort_abi {

inline constexpr std::uint32_t kApiVersion = 17;

// Opaque objects of the runtime.
struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtTensorTypeAndShapeInfo;
struct OrtValue;
struct OrtLogger;
struct OrtOpAttr;

enum class ErrorCode : int {
    kOk = 0,
    kFail = 1,
    kInvalidArgument = 2,
    kNotImplemented = 9,
    kInvalidGraph = 10
};
enum class ElementType : int { kUndefined = 0, kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7 };
enum class Characteristic : int { kRequired = 0, kOptional = 1, kVariadic = 2 };
enum class MemoryType : int { kDefault = 0 };
enum class LogLevel : int { kVerbose = 0, kInfo = 1, kWarning = 2, kError = 3, kFatal = 4 };
enum class AttributeType : int { kUndefined = 0, kInt = 1, kInts = 2, kFloat = 3 };

#ifdef _WIN32
using PathChar = wchar_t;
#else
using PathChar = char;
#endif

/// The runtime's function table, up to the last slot used here.
struct OrtApi {
    static constexpr std::size_t kNumSlots = 275;
    void (*slot[kNumSlots])();
};

struct OrtApiBase {
    const OrtApi* (*GetApi)(std::uint32_t version);
    const char* (*GetVersionString)();
};

/// One function of the table: `Name(api, arguments...)` calls slot `kSlot` with the signature
/// `Result(Arguments...)`.
template <std::size_t kSlot, typename Signature>
struct ApiFunction;

template <std::size_t kSlot_, typename Result, typename... Arguments>
struct ApiFunction<kSlot_, Result(Arguments...)> {
    using Pointer = Result (*)(Arguments...);
    static constexpr std::size_t kSlot = kSlot_;
    static_assert(kSlot < OrtApi::kNumSlots);

    Result operator()(const OrtApi* api, Arguments... arguments) const {
        return reinterpret_cast<Pointer>(api->slot[kSlot])(arguments...);
    }
};

// Where a comment gives no ownership, what a function hands out is borrowed from the object it was asked of.
// A returned OrtStatus (null = success) belongs to the caller.

inline constexpr ApiFunction<0, OrtStatus*(ErrorCode, const char* message)> CreateStatus{};
inline constexpr ApiFunction<93, void(OrtStatus*)> ReleaseStatus{};

inline constexpr ApiFunction<26, OrtStatus*(const char* name, OrtCustomOpDomain**)> CreateCustomOpDomain{};
inline constexpr ApiFunction<27, OrtStatus*(OrtCustomOpDomain*, const struct OrtCustomOp*)>
    CustomOpDomain_Add{};
inline constexpr ApiFunction<28, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)> AddCustomOpDomain{};

inline constexpr ApiFunction<51, OrtStatus*(OrtValue*, void** data)> GetTensorMutableData{};
inline constexpr ApiFunction<65, OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo** owned)>
    GetTensorTypeAndShape{};

inline constexpr ApiFunction<57, OrtStatus*(OrtTensorTypeAndShapeInfo** owned)>
    CreateTensorTypeAndShapeInfo{};
inline constexpr ApiFunction<58, OrtStatus*(OrtTensorTypeAndShapeInfo*, ElementType)> SetTensorElementType{};
inline constexpr ApiFunction<59,
                             OrtStatus*(OrtTensorTypeAndShapeInfo*, const std::int64_t*, std::size_t rank)>
    SetDimensions{};
inline constexpr ApiFunction<60, OrtStatus*(const OrtTensorTypeAndShapeInfo*, ElementType*)>
    GetTensorElementType{};
inline constexpr ApiFunction<61, OrtStatus*(const OrtTensorTypeAndShapeInfo*, std::size_t* rank)>
    GetDimensionsCount{};
inline constexpr ApiFunction<62,
                             OrtStatus*(const OrtTensorTypeAndShapeInfo*, std::int64_t*, std::size_t rank)>
    GetDimensions{};
inline constexpr ApiFunction<63, OrtStatus*(const OrtTensorTypeAndShapeInfo*, const char** names,
                                            std::size_t rank)>
    GetSymbolicDimensions{};
inline constexpr ApiFunction<99, void(OrtTensorTypeAndShapeInfo*)> ReleaseTensorTypeAndShapeInfo{};
inline constexpr ApiFunction<271,
                             OrtStatus*(OrtTensorTypeAndShapeInfo*, const char** names, std::size_t rank)>
    SetSymbolicDimensions{};

inline constexpr ApiFunction<85, OrtStatus*(const OrtKernelInfo*, const char* name, float*)>
    KernelInfoGetAttribute_float{};
inline constexpr ApiFunction<86, OrtStatus*(const OrtKernelInfo*, const char* name, std::int64_t*)>
    KernelInfoGetAttribute_int64{};
inline constexpr ApiFunction<87,
                             OrtStatus*(const OrtKernelInfo*, const char* name, char* out, std::size_t* size)>
    KernelInfoGetAttribute_string{};
inline constexpr ApiFunction<162, OrtStatus*(const OrtKernelInfo*, const char* name, float* out,
                                             std::size_t* size)>
    KernelInfoGetAttributeArray_float{};
inline constexpr ApiFunction<163, OrtStatus*(const OrtKernelInfo*, const char* name, std::int64_t* out,
                                             std::size_t* size)>
    KernelInfoGetAttributeArray_int64{};
inline constexpr ApiFunction<245, OrtStatus*(const OrtKernelInfo*, const OrtLogger**)> KernelInfo_GetLogger{};
inline constexpr ApiFunction<249, OrtStatus*(const OrtKernelInfo*, std::size_t index, int* is_constant,
                                             const OrtValue**)>
    KernelInfoGetConstantInput_tensor{};

inline constexpr ApiFunction<247, OrtStatus*(const OrtLogger*, LogLevel, const char* message,
                                             const PathChar* file, int line, const char* function)>
    Logger_LogMessage{};
inline constexpr ApiFunction<248, OrtStatus*(const OrtLogger*, LogLevel*)> Logger_GetLoggingSeverityLevel{};

inline constexpr ApiFunction<90, OrtStatus*(const OrtKernelContext*, std::size_t index, const OrtValue**)>
    KernelContext_GetInput{};
inline constexpr ApiFunction<91, OrtStatus*(OrtKernelContext*, std::size_t index,
                                            const std::int64_t* dimensions, std::size_t rank, OrtValue**)>
    KernelContext_GetOutput{};
inline constexpr ApiFunction<274, OrtStatus*(const OrtKernelContext*, void (*)(void* data, std::size_t index),
                                             std::size_t count, std::size_t num_batches, void* data)>
    KernelContext_ParallelFor{};

inline constexpr ApiFunction<268, OrtStatus*(const OrtShapeInferContext*, std::size_t index,
                                             OrtTensorTypeAndShapeInfo**)>
    ShapeInferContext_GetInputTypeShape{};
inline constexpr ApiFunction<269,
                             OrtStatus*(const OrtShapeInferContext*, const char* name, const OrtOpAttr**)>
    ShapeInferContext_GetAttribute{};
inline constexpr ApiFunction<270, OrtStatus*(const OrtShapeInferContext*, std::size_t index,
                                             const OrtTensorTypeAndShapeInfo*)>
    ShapeInferContext_SetOutputTypeShape{};
inline constexpr ApiFunction<272, OrtStatus*(const OrtOpAttr*, AttributeType, void* out, std::size_t capacity,
                                             std::size_t* size)>
    ReadOpAttr{};

/// What a custom op tells the runtime about itself: fields in the runtime's order up to op version 17.
struct OrtCustomOp {
    std::uint32_t version;

    // Version 1. Null where a V2 function below replaces it.
    void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
    const char* (*GetName)(const OrtCustomOp*);
    const char* (*GetExecutionProviderType)(const OrtCustomOp*);
    ElementType (*GetInputType)(const OrtCustomOp*, std::size_t index);
    std::size_t (*GetInputTypeCount)(const OrtCustomOp*);
    ElementType (*GetOutputType)(const OrtCustomOp*, std::size_t index);
    std::size_t (*GetOutputTypeCount)(const OrtCustomOp*);
    void (*KernelCompute)(void* kernel, OrtKernelContext*);
    void (*KernelDestroy)(void* kernel);

    // Version 8
    Characteristic (*GetInputCharacteristic)(const OrtCustomOp*, std::size_t index);
    Characteristic (*GetOutputCharacteristic)(const OrtCustomOp*, std::size_t index);

    // Version 13. The runtime calls it without a null check.
    MemoryType (*GetInputMemoryType)(const OrtCustomOp*, std::size_t index);

    // Version 14
    int (*GetVariadicInputMinArity)(const OrtCustomOp*);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);

    // Version 16
    OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
    OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);

    // Version 17. The runtime ignores the status that InferOutputShapeFn returns.
    OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
    int (*GetStartVersion)(const OrtCustomOp*);
    int (*GetEndVersion)(const OrtCustomOp*);
};

}  // namespace trix::ort_abi
