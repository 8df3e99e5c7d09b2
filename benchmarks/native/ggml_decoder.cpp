// The decoder of BitNet b1.58 2B4T as one graph of ggml, with the operators of llama.cpp's graph of this
// architecture but for the square of ReLU, which llama.cpp takes for SiLU. benchmarks/ggml_contestant.py
// builds it with ggml inside and calls it through ctypes.
//
// Shapes are written as in ggml, the fastest dimension first.
#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <ggml.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

struct Sizes {
    std::int32_t hidden, layers, heads, kv_heads, head_size, ffn, vocab, positions, threads;
    std::int32_t ternary_type, head_type;  // of ggml
    float rope_theta, epsilon;
};

struct Decoder {
    Sizes sizes;
    ggml_context* weights = nullptr;
    ggml_context* steps = nullptr;  // of the prepared graph
    ggml_cgraph* graph = nullptr;
    ggml_tensor *tokens = nullptr, *logits = nullptr;
    ggml_threadpool* pool = nullptr;
    ggml_gallocr* memory = nullptr;  // of the graph's values
    ggml_cplan plan{};
    std::vector<std::uint8_t> work{};

    ~Decoder() {
        ggml_threadpool_free(pool);
        ggml_gallocr_free(memory);
        ggml_free(steps);
        ggml_free(weights);
    }
};

namespace {

constexpr int kRotateHalves = GGML_ROPE_TYPE_NEOX;
constexpr std::size_t kGraphNodes = 4096;

std::string of_layer(int layer, const char* name) {
    return "layers." + std::to_string(layer) + "." + name;
}

// Weights, keys and values of a decoder: fills in the context `into`; without one it counts their bytes.
std::size_t add_tensors(const Sizes& s, ggml_context* into) {
    std::size_t num_bytes = 0;
    const auto add = [&](ggml_type type, std::int64_t columns, std::int64_t rows, const std::string& name) {
        num_bytes +=
            ggml_row_size(type, columns) * static_cast<std::size_t>(rows) + ggml_tensor_overhead() + 64;
        if (into != nullptr) ggml_set_name(ggml_new_tensor_2d(into, type, columns, rows), name.c_str());
    };
    const auto ternary = static_cast<ggml_type>(s.ternary_type);
    const int q_width = s.heads * s.head_size, kv_width = s.kv_heads * s.head_size;
    add(static_cast<ggml_type>(s.head_type), s.hidden, s.vocab, "embedding");
    add(GGML_TYPE_F32, s.hidden, 1, "norm");
    for (int i = 0; i < s.layers; ++i) {
        add(GGML_TYPE_F32, s.hidden, 1, of_layer(i, "attention_norm"));
        add(GGML_TYPE_F32, s.hidden, 1, of_layer(i, "ffn_norm"));
        add(GGML_TYPE_F32, q_width, 1, of_layer(i, "attention_sub_norm"));
        add(GGML_TYPE_F32, s.ffn, 1, of_layer(i, "ffn_sub_norm"));
        add(ternary, s.hidden, q_width, of_layer(i, "q"));
        add(ternary, s.hidden, kv_width, of_layer(i, "k"));
        add(ternary, s.hidden, kv_width, of_layer(i, "v"));
        add(ternary, q_width, s.hidden, of_layer(i, "o"));
        add(ternary, s.hidden, s.ffn, of_layer(i, "gate"));
        add(ternary, s.hidden, s.ffn, of_layer(i, "up"));
        add(ternary, s.ffn, s.hidden, of_layer(i, "down"));
        add(GGML_TYPE_F16, kv_width, s.positions, of_layer(i, "keys"));
        add(GGML_TYPE_F16, kv_width, s.positions, of_layer(i, "values"));
    }
    return num_bytes;
}

// The steps of one run: num_tokens tokens after num_past others.
class Steps {
  public:
    Steps(Decoder& decoder, int num_tokens, int num_past)
        : s_(decoder.sizes),
          weights_(decoder.weights),
          ctx_(decoder.steps),
          graph_(decoder.graph),
          num_tokens_(num_tokens),
          num_past_(num_past) {
        position_ = ggml_new_tensor_1d(ctx_, GGML_TYPE_I32, num_tokens);
        mask_ = ggml_new_tensor_2d(ctx_, GGML_TYPE_F16, num_past + num_tokens, num_tokens);
        for (ggml_tensor* kept : {position_, mask_}) {
            ggml_set_input(kept);
            ggml_set_output(
                kept);  // else a run may write other values in their place, and the next one reads these
        }
    }

