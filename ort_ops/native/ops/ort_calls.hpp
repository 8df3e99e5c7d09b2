// The runtime's C functions as checked C++ calls: a failed status becomes an exception, which custom_op.hpp
// turns back into a status at the C boundary.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <string>
#include <vector>

#include "ort_abi.hpp"

namespace trix {

using ort_abi::ElementType;
using ort_abi::ErrorCode;
using ort_abi::OrtApi;

/// A user's mistake or a failed rule, in words: the rule and both values.
struct OpError {
    ErrorCode code;
    std::string text;
};

/// A status that the runtime itself returned; owned by whoever catches it.
struct RuntimeStatus {
    ort_abi::OrtStatus* status;
};

template <typename... Parts>
std::string concat(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    return text.str();
}

template <typename... Parts>
[[noreturn]] void reject(const Parts&... parts) {
    throw OpError{ErrorCode::kInvalidArgument, concat(parts...)};
}

inline void check(ort_abi::OrtStatus* status) {
    if (status != nullptr) throw RuntimeStatus{status};
}

/// Name, element type and dimension names of an input or output: one row of an op's table.
struct TensorSpec {
    const char* name;
    ElementType type;
    std::size_t rank;
    const char* shape;
    bool is_optional = false;  // of an output: a node may leave it out
};

/// The sizes of a tensor whose rank is known to be small: no allocation, as every run reads every shape.
class Shape {
  public:
    static constexpr std::size_t kMaxRank = 4;

    Shape() = default;
    explicit Shape(std::size_t rank) : rank_(rank) {}

    std::size_t size() const { return rank_; }
    std::int64_t* data() { return dims_; }
    const std::int64_t* begin() const { return dims_; }
    const std::int64_t* end() const { return dims_ + rank_; }
    std::int64_t operator[](std::size_t axis) const { return dims_[axis]; }
    bool operator!=(const Shape& other) const {
        return !std::equal(begin(), end(), other.begin(), other.end());
    }

  private:
    std::size_t rank_ = 0;
    std::int64_t dims_[kMaxRank] = {};
};

/// A tensor whose element type and rank were checked against its spec.
struct TensorView {
    const char* name = nullptr;
    Shape shape;
    const void* data = nullptr;

    std::int64_t dim(std::size_t axis) const { return shape[axis]; }
    std::size_t size(std::size_t axis) const { return static_cast<std::size_t>(shape[axis]); }
    template <typename T>
    const T* as() const {
        return static_cast<const T*>(data);
    }
};

/// "[2, 3, 4]"
template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
    std::string text;
    for (const std::int64_t size : sizes) text += (text.empty() ? "[" : ", ") + std::to_string(size);
    return text.empty() ? "[]" : text + "]";
}

/// Product of non-negative sizes times the element size; rejects one that does not fit the address space.
std::size_t checked_bytes(const char* what, std::initializer_list<std::int64_t> sizes,
                          std::size_t element_size);

/// Checks type and rank of `value` against `spec`; the view borrows the data.
TensorView view_tensor(const OrtApi* api, const ort_abi::OrtValue* value, const TensorSpec& spec);

/// Rejects a view whose shape is not `wanted`, which follows from that of `like`.
void check_shape(const TensorView& view, std::initializer_list<std::int64_t> wanted, const TensorView& like);

/// What a kernel sees when its session is created.
class KernelInfo {
  public:
    KernelInfo(const OrtApi* api, const ort_abi::OrtKernelInfo* info) : api_(api), info_(info) {}

    /// The attribute, or `default_value` if the node has none; rejects one of another type.
    std::int64_t int_attribute(const char* name, std::int64_t default_value) const;
    float float_attribute(const char* name, float default_value) const;

    /// Fills `view` and returns true if input `index` is an initializer of the model.
    bool constant_input(std::size_t index, const TensorSpec& spec, TensorView* view) const;

    /// Logs at level info if the session's logger shows that level; returns whether it does.
    bool log_info(const std::string& message) const;

  private:
    bool has_attribute(const char* name) const;
    bool succeeded(ort_abi::OrtStatus* status) const;

    const OrtApi* api_;
    const ort_abi::OrtKernelInfo* info_;
};

/// What a kernel sees when it runs.
class KernelContext {
  public:
    KernelContext(const OrtApi* api, ort_abi::OrtKernelContext* context) : api_(api), context_(context) {}

    TensorView input(std::size_t index, const TensorSpec& spec) const;

    /// Null where the node leaves out an optional output.
    template <typename T>
    T* output(std::size_t index, const char* name, std::initializer_list<std::int64_t> shape) {
        checked_bytes(name, shape, sizeof(T));
        return static_cast<T*>(output_data(index, shape));
    }

    /// Calls body(i) once for each i in [0, count) on the session's thread pool. `body` must not throw.
    template <typename Body>
    void parallel_for(std::size_t count, const Body& body) const {
        if (count == 1) return body(0);
        const auto call = [](void* data, std::size_t i) { (*static_cast<const Body*>(data))(i); };
        check(ort_abi::KernelContext_ParallelFor(api_, context_, call, count, 0, const_cast<Body*>(&body)));
    }

  private:
    void* output_data(std::size_t index, std::initializer_list<std::int64_t> shape);

    const OrtApi* api_;
    ort_abi::OrtKernelContext* context_;
};

/// The inputs of a node. Constants are looked up once, when the session is created: to ask the runtime about
/// an input takes longer than a small op computes.
template <std::size_t kCount>
class Inputs {
  public:
    Inputs(const KernelInfo& info, const TensorSpec (&specs)[kCount]) : specs_(specs) {
        for (std::size_t i = 0; i < kCount; ++i)
            is_constant_[i] = info.constant_input(i, specs[i], &constant_[i]);
    }

    bool is_constant(std::size_t index) const { return is_constant_[index]; }

    TensorView view(const KernelContext& context, std::size_t index) const {
        return is_constant_[index] ? constant_[index] : context.input(index, specs_[index]);
    }

  private:
    const TensorSpec* specs_;
    bool is_constant_[kCount];
    TensorView constant_[kCount];  // valid as long as the session
};

/// One dimension in shape inference: a value, or a name, or neither.
struct Dimension {
    std::int64_t value = -1;
    std::string name;

    bool is_known() const { return value >= 0 || !name.empty(); }
};

/// What shape inference sees. Unknown things stay unknown: no output shape is better than a wrong one.
class ShapeContext {
  public:
    ShapeContext(const OrtApi* api, ort_abi::OrtShapeInferContext* context) : api_(api), context_(context) {}

    /// Dimension `axis` of input `index`; unknown unless the input has the rank of its spec.
    Dimension input_dimension(std::size_t index, const TensorSpec& spec, std::size_t axis) const;

    std::int64_t int_attribute(const char* name, std::int64_t default_value) const;

    /// Does nothing unless every dimension is known.
    void set_output(std::size_t index, ElementType type, const std::vector<Dimension>& shape) const;

  private:
    const OrtApi* api_;
    ort_abi::OrtShapeInferContext* context_;
};

}  // namespace trix
