#include "ops/ort_calls.hpp"

#include <limits>
#include <memory>

namespace trix {

using namespace ort_abi;

namespace {

struct ReleaseTypeAndShape {
    const OrtApi* api;
    void operator()(OrtTensorTypeAndShapeInfo* info) const { ReleaseTensorTypeAndShapeInfo(api, info); }
};
using OwnedTypeAndShape = std::unique_ptr<OrtTensorTypeAndShapeInfo, ReleaseTypeAndShape>;

const char* type_name(ElementType type) {
    switch (type) {
        case ElementType::kFloat:
            return "float32";
        case ElementType::kUint8:
            return "uint8";
        case ElementType::kInt64:
            return "int64";
        default:
            return "another type";
    }
}

std::size_t rank_of(const OrtApi* api, const OrtTensorTypeAndShapeInfo* info) {
    std::size_t rank = 0;
    check(GetDimensionsCount(api, info, &rank));
    return rank;
}

std::vector<std::int64_t> dimensions_of(const OrtApi* api, const OrtTensorTypeAndShapeInfo* info) {
    std::vector<std::int64_t> shape(rank_of(api, info));
    if (!shape.empty()) check(GetDimensions(api, info, shape.data(), shape.size()));
    return shape;
}

}  // namespace

std::size_t checked_bytes(const char* what, std::initializer_list<std::int64_t> sizes,
                          std::size_t element_size) {
    constexpr auto kLimit = static_cast<std::size_t>(std::numeric_limits<std::ptrdiff_t>::max());
    std::size_t bytes = element_size;
    for (const std::int64_t size : sizes) {
        if (size < 0 || __builtin_mul_overflow(bytes, static_cast<std::size_t>(size), &bytes) ||
            bytes > kLimit) {
            reject("size of ", what, " ", shape_text(sizes), " must be at most ", kLimit, " bytes");
        }
    }
    return bytes;
}

void check_shape(const TensorView& view, std::initializer_list<std::int64_t> wanted, const TensorView& like) {
    if (!std::equal(view.shape.begin(), view.shape.end(), wanted.begin(), wanted.end())) {
        reject("shape of ", view.name, " ", shape_text(view.shape), " must be ", shape_text(wanted), ", as ",
               like.name, " ", shape_text(like.shape), " has it");
    }
}

TensorView view_tensor(const OrtApi* api, const OrtValue* value, const TensorSpec& spec) {
    if (value == nullptr) reject(spec.name, " must be given, it is missing");
    OrtTensorTypeAndShapeInfo* raw_info = nullptr;
    check(GetTensorTypeAndShape(api, value, &raw_info));
    const OwnedTypeAndShape info(raw_info, ReleaseTypeAndShape{api});

    ElementType type = ElementType::kUndefined;
    check(GetTensorElementType(api, info.get(), &type));
    if (type != spec.type) {
        reject("element type of ", spec.name, " (", type_name(type), ") must be ", type_name(spec.type));
    }
    const std::size_t rank = rank_of(api, info.get());
    if (rank != spec.rank) {
        reject("rank of ", spec.name, " (", rank, ", shape ", shape_text(dimensions_of(api, info.get())),
               ") must be ", spec.rank, " ", spec.shape);
    }
    TensorView view{spec.name, Shape(rank), nullptr};
    check(GetDimensions(api, info.get(), view.shape.data(), rank));
    void* data =
        nullptr;  // The runtime's only accessor is the mutable one; the data is not written through it.
    check(GetTensorMutableData(api, const_cast<OrtValue*>(value), &data));
    view.data = data;
    return view;
}

bool KernelInfo::succeeded(OrtStatus* status) const {
    if (status == nullptr) return true;
    ReleaseStatus(api_, status);
    return false;
}

bool KernelInfo::has_attribute(const char* name) const {
    std::int64_t integer = 0;
    float real = 0;
    std::size_t size = 0;
    return succeeded(KernelInfoGetAttribute_int64(api_, info_, name, &integer)) ||
           succeeded(KernelInfoGetAttribute_float(api_, info_, name, &real)) ||
           succeeded(KernelInfoGetAttribute_string(api_, info_, name, nullptr, &size)) ||
           succeeded(KernelInfoGetAttributeArray_int64(api_, info_, name, nullptr, &size)) ||
           succeeded(KernelInfoGetAttributeArray_float(api_, info_, name, nullptr, &size));
}

std::int64_t KernelInfo::int_attribute(const char* name, std::int64_t default_value) const {
    std::int64_t value = 0;
    if (succeeded(KernelInfoGetAttribute_int64(api_, info_, name, &value))) return value;
    if (has_attribute(name)) reject("attribute ", name, " must be an integer, it has another type");
    return default_value;
}

float KernelInfo::float_attribute(const char* name, float default_value) const {
    float value = 0;
    if (succeeded(KernelInfoGetAttribute_float(api_, info_, name, &value))) return value;
    if (has_attribute(name)) reject("attribute ", name, " must be a float, it has another type");
    return default_value;
}

bool KernelInfo::constant_input(std::size_t index, const TensorSpec& spec, TensorView* view) const {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    check(KernelInfoGetConstantInput_tensor(api_, info_, index, &is_constant, &value));
    if (is_constant == 0 || value == nullptr) return false;
    *view = view_tensor(api_, value, spec);
    return true;
}

bool KernelInfo::log_info(const std::string& message) const {
    const OrtLogger* logger = nullptr;
    check(KernelInfo_GetLogger(api_, info_, &logger));
    LogLevel level = LogLevel::kFatal;
    check(Logger_GetLoggingSeverityLevel(api_, logger, &level));
    if (level > LogLevel::kInfo) return false;
#ifdef _WIN32
    const PathChar* file = L"trix_ort_ops";
#else
    const PathChar* file = "trix_ort_ops";
#endif
    check(Logger_LogMessage(api_, logger, LogLevel::kInfo, message.c_str(), file, __LINE__, __func__));
    return true;
}

TensorView KernelContext::input(std::size_t index, const TensorSpec& spec) const {
    const OrtValue* value = nullptr;
    check(KernelContext_GetInput(api_, context_, index, &value));
    return view_tensor(api_, value, spec);
}

void* KernelContext::output_data(std::size_t index, std::initializer_list<std::int64_t> shape) {
    OrtValue* value = nullptr;
    check(KernelContext_GetOutput(api_, context_, index, shape.begin(), shape.size(), &value));
    if (value == nullptr) return nullptr;
    void* data = nullptr;
    check(GetTensorMutableData(api_, value, &data));
    return data;
}

Dimension ShapeContext::input_dimension(std::size_t index, const TensorSpec& spec, std::size_t axis) const {
    OrtTensorTypeAndShapeInfo* info = nullptr;  // borrowed
    check(ShapeInferContext_GetInputTypeShape(api_, context_, index, &info));
    const std::vector<std::int64_t> shape = dimensions_of(api_, info);
    if (shape.size() != spec.rank) return {};  // An input of unknown rank looks like one of rank 0.
    std::vector<const char*> names(shape.size(), nullptr);
    check(GetSymbolicDimensions(api_, info, names.data(), names.size()));
    return {shape[axis], names[axis] == nullptr ? "" : names[axis]};
}

std::int64_t ShapeContext::int_attribute(const char* name, std::int64_t default_value) const {
    const OrtOpAttr* attribute = nullptr;
    std::int64_t value = default_value;
    std::size_t size = 0;
    OrtStatus* status = ShapeInferContext_GetAttribute(api_, context_, name, &attribute);
    if (status == nullptr)
        status = ReadOpAttr(api_, attribute, AttributeType::kInt, &value, sizeof(value), &size);
    if (status == nullptr) return value;
    ReleaseStatus(api_, status);
    return default_value;
}

void ShapeContext::set_output(std::size_t index, ElementType type,
                              const std::vector<Dimension>& shape) const {
    std::vector<std::int64_t> values;
    std::vector<const char*> names;
    for (const Dimension& dimension : shape) {
        // The runtime would store an unnamed dynamic dimension as the number -1.
        if (!dimension.is_known()) return;
        values.push_back(dimension.value);
        names.push_back(dimension.name.c_str());
    }
    OrtTensorTypeAndShapeInfo* raw_info = nullptr;
    check(CreateTensorTypeAndShapeInfo(api_, &raw_info));
    const OwnedTypeAndShape info(raw_info, ReleaseTypeAndShape{api_});
    check(SetTensorElementType(api_, info.get(), type));
    check(SetDimensions(api_, info.get(), values.data(), values.size()));
    check(SetSymbolicDimensions(api_, info.get(), names.data(), names.size()));
    check(ShapeInferContext_SetOutputTypeShape(api_, context_, index, info.get()));
}

}  // namespace trix