    // Once the graph has its memory.
    void fill_inputs() {
        const int num_total = num_past_ + num_tokens_;
        for (int t = 0; t < num_tokens_; ++t) {
            static_cast<std::int32_t*>(position_->data)[t] = num_past_ + t;
            auto* row = static_cast<ggml_fp16_t*>(mask_->data) + static_cast<std::ptrdiff_t>(t) * num_total;
            for (int j = 0; j < num_total; ++j)
                row[j] =
                    ggml_fp32_to_fp16(j <= num_past_ + t ? 0.0f : -std::numeric_limits<float>::infinity());
        }
    }

    ggml_tensor* logits(ggml_tensor* tokens) {
        ggml_tensor* h = ggml_get_rows(ctx_, weight("embedding"), tokens);
        for (int i = 0; i < s_.layers; ++i) {
            layer_ = i;
            h = ggml_add(ctx_, attention(norm(h, own("attention_norm"))), h);
            h = ggml_add(ctx_, feed_forward(norm(h, own("ffn_norm"))), h);
        }
        return ggml_mul_mat(ctx_, weight("embedding"), norm(h, weight("norm")));
    }

  private:
    ggml_tensor* weight(const std::string& name) { return ggml_get_tensor(weights_, name.c_str()); }
    ggml_tensor* own(const char* name) { return weight(of_layer(layer_, name)); }

    ggml_tensor* norm(ggml_tensor* x, ggml_tensor* by) {
        return ggml_mul(ctx_, ggml_rms_norm(ctx_, x, s_.epsilon), by);
    }

    ggml_tensor* product(const char* name, ggml_tensor* x) { return ggml_mul_mat(ctx_, own(name), x); }

    ggml_tensor* heads(ggml_tensor* x, int num_heads) {
        return ggml_reshape_3d(ctx_, x, s_.head_size, num_heads, num_tokens_);
    }

    ggml_tensor* rotated(ggml_tensor* x) {
        return ggml_rope_ext(ctx_, x, position_, nullptr, s_.head_size, kRotateHalves, 0, s_.rope_theta, 1.0f,
                             0.0f, 1.0f, 32.0f, 1.0f);
    }

    // Writes x behind the past and gives what is then there, [head_size, past + tokens, kv_heads].
    ggml_tensor* cached(const char* name, ggml_tensor* x) {
        ggml_tensor* cache = own(name);
        const std::size_t row = cache->nb[1];
        ggml_tensor* place = ggml_view_2d(ctx_, cache, cache->ne[0], num_tokens_, row,
                                          row * static_cast<std::size_t>(num_past_));
        ggml_build_forward_expand(graph_,
                                  ggml_cpy(ctx_, ggml_reshape_2d(ctx_, x, cache->ne[0], num_tokens_), place));
        return ggml_view_3d(ctx_, cache, s_.head_size, num_past_ + num_tokens_, s_.kv_heads, row,
                            ggml_row_size(cache->type, s_.head_size), 0);
    }

    ggml_tensor* attention(ggml_tensor* x) {
        ggml_tensor* q = rotated(heads(product("q", x), s_.heads));
        ggml_tensor* k = rotated(heads(product("k", x), s_.kv_heads));
        ggml_tensor* v = product("v", x);
        ggml_tensor *keys = cached("keys", k), *values = cached("values", v);
        q = ggml_permute(ctx_, q, 0, 2, 1, 3);
        const float scale = 1.0f / std::sqrt(static_cast<float>(s_.head_size));
        ggml_tensor* y = ggml_flash_attn_ext(ctx_, q, keys, values, mask_, scale, 0.0f, 0.0f);
        y = ggml_reshape_2d(ctx_, y, s_.heads * s_.head_size, num_tokens_);
        return product("o", norm(y, own("attention_sub_norm")));
    }

