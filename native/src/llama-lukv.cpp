#include "llama-kv-cache-lukv.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-lukv-iswa.h"
#include "llama-lukv.h"
#include "llama-model.h"

#include <algorithm>

//
// memory
//

static std::string lukv_unsupported(const llama_model & model, const llama_memory_params & params) {
    const auto & hparams = model.hparams;

    switch (model.arch) {
        case LLM_ARCH_LLAMA:
        case LLM_ARCH_QWEN2:
        case LLM_ARCH_QWEN2MOE:
        case LLM_ARCH_QWEN3:
        case LLM_ARCH_QWEN3MOE:
        case LLM_ARCH_GEMMA2:
        case LLM_ARCH_GEMMA3:
        case LLM_ARCH_PHI3:
        case LLM_ARCH_GRANITE:
        case LLM_ARCH_STARCODER2:
        case LLM_ARCH_OLMO2:
        case LLM_ARCH_SMOLLM3:
        case LLM_ARCH_EXAONE:
        case LLM_ARCH_COMMAND_R:
        case LLM_ARCH_COHERE2:
        case LLM_ARCH_OPENAI_MOE:
        case LLM_ARCH_LLAMA4:
            break;
        default:
            return format("the architecture %s is not supported yet", llm_arch_name(model.arch));
    }

    // between RoPE and the attention the queries of this one are normalised or scaled: their statistics would miss that
    const auto needs = llama_lukv_metric::find(model.lukv->metric)->needs(model.lukv->metric_params);
    if (model.arch == LLM_ARCH_LLAMA4 && (needs.n_future > 0 || needs.plain)) {
        return format("the metric %s is not supported for the architecture %s yet", model.lukv->metric.c_str(), llm_arch_name(model.arch));
    }

    // layers with a window would forget what the repetition pushes out of it
    if (needs.repeated && hparams.swa_type != LLAMA_SWA_TYPE_NONE) {
        return format("the metric %s is not supported for sliding windows", model.lukv->metric.c_str());
    }

    if (hparams.use_alibi || hparams.n_pos_per_embd() > 1 || hparams.n_layer_nextn > 0 || params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT) {
        return "this kind of model or context is not supported";
    }
    bool is_swa = true;
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        is_swa = is_swa && hparams.is_swa(il);
    }
    if (is_swa) {
        return "all layers have a sliding window";
    }
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        if (hparams.n_head_kv(il) != hparams.n_head_kv(0) || !hparams.has_kv(il)) {
            return "layers with different numbers of KV heads are not supported yet";
        }
        // the rotation of quantised K and V has one size for all layers
        if (hparams.n_embd_head_k(il) != hparams.n_embd_head_k() || hparams.n_embd_head_v(il) != hparams.n_embd_head_v()) {
            return "layers with heads of different sizes are not supported yet";
        }
    }
    if (hparams.n_embd_head_k() % ggml_blck_size(params.type_k) != 0 || hparams.n_embd_head_v() % ggml_blck_size(params.type_v) != 0) {
        return format("heads of the size %u cannot be stored as %s and %s", hparams.n_embd_head_k(), ggml_type_name(params.type_k), ggml_type_name(params.type_v));
    }
    return "";
}

llama_memory_i * llama_lukv_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    if (!model.lukv) {
        return nullptr;
    }

    const std::string reason = lukv_unsupported(model, params);
    if (!reason.empty()) {
        LLAMA_LOG_WARN("%s: LU-KV is off, the KV cache has its full size: %s\n", __func__, reason.c_str());
        return nullptr;
    }

    if (model.hparams.swa_type != LLAMA_SWA_TYPE_NONE) {
        return new llama_kv_cache_lukv_iswa(model, cparams, *model.lukv, params.type_k, params.type_v, params.swa_full);
    }

    return new llama_kv_cache_lukv(model, cparams, *model.lukv, params.type_k, params.type_v, cparams.n_ctx, nullptr);
}

//
// interface implementation
//

static llama_kv_cache_lukv * get_lukv(const llama_context * ctx) {
    if (auto * kv = dynamic_cast<llama_kv_cache_lukv_iswa *>(ctx->get_memory())) {
        return kv->get_base();
    }
    return dynamic_cast<llama_kv_cache_lukv *>(ctx->get_memory());
}

static bool has_head(const llama_kv_cache_lukv * kv, int32_t il, int32_t ih) {
    return kv && kv->has_layer(il) && ih >= 0 && ih < (int32_t) kv->get_params().n_head_kv;
}

bool llama_lukv_enabled(const llama_context * ctx) {
    return get_lukv(ctx) != nullptr;
}

uint64_t llama_lukv_memory_size(const llama_context * ctx) {
    uint64_t res = 0;

    if (const auto * mem = ctx->get_memory()) {
        for (const auto & [_, size] : mem->memory_breakdown()) {
            res += size;
        }
    }

    return res;
}

uint64_t llama_lukv_memory_size_full(const llama_context * ctx) {
    const auto * kv = get_lukv(ctx);
    return kv ? llama_lukv_memory_size(ctx) - kv->size() + kv->size_stock() : llama_lukv_memory_size(ctx);
}

