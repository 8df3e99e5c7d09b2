// A host program without Python: loads onnxruntime and the ai.trix library, and runs an exported classifier.
//
//   host <libonnxruntime> <libtrix_ort_ops> <model.onnx> <positions> <features>   < numbers
//
// Reads float32 numbers from stdin, positions * features of them for each example, and prints one line of
// logits per example. A program that is built with the headers of onnxruntime writes the same calls as
// `api->CreateEnv(...)`, and needs none of the declarations below.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort_abi.hpp"

namespace {

using namespace trix::ort_abi;

// What a host needs of onnxruntime's function table, beyond what the library itself calls.
struct OrtEnv;
struct OrtSession;
struct OrtRunOptions;
struct OrtMemoryInfo;

constexpr ApiFunction<2, const char*(const OrtStatus*)> GetErrorMessage{};
constexpr ApiFunction<3, OrtStatus*(LogLevel, const char* log_id, OrtEnv**)> CreateEnv{};
constexpr ApiFunction<7, OrtStatus*(const OrtEnv*, const PathChar* model, const OrtSessionOptions*,
                                    OrtSession**)>
    CreateSession{};
constexpr ApiFunction<9, OrtStatus*(OrtSession*, const OrtRunOptions*, const char* const* input_names,
                                    const OrtValue* const* inputs, std::size_t num_inputs,
                                    const char* const* output_names, std::size_t num_outputs,
                                    OrtValue** outputs)>
    Run{};
constexpr ApiFunction<10, OrtStatus*(OrtSessionOptions**)> CreateSessionOptions{};
constexpr ApiFunction<24, OrtStatus*(OrtSessionOptions*, int)> SetIntraOpNumThreads{};
constexpr ApiFunction<49,
                      OrtStatus*(const OrtMemoryInfo*, void* data, std::size_t num_bytes,
                                 const std::int64_t* dimensions, std::size_t rank, ElementType, OrtValue**)>
    CreateTensorWithDataAsOrtValue{};
constexpr ApiFunction<69, OrtStatus*(int allocator_type, int memory_type, OrtMemoryInfo**)>
    CreateCpuMemoryInfo{};
constexpr ApiFunction<92, void(OrtEnv*)> ReleaseEnv{};
constexpr ApiFunction<94, void(OrtMemoryInfo*)> ReleaseMemoryInfo{};
constexpr ApiFunction<95, void(OrtSession*)> ReleaseSession{};
constexpr ApiFunction<96, void(OrtValue*)> ReleaseValue{};
constexpr ApiFunction<100, void(OrtSessionOptions*)> ReleaseSessionOptions{};
constexpr int kDeviceAllocator = 0, kDefaultMemory = 0;

const OrtApi* api;

void check(OrtStatus* status) {
    if (status == nullptr) return;
    const std::string message = GetErrorMessage(api, status);
    ReleaseStatus(api, status);
    throw std::runtime_error(message);
}

// A function of a shared library, which stays loaded until the process ends.
template <typename Function>
Function* symbol(const char* library, const char* name) {
    void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    void* found = handle == nullptr ? nullptr : dlsym(handle, name);
    if (found == nullptr) throw std::runtime_error(dlerror());
    return reinterpret_cast<Function*>(found);
}

std::int64_t positive(const char* text) {
    const long value = std::strtol(text, nullptr, 10);
    if (value < 1) throw std::runtime_error(std::string(text) + " must be a number >= 1");
    return value;
}

void run(const char* runtime, const char* library, const char* model, std::int64_t positions,
         std::int64_t features) {
    const OrtApiBase* base = symbol<const OrtApiBase*()>(runtime, "OrtGetApiBase")();
    api = base->GetApi(kApiVersion);
    if (api == nullptr)
        throw std::runtime_error(std::string("onnxruntime must be >= 1.17, this is ") +
                                 base->GetVersionString());

    OrtEnv* env;
    OrtSessionOptions* options;
    OrtSession* session;
    check(CreateEnv(api, LogLevel::kWarning, "host", &env));
    check(CreateSessionOptions(api, &options));
    check(SetIntraOpNumThreads(api, options, 1));
    // The one line that a model of packed ternary weights needs.
    check(symbol<OrtStatus*(OrtSessionOptions*, const OrtApiBase*)>(library, "RegisterCustomOps")(options,
                                                                                                  base));
    check(CreateSession(api, env, model, options, &session));

    std::vector<float> x{std::istream_iterator<float>(std::cin), std::istream_iterator<float>()};
    const std::int64_t example_size = positions * features;
    const auto num_numbers = static_cast<std::int64_t>(x.size());
    if (num_numbers == 0 || num_numbers % example_size != 0)
        throw std::runtime_error("stdin (" + std::to_string(num_numbers) +
                                 " numbers) must hold a multiple of " + std::to_string(example_size));
    const std::int64_t shape[] = {num_numbers / example_size, positions, features};
    OrtMemoryInfo* memory;
    OrtValue *input, *output = nullptr;
    check(CreateCpuMemoryInfo(api, kDeviceAllocator, kDefaultMemory, &memory));
    check(CreateTensorWithDataAsOrtValue(api, memory, x.data(), x.size() * sizeof(float), shape,
                                         std::size(shape), ElementType::kFloat, &input));

    const char *input_name = "features", *output_name = "logits";
    check(Run(api, session, nullptr, &input_name, &input, 1, &output_name, 1, &output));

    float* logits;
    OrtTensorTypeAndShapeInfo* info;
    std::int64_t found_shape[2];
    check(GetTensorMutableData(api, output, reinterpret_cast<void**>(&logits)));
    check(GetTensorTypeAndShape(api, output, &info));
    check(GetDimensions(api, info, found_shape, std::size(found_shape)));
    for (std::int64_t example = 0; example < found_shape[0]; ++example) {
        for (std::int64_t c = 0; c < found_shape[1]; ++c)
            std::printf("%s%.9g", c == 0 ? "" : " ", static_cast<double>(*logits++));
        std::printf("\n");
    }

    ReleaseTensorTypeAndShapeInfo(api, info);
    ReleaseValue(api, output);
    ReleaseValue(api, input);
    ReleaseMemoryInfo(api, memory);
    ReleaseSession(api, session);
    ReleaseSessionOptions(api, options);
    ReleaseEnv(api, env);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 6) {
        std::fprintf(stderr,
                     "usage: %s <libonnxruntime> <libtrix_ort_ops> <model.onnx> <positions> <features>\n",
                     argv[0]);
        return 2;
    }
    try {
        run(argv[1], argv[2], argv[3], positive(argv[4]), positive(argv[5]));
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s: %s\n", argv[0], error.what());
        return 1;
    }
    return 0;
}