    ggml_tensor* feed_forward(ggml_tensor* x) {
        ggml_tensor* up = product("up", x);
        ggml_tensor* gate = ggml_sqr(ctx_, ggml_relu(ctx_, product("gate", x)));
        return product("down", norm(ggml_mul(ctx_, gate, up), own("ffn_sub_norm")));
    }

    const Sizes& s_;
    ggml_context *weights_, *ctx_;
    ggml_cgraph* graph_;
    int num_tokens_, num_past_, layer_ = 0;
    ggml_tensor *position_, *mask_;
};

}  // namespace

extern "C" {

/// Null where memory is short.
Decoder* decoder_new(const Sizes* sizes) {
    auto* decoder = new Decoder{*sizes};
    ggml_cpu_init();
    decoder->weights = ggml_init({add_tensors(*sizes, nullptr), nullptr, false});
    ggml_threadpool_params threads = ggml_threadpool_params_default(sizes->threads);
    decoder->pool = ggml_threadpool_new(&threads);
    decoder->memory = ggml_gallocr_new(ggml_backend_cpu_buffer_type());
    if (decoder->weights == nullptr || decoder->pool == nullptr) return nullptr;
    add_tensors(*sizes, decoder->weights);
    for (ggml_tensor* t = ggml_get_first_tensor(decoder->weights); t != nullptr;
         t = ggml_get_next_tensor(decoder->weights, t))
        std::memset(t->data, 0, ggml_nbytes(t));
    return decoder;
}

void decoder_free(Decoder* decoder) {
    delete decoder;
}

/// Quantises num_values floats to the tensor's type; 0 where there is no such tensor of that size.
int decoder_set(Decoder* decoder, const char* name, const float* values, std::int64_t num_values) {
    ggml_tensor* tensor = ggml_get_tensor(decoder->weights, name);
    if (tensor == nullptr || ggml_nelements(tensor) != num_values) return 0;
    if (tensor->type == GGML_TYPE_F32) {
        std::memcpy(tensor->data, values, ggml_nbytes(tensor));
    } else {
        ggml_quantize_chunk(tensor->type, values, tensor->data, 0, tensor->ne[1], tensor->ne[0], nullptr);
    }
    return 1;
}

/// Builds the graph for num_tokens tokens after num_past others; the runs that follow use it. 0 where the
/// sizes do not fit or memory is short.
int decoder_prepare(Decoder* decoder, std::int32_t num_tokens, std::int32_t num_past) {
    const Sizes& s = decoder->sizes;
    if (num_tokens < 1 || num_past < 0 || num_past + num_tokens > s.positions) return 0;
    ggml_free(decoder->steps);
    decoder->steps =
        ggml_init({ggml_graph_overhead_custom(kGraphNodes, false) + kGraphNodes * ggml_tensor_overhead(),
                   nullptr, true});
    if (decoder->steps == nullptr) return 0;
    decoder->graph = ggml_new_graph_custom(decoder->steps, kGraphNodes, false);
    Steps steps(*decoder, num_tokens, num_past);
    decoder->tokens = ggml_new_tensor_1d(decoder->steps, GGML_TYPE_I32, num_tokens);
    ggml_set_input(decoder->tokens);
    decoder->logits = steps.logits(decoder->tokens);
    ggml_set_output(decoder->logits);
    ggml_build_forward_expand(decoder->graph, decoder->logits);
    if (!ggml_gallocr_alloc_graph(decoder->memory, decoder->graph)) return 0;
    steps.fill_inputs();
    decoder->plan = ggml_graph_plan(decoder->graph, s.threads, decoder->pool);
    decoder->work.resize(decoder->plan.work_size);
    decoder->plan.work_data = decoder->work.data();
    return 1;
}

/// Runs the prepared graph; logits [num_tokens, vocab] lie in the decoder until the next call. Null on
/// failure.
const float* decoder_run(Decoder* decoder, const std::int32_t* tokens) {
    std::memcpy(decoder->tokens->data, tokens, ggml_nbytes(decoder->tokens));
    const bool is_done = ggml_graph_compute(decoder->graph, &decoder->plan) == GGML_STATUS_SUCCESS;
    return is_done ? static_cast<const float*>(decoder->logits->data) : nullptr;
}

}  // extern "C"