int32_t llama_lukv_n_layer(const llama_context * ctx) {
    return get_lukv(ctx) ? ctx->get_model().lukv->n_layer : 0;
}

int32_t llama_lukv_n_head_kv(const llama_context * ctx) {
    return get_lukv(ctx) ? ctx->get_model().lukv->n_head_kv : 0;
}

float llama_lukv_ratio(const llama_context * ctx) {
    const auto * kv = get_lukv(ctx);
    return kv ? kv->get_params().ratio : 0.0f;
}

bool llama_lukv_is_bounded(const llama_context * ctx) {
    const auto * kv = get_lukv(ctx);
    return kv && kv->get_params().policy == LLAMA_LUKV_POLICY_CAPACITY;
}

int32_t llama_lukv_n_cells_recent(const llama_context * ctx) {
    const auto * kv = get_lukv(ctx);
    return kv ? kv->get_n_room() : 0;
}

int64_t llama_lukv_n_evictions(const llama_context * ctx) {
    const auto * kv = get_lukv(ctx);
    return kv ? kv->get_n_evictions() : 0;
}

int64_t llama_lukv_n_evicted(const llama_context * ctx) {
    const auto * kv = get_lukv(ctx);
    return kv ? kv->get_n_evicted() : 0;
}

int64_t llama_lukv_t_commit_us(const llama_context * ctx) {
    const auto * kv = get_lukv(ctx);
    return kv ? kv->get_t_commit_us() : 0;
}

int32_t llama_lukv_n_cells_owned(const llama_context * ctx, int32_t il, int32_t ih) {
    const auto * kv = get_lukv(ctx);
    return has_head(kv, il, ih) ? kv->get_n_owned(il, ih) : -1;
}

int32_t llama_lukv_n_cells_used(const llama_context * ctx, int32_t il, int32_t ih) {
    const auto * kv = get_lukv(ctx);
    return has_head(kv, il, ih) ? kv->get_n_used(il, ih) : -1;
}

int32_t llama_lukv_seq_n_cells_owned(const llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t ih) {
    const auto * kv = get_lukv(ctx);
    return has_head(kv, il, ih) ? kv->get_n_owned(seq_id, il, ih) : -1;
}

int32_t llama_lukv_seq_n_cells_used(const llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t ih) {
    const auto * kv = get_lukv(ctx);
    return has_head(kv, il, ih) ? kv->get_n_used(seq_id, il, ih) : -1;
}

int32_t llama_lukv_seq_get_positions(const llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t ih, llama_pos * res, int32_t n_max) {
    const auto * kv = get_lukv(ctx);
    if (!has_head(kv, il, ih)) {
        return -1;
    }

    const auto pos = kv->get_positions(seq_id, il, ih);
    if (res) {
        std::copy_n(pos.begin(), std::min<size_t>(pos.size(), std::max(n_max, 0)), res);
    }

    return pos.size();
}

bool llama_lukv_commit(llama_context * ctx) {
    auto * kv = get_lukv(ctx);
    return kv ? kv->commit(ctx) : true;
}

int32_t llama_lukv_seq_kvzip(llama_context * ctx, llama_seq_id seq_id, const llama_token * tokens, int32_t n_tokens, llama_pos p0, llama_pos p1) {
    auto * kv = get_lukv(ctx);
    if (!kv || !kv->get_needs().repeated) {
        LLAMA_LOG_ERROR("%s: this is for the metric kvzip, but the cache ranks by %s\n", __func__, kv ? kv->get_params().metric.c_str() : "none");
        return -1;
    }

    const llama_pos pos_end = kv->seq_pos_max(seq_id) + 1;
    if (!tokens || n_tokens < 1 || p0 < std::max(kv->seq_pos_min(seq_id), 0) || p0 >= p1 || p1 > pos_end) {
        LLAMA_LOG_ERROR("%s: the sequence %d has the positions [%d, %d), the repetition has %d tokens and is about [%d, %d)\n", __func__,
                seq_id, kv->seq_pos_min(seq_id), pos_end, n_tokens, p0, p1);
        return -2;
    }
    if (kv->is_evicted(seq_id)) {
        LLAMA_LOG_ERROR("%s: the sequence %d was evicted already\n", __func__, seq_id);
        return -2;
    }
    if (!kv->begin_repetition(ctx, seq_id)) {
        return -3;
    }

    const int32_t n_batch = kv->get_queries().needs.n_window;

    bool ok = true;

    llama_batch batch = llama_batch_init(n_batch, 0, 1);
    for (int32_t first = 0; ok && first < n_tokens; first += n_batch) {
        batch.n_tokens = std::min(n_batch, n_tokens - first);
        for (int32_t i = 0; i < batch.n_tokens; ++i) {
            batch.token   [i]    = tokens[first + i];
            batch.pos     [i]    = pos_end + first + i;
            batch.n_seq_id[i]    = 1;
            batch.seq_id  [i][0] = seq_id;
            batch.logits  [i]    = false;
        }
        ok = llama_decode(ctx, batch) == 0 && kv->record(seq_id, p0, p1, pos_end + first, pos_end);
    }
    llama_batch_free(batch);

    kv->seq_rm(seq_id, pos_end, -1);
    kv->end_repetition(seq_id, ok);

    return ok ? 0 : -3;
}
