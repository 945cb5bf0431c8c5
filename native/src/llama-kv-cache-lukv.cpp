#include "llama-kv-cache-lukv.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-lukv-impl.h"
#include "llama-lukv.h"
#include "llama-model.h"

#include "ggml-ragged.h"

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>

// policy prefill: cells to grow by once the prompt is evicted
static constexpr uint32_t N_GROW = 512;

// long contexts: recent cells up to this part of the context, but no more than two ubatches
static constexpr uint32_t N_RECENT_FRACTION = 128;

// graph nodes for each head: views, permutations, attention and concatenation, or the score and the selection
static constexpr uint32_t N_NODES_HEAD = 24;

// nodes of the accumulated attention of a head
static constexpr uint32_t N_NODES_ATTN_SUMS = 24;

//
// llama_kv_cache_lukv
//

// a long context can afford to commit less often
static uint32_t n_recent_max_of(uint32_t kv_size, uint32_t n_ubatch) {
    return GGML_PAD(std::max({ n_ubatch, std::min(2*n_ubatch, kv_size/N_RECENT_FRACTION), N_RECENT_DECODE }), N_RECENT_PAD);
}

// size of the Hadamard rotation, as in llama_kv_cache: the largest one for K, the smallest one for V
static uint32_t n_rot(uint32_t n_embd_head, ggml_type type, bool largest) {
    const char * disable = getenv("LLAMA_ATTN_ROT_DISABLE");

    if (!ggml_is_quantized(type) || n_embd_head % 64 != 0 || (disable && atoi(disable))) {
        return 0;
    }

    uint32_t res = 64;
    while (largest && n_embd_head % (2*res) == 0) {
        res *= 2;
    }
    return res;
}

// copies rows from one tensor to another one, or within one where they do not overlap
class llama_kv_cache_lukv::row_copier {
public:
    row_copier(const llama_kv_cache_lukv & kv) {
        ctx.reset(ggml_init({
            /*.mem_size   =*/ 8*ggml_tensor_overhead(),
            /*.mem_buffer =*/ nullptr,
            /*.no_alloc   =*/ true,
        }));
        if (kv.lctx) {
            ggml_backend_sched_synchronize(kv.lctx->get_sched());
        }
    }

    void operator()(ggml_tensor * src, uint32_t src_row, ggml_tensor * dst, uint32_t dst_row, uint32_t n_rows) {
        if (n_rows == 0) {
            return;
        }

        ggml_reset(ctx.get());

        ggml_tensor * view_src = ggml_view_2d(ctx.get(), src, src->ne[0], n_rows, src->nb[1], src_row*src->nb[1]);
        ggml_tensor * view_dst = ggml_view_2d(ctx.get(), dst, dst->ne[0], n_rows, dst->nb[1], dst_row*dst->nb[1]);
        ggml_backend_view_init(view_src);
        ggml_backend_view_init(view_dst);

        ggml_backend_tensor_copy(view_src, view_dst);
    }

private:
    ggml_context_ptr ctx;
};

llama_kv_cache_lukv::llama_kv_cache_lukv(
        const llama_model       & model,
        const llama_cparams     & cparams,
        const llama_lukv_params & params_model,
        ggml_type type_k,
        ggml_type type_v,
         uint32_t kv_size,
  const layer_filter_cb & filter) :
    model(model), cparams(cparams), params(params_model), type_k(type_k), type_v(type_v), kv_size(kv_size),
    n_seq_max(cparams.n_seq_max),
    n_recent_max(n_recent_max_of(kv_size, cparams.n_ubatch)),
    n_room_all(n_recent_max + std::min(n_recent_max, (n_seq_max - 1)*N_RECENT_DECODE)),
    rot_k(n_rot(model.hparams.n_embd_head_k(), type_k, true)), rot_v(n_rot(model.hparams.n_embd_head_v(), type_v, false)),
    metric(*llama_lukv_metric::find(params.metric)), needs(metric.needs(params.metric_params)) {
    params.budget.clear();
    for (uint32_t il = 0; il < params_model.n_layer; ++il) {
        if (filter && !filter(il)) {
            continue;
        }
        map_layer_ids[il] = ops.size();
        ops.push_back(get_ops(il));

        const auto first = params_model.budget.begin() + il*params.n_head_kv;
        params.budget.insert(params.budget.end(), first, first + params.n_head_kv);
    }
    params.n_layer = ops.size();

    const auto n_owned = n_owned_all();
    kv = alloc(n_rows_of({}, {}), n_owned);

    std::map<int32_t, ggml_backend_dev_t> devs;
    for (const auto & layer : kv.layers) {
        devs[layer.il] = get_dev(layer.il);
    }
    queries = std::make_unique<llama_lukv_queries>(model, needs, devs, params.sink, n_seq_max);

    if (needs.out_norms) {
        alloc_wo_copies();
    }

    LLAMA_LOG_INFO("%s: size = %7.2f MiB (%.1f%% of %.2f MiB), ratio = %.3f, policy = %s, metric = %s, "
            "cells per head = %u recent + %u .. %u kept, %u layers x %u heads, %u sequences\n", __func__,
            kv.size()/1024.0/1024.0, 100.0*kv.size()/size_stock(), size_stock()/1024.0/1024.0, params.ratio,
            params.policy == LLAMA_LUKV_POLICY_CAPACITY ? "capacity" : "prefill", params.metric.c_str(), n_room_all,
            *std::min_element(n_owned.begin(), n_owned.end()), *std::max_element(n_owned.begin(), n_owned.end()),
            params.n_layer, params.n_head_kv, n_seq_max);
}

llama_kv_cache_lukv::~llama_kv_cache_lukv() {
    if (n_tokens_all > 0) {
        LLAMA_LOG_INFO("%s: %" PRId64 " tokens, %" PRId64 " evictions of %" PRId64 " cells, %.2f ms for commits, %.2f MiB instead of %.2f MiB\n", __func__,
                n_tokens_all, n_evictions, n_evicted, t_commit_us/1000.0, kv.size()/1024.0/1024.0, size_stock()/1024.0/1024.0);
    }
}

uint64_t llama_kv_cache_lukv::size_stock() const {
    return uint64_t(kv_size)*n_heads()*(
            ggml_row_size(type_k, model.hparams.n_embd_head_k()) + ggml_row_size(type_v, model.hparams.n_embd_head_v()));
}

uint64_t llama_kv_cache_lukv::size() const {
    uint64_t res = kv.size() + queries->size();
    for (const auto & [_, t] : wo_copies) {
        res += ggml_nbytes(t);
    }
    return res;
}

// repacked weights, e.g. for the CPU: their rows have no order that others know
void llama_kv_cache_lukv::alloc_wo_copies() {
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctx_map;

    for (const auto & layer : kv.layers) {
        ggml_tensor * wo = model.layers[layer.il].wo;
        if (!wo->buffer || model.hparams.no_alloc) {
            continue;
        }

        ggml_context_ptr ctx_cast { ggml_init({ 2*ggml_tensor_overhead(), nullptr, true }) };

        ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(wo->buffer));
        if (!dev || ggml_backend_dev_supports_op(dev, ggml_cast(ctx_cast.get(), wo, GGML_TYPE_F32))) {
            continue;
        }

        auto & ctx = ctx_map[ggml_backend_dev_buffer_type(dev)];
        if (!ctx) {
            ctx.reset(ggml_init({ kv.layers.size()*ggml_tensor_overhead(), nullptr, true }));
        }
        wo_copies[layer.il] = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, wo->ne[0], wo->ne[1]);
    }

    for (auto & [buft, ctx] : ctx_map) {
        ggml_backend_buffer_t buf = ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft);
        if (!buf) {
            throw std::runtime_error("failed to allocate buffer for W_O");
        }

        LLAMA_LOG_INFO("%s: %10s W_O buffer size = %8.2f MiB\n", __func__, ggml_backend_buffer_name(buf), ggml_backend_buffer_get_size(buf)/1024.0/1024.0);

        ctxs_bufs_wo.emplace_back(std::move(ctx), buf);
    }
}

uint64_t llama_kv_cache_lukv::kv_storage::size() const {
    uint64_t res = 0;
    for (const auto & layer : layers) {
        for (ggml_tensor * t : layer.tensors()) {
            res += ggml_nbytes(t);
        }
    }
    return res;
}

std::vector<ggml_tensor *> llama_kv_cache_lukv::kv_layer::tensors() const {
    std::vector<ggml_tensor *> res = { k, v };
    for (ggml_tensor * t : { norms, past, attn_sums }) {
        if (t) {
            res.push_back(t);
        }
    }
    return res;
}

ggml_backend_dev_t llama_kv_cache_lukv::get_dev(int32_t il) const {
    return cparams.offload_kqv ? model.dev_layer(il) : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

llama_kv_cache_lukv::layer_ops llama_kv_cache_lukv::get_ops(int32_t il) const {
    const auto & hparams = model.hparams;

    ggml_backend_dev_t dev = get_dev(il);

    // what the other side of RPC supports is not known
    if (strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev)), "RPC") == 0) {
        return {};
    }

    ggml_context_ptr ctx { ggml_init({
        /*.mem_size   =*/ 64*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    }) };

    ggml_tensor * q    = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, hparams.n_embd_head_k(il), hparams.n_head(il), 1);
    ggml_tensor * k    = ggml_new_tensor_2d(ctx.get(), type_k, hparams.n_embd_head_k(il), N_RECENT_PAD);
    ggml_tensor * v    = ggml_new_tensor_2d(ctx.get(), type_v, hparams.n_embd_head_v(il), N_RECENT_PAD);
    ggml_tensor * segs = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 2, params.n_head_kv);
    ggml_tensor * n_hidden = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, 1);

    ggml_tensor * anchors = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, hparams.n_embd_head_k(il), params.n_head_kv);

    ggml_tensor * scores = ggml_keydiff_ragged(ctx.get(), k, segs, anchors);

    layer_ops res;
    const auto has_attn = [&](uint32_t n_rot_k, uint32_t n_rot_v) {
        return ggml_backend_dev_supports_op(dev, ggml_flash_attn_ragged(ctx.get(), q, k, v, segs, n_hidden, nullptr, 1.0f, 0.0f, n_rot_k, n_rot_v));
    };
    res.rotate = has_attn(rot_k, rot_v);
    res.attn   = res.rotate || has_attn(0, 0);
    res.store  = ggml_backend_dev_supports_op(dev, ggml_store_ragged(ctx.get(),
            ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, k->ne[0], params.n_head_kv, 1),
            ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, v->ne[0], params.n_head_kv, 1),
            k, v, ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, params.n_head_kv), rot_k, rot_v));
    res.score  = ggml_backend_dev_supports_op(dev, scores) && metric.name == "keydiff";
    res.select = ggml_backend_dev_supports_op(dev, ggml_bottom_k_ragged(ctx.get(), scores,
            ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 3, params.n_head_kv), 1));

    res.scores = ggml_backend_dev_supports_op(dev, ggml_attn_sums_ragged(ctx.get(), q, k, segs, n_hidden, scores, 1.0f, 0.0f));

    const auto new_i32 = [&](int64_t ne0, int64_t ne1) { return ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, ne0, ne1); };
    const auto new_f32 = [&](int64_t ne0, int64_t ne1) { return ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, ne0, ne1); };

    // a GPU may have these alone
    res.layer = res.scores;
    if (metric.expected_only) {
        ggml_tensor * cells = new_i32(3, params.n_head_kv);
        ggml_tensor * cov   = needs.q_cov ? ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, k->ne[0], k->ne[0], q->ne[1]) : nullptr;

        res.layer = ggml_backend_dev_supports_op(dev, ggml_expected_scores_ragged(ctx.get(), new_f32(q->ne[0], q->ne[1]), cov, k,
                    params.metric_params.at("vnorm") > 0 ? v : nullptr, cells, new_i32(k->ne[1], 1), params.n_head_kv, k->ne[1], 0, 0.0f, 1.0f)) &&
            ggml_backend_dev_supports_op(dev, ggml_critical_scores_ragged(ctx.get(), scores, nullptr, cells, new_i32(params.n_head_kv, 1), k->ne[1], 0.0f, 0.0f));
    }
    res.query_sums = ggml_backend_dev_supports_op(dev, ggml_query_sums_ragged(ctx.get(), q, new_f32(1, 1), ggml_reshape_1d(ctx.get(), new_i32(1, 1), 1),
            new_f32(q->ne[0]*q->ne[1], 1), needs.q_cov ? new_f32(q->ne[0]*q->ne[0]*q->ne[1], 1) : nullptr));

    // without it the accumulated attention needs the mask that other ops have
    res.attn = res.attn && (res.scores || !needs.attn_sums);

    ggml_tensor * x = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, N_RECENT_PAD, N_RECENT_PAD);
    res.out_prod = ggml_backend_dev_supports_op(dev, ggml_out_prod(ctx.get(), x, x));

    // long ubatches: stock's attention on the CPU works on tiles of queries
    if (ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU) {
        res.n_tokens_attn = N_UBATCH_DECODE;
    }

    return res;
}

std::vector<uint32_t> llama_kv_cache_lukv::n_owned_all() const {
    if (params.policy == LLAMA_LUKV_POLICY_PREFILL) {
        return std::vector<uint32_t>(params.budget.size(), kv_size);
    }

    return params.get_n_cells(kv_size);
}

std::vector<uint32_t> llama_kv_cache_lukv::n_kept_all() const {
    auto res = n_owned_all();

    // each sequence keeps its protected cells, and what it owns is rounded: but no more cells than there are tokens
    for (auto & n : res) {
        n = std::max(n, std::min(kv_size, n + (n_seq_max - 1)*(params.n_cells_min() + 2)));
    }
    return res;
}

llama_kv_cache_lukv::kv_storage llama_kv_cache_lukv::alloc(const std::vector<uint32_t> & n_rows, const std::vector<uint32_t> & n_owned) const {
    const auto & hparams = model.hparams;

    struct buft_comparator {
        bool operator()(const ggml_backend_buffer_type_t & lhs, const ggml_backend_buffer_type_t & rhs) const {
            return strcmp(ggml_backend_buft_name(lhs), ggml_backend_buft_name(rhs)) < 0;
        }
    };
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr, buft_comparator> ctx_map;

    kv_storage res;
    res.layers.resize(params.n_layer);

    for (const auto & [il, i] : map_layer_ids) {
        res.layers[i].il = il;
    }

    size_t i_head = 0;

    for (auto & layer : res.layers) {
        const uint32_t il = layer.il;

        ggml_backend_buffer_type_t buft = ggml_backend_dev_buffer_type(get_dev(il));

        auto & ctx = ctx_map[buft];
        if (!ctx) {
            ctx.reset(ggml_init({
                /*.mem_size   =*/ 5u*params.n_layer*ggml_tensor_overhead(),
                /*.mem_buffer =*/ nullptr,
                /*.no_alloc   =*/ true,
            }));
            if (!ctx) {
                throw std::runtime_error("failed to create ggml context for kv cache");
            }
        }

        uint32_t n_rows_layer = 0;
        for (uint32_t ih = 0; ih < params.n_head_kv; ++ih, ++i_head) {
            layer.pools.push_back({ n_rows_layer, n_rows[i_head], n_owned[i_head] });

            n_rows_layer += n_rows[i_head];
        }

        layer.k = ggml_new_tensor_2d(ctx.get(), type_k, hparams.n_embd_head_k(il), n_rows_layer);
        layer.v = ggml_new_tensor_2d(ctx.get(), type_v, hparams.n_embd_head_v(il), n_rows_layer);
        ggml_format_name(layer.k, "cache_k_l%d", il);
        ggml_format_name(layer.v, "cache_v_l%d", il);

        const auto new_numbers = [&](bool needed, const char * name) {
            ggml_tensor * res = needed ? ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, 1, n_rows_layer) : nullptr;
            if (res) {
                ggml_format_name(res, name, il);
            }
            return res;
        };
        layer.norms = new_numbers(needs.out_norms, "cache_norms_l%d");
        layer.past  = new_numbers(needs.past,      "cache_past_l%d");
        layer.attn_sums = new_numbers(needs.attn_sums, "cache_attn_sums_l%d");
    }

    for (auto & [buft, ctx] : ctx_map) {
        ggml_backend_buffer_t buf;
        if (hparams.no_alloc) {
            buf = ggml_backend_buft_alloc_buffer(buft, /*size =*/ 0); // dummy buffer
            for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t != nullptr; t = ggml_get_next_tensor(ctx.get(), t)) {
                t->buffer = buf; // so that the backend scheduler won't try to allocate it
            }
        } else {
            buf = ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft);
        }
        if (!buf) {
            throw std::runtime_error("failed to allocate buffer for kv cache");
        }

        LLAMA_LOG_INFO("%s: %10s KV buffer size = %8.2f MiB\n", __func__, ggml_backend_buffer_name(buf), ggml_backend_buffer_get_size(buf)/1024.0/1024.0);

        // unused cells are masked, but they are read: no NaNs
        ggml_backend_buffer_clear(buf, 0);

        res.ctxs_bufs.emplace_back(std::move(ctx), buf);
    }

    return res;
}

std::vector<llama_ubatch> llama_kv_cache_lukv::split(llama_batch_allocr & balloc, uint32_t n_ubatch) const {
    const llama_batch & batch = balloc.get_batch();

    const auto parts = parts_of(batch);

    // -1 for an empty sequence
    const auto find = [&](llama_seq_id id) { return seqs.count(get_source(id)) > 0 ? get_source(id) : -1; };

    std::map<int32_t, uint32_t> n_left; // tokens of each part

    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        const llama_seq_id id   = batch.seq_id[i][0];
        const int32_t      part = parts.at(id);

        bool same = batch.n_seq_id[i] == batch.n_seq_id[part];
        for (int32_t s = 1; s < batch.n_seq_id[i]; ++s) {
            same = same && parts.at(batch.seq_id[i][s]) == part && find(batch.seq_id[i][s]) == find(id);
        }
        if (!same) {
            LLAMA_LOG_ERROR("%s: LU-KV takes tokens of several sequences only if these have all their tokens in common so far and in the batch, "
                    "else copy the sequence (llama_memory_seq_cp)\n", __func__);
            return {};
        }
        // as stock
        if (batch.n_seq_id[i] > 1 && !cparams.kv_unified) {
            LLAMA_LOG_ERROR("%s: tokens of several sequences need a unified KV cache (--kv-unified)\n", __func__);
            return {};
        }
        n_left[part]++;
    }

    uint32_t n_live = seqs.size() + twins.size();
    for (const auto & [id, _] : parts) {
        n_live += find(id) < 0;
    }
    if (n_live > n_seq_max) {
        LLAMA_LOG_WARN("%s: %u sequences do not fit into a cache for %u\n", __func__, n_live, n_seq_max);
        return {};
    }

    if (!has_room(parts, batch.n_tokens)) {
        return {};
    }

    // several sequences at once are for the op that knows them: all of the batch, or tokens that are generated beside a prompt
    const uint32_t n_equal = params.policy == LLAMA_LUKV_POLICY_PREFILL ? 0 : n_tokens_ragged();

    n_ubatch = std::min(n_ubatch, n_recent_max);

    balloc.split_reset();

    std::vector<llama_ubatch> res;
    while (!n_left.empty()) {
        uint32_t n_min = n_ubatch;
        for (const auto & [_, n] : n_left) {
            n_min = std::min(n_min, n);
        }

        const bool equal = n_left.size() > 1 && n_left.size() <= n_ubatch && (n_equal >= n_ubatch || n_left.size()*n_min <= n_equal);

        auto ubatch = equal ? balloc.split_equal(std::min(n_ubatch, n_equal), !cparams.kv_unified, 0) : balloc.split_seq(n_ubatch);
        if (ubatch.n_tokens == 0) {
            return {};
        }

        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            const auto it = n_left.find(parts.at(ubatch.seq_id[i][0]));
            if (--it->second == 0) {
                n_left.erase(it);
            }
        }

        res.push_back(std::move(ubatch)); // NOLINT
    }

    return res;
}

llama_memory_context_ptr llama_kv_cache_lukv::init_batch(
            llama_batch_allocr & balloc,
            uint32_t n_ubatch,
            bool embd_all) {
    GGML_UNUSED(embd_all);

    auto ubatches = split(balloc, n_ubatch);
    if (ubatches.empty()) {
        return std::make_unique<llama_kv_cache_lukv_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }

    return std::make_unique<llama_kv_cache_lukv_context>(this, std::move(ubatches));
}

llama_memory_context_ptr llama_kv_cache_lukv::init_full() {
    return std::make_unique<llama_kv_cache_lukv_context>(this);
}

llama_memory_context_ptr llama_kv_cache_lukv::init_update(llama_context * lctx, bool optimize) {
    GGML_UNUSED(optimize);

    this->lctx = lctx;

    return std::make_unique<llama_kv_cache_lukv_context>(LLAMA_MEMORY_STATUS_NO_UPDATE);
}

bool llama_kv_cache_lukv::get_can_shift() const {
    return false;
}

uint32_t llama_kv_cache_lukv::n_nodes_extra() const {
    const uint32_t n_nodes_queries = queries->active() ? (N_NODES_QUERIES + N_NODES_QUERIES_SEQ*n_seq_max)*params.n_layer : 0;

    return (N_NODES_HEAD + (needs.attn_sums ? N_NODES_ATTN_SUMS : 0))*n_heads() + n_nodes_queries;
}

void llama_kv_cache_lukv::clear(bool data) {
    seqs.clear();
    twins.clear();
    version++;

    if (data) {
        for (auto & [_, buf] : kv.ctxs_bufs) {
            ggml_backend_buffer_clear(buf.get(), 0);
        }
    }
}

void llama_kv_cache_lukv::remove(kv_seq & seq, llama_pos p0, llama_pos p1) {
    const auto remove_from = [&](std::vector<llama_pos> & cells) {
        for (auto & pos : cells) {
            if (pos >= p0 && pos < p1) {
                pos = -1;
                seq.has_holes = true;
            }
        }
    };

    remove_from(seq.pos_recent);
    for (auto & seg : seq.segs) {
        remove_from(seg.pos);
    }

    queries->remove(seq.queries, p0, p1);

    // the logical range. some of its cells may have been evicted from every head
    if (p1 > seq.pos_max) {
        seq.pos_max = p0 - 1;
    } else if (p0 <= seq.pos_min) {
        seq.pos_min = p1;
    }
}

bool llama_kv_cache_lukv::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    p0 = std::max(p0, 0);
    if (p1 < 0) {
        p1 = std::numeric_limits<llama_pos>::max();
    }

    // all of a twin: the cells are those of the others from now on. a part of it: a copy
    const llama_seq_id source = get_source(seq_id);
    const auto twin = std::find_if(twins.begin(), twins.end(), [&](const auto & t) { return t.second == source; });
    if (twin != twins.end()) {
        const kv_seq & seq = seqs.at(source);

        if (p0 >= p1 || p0 > seq.pos_max || p1 <= seq.pos_min) {
            return true;
        }
        if (p0 <= seq.pos_min && p1 > seq.pos_max) {
            if (twins.erase(seq_id) == 0) {
                hand_over(seq_id, twin->first);
            }
            return true;
        }
        if (!separate({ { seq_id, 0 } })) {
            return false;
        }
    }

    for (auto it = seqs.begin(); it != seqs.end(); ) {
        auto & [id, seq] = *it;

        const bool has_range = (seq_id < 0 || id == seq_id) && p0 < p1 && p0 <= seq.pos_max && p1 > seq.pos_min;

        if (has_range && p0 <= seq.pos_min && p1 > seq.pos_max) {
            it = seqs.erase(it);
            version++;
            continue;
        }
        if (has_range) {
            remove(seq, p0, p1);
        }
        ++it;
    }
    for (auto it = twins.begin(); it != twins.end(); ) {
        it = seqs.count(it->second) > 0 ? std::next(it) : twins.erase(it);
    }

    return true;
}

void llama_kv_cache_lukv::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    const llama_seq_id source = get_source(seq_id_src);

    if (seq_id_src == seq_id_dst || seqs.count(source) == 0) {
        return;
    }
    if (seqs.count(get_source(seq_id_dst)) > 0) {
        LLAMA_LOG_ERROR("%s: LU-KV copies a sequence only to an empty one, remove %d first\n", __func__, seq_id_dst);
        return;
    }
    if (seqs.size() + twins.size() >= n_seq_max) {
        LLAMA_LOG_ERROR("%s: %u sequences are in use already\n", __func__, n_seq_max);
        return;
    }

    const kv_seq & src = seqs.at(source);

    p0 = std::max(p0, src.pos_min);
    p1 = p1 < 0 ? src.pos_max + 1 : std::min(p1, src.pos_max + 1);
    if (p0 < p1) {
        copy({ { seq_id_dst, source } }, p0, p1);
    }
}

bool llama_kv_cache_lukv::copy(const sources_t & sources, llama_pos p0, llama_pos p1) {
    const auto in_range = [&](llama_pos pos) { return pos >= p0 && pos < p1; };

    const auto copy_pos = [&](std::vector<llama_pos> & pos) {
        pos.erase(std::remove_if(pos.begin(), pos.end(), [&](llama_pos p) { return !in_range(p); }), pos.end());
    };

    std::map<llama_seq_id, kv_seq> added;
    for (const auto & [id, source] : sources) {
        auto & dst = added[id] = seqs.at(source);
        dst.pos_min   = std::max(dst.pos_min, p0);
        dst.pos_max   = std::min(dst.pos_max, p1 - 1);
        dst.has_holes = false;

        copy_pos(dst.pos_recent);
        for (auto & seg : dst.segs) {
            copy_pos(seg.pos);
        }
    }

    if (!add_seqs(std::move(added), false)) {
        LLAMA_LOG_ERROR("%s: failed to copy the sequence %d\n", __func__, sources.begin()->second);
        return false;
    }

    row_copier copy_rows(*this);

    for (const auto & [id, source] : sources) {
        const kv_seq & src = seqs.at(source);
              kv_seq & dst = seqs.at(id);

        queries->copy(src.queries, dst.queries, dst.pos_min, dst.pos_max + 1);

        for_each_head([&](const kv_layer & layer, uint32_t, size_t i) {
            std::vector<llama_pos> cells = src.segs[i].pos;
            cells.insert(cells.end(), src.pos_recent.begin(), src.pos_recent.end());

            // runs of cells to be copied
            uint32_t dst_row = dst.segs[i].offs;
            for (uint32_t first = 0, last = 0; first < cells.size(); first = last) {
                const bool copied = in_range(cells[first]);
                while (last < cells.size() && in_range(cells[last]) == copied) {
                    last++;
                }
                if (copied) {
                    for (ggml_tensor * t : layer.tensors()) {
                        copy_rows(t, src.segs[i].offs + first, t, dst_row, last - first);
                    }
                    dst_row += last - first;
                }
            }
        });
    }

    return true;
}

void llama_kv_cache_lukv::seq_keep(llama_seq_id seq_id) {
    if (twins.count(seq_id) > 0) {
        hand_over(twins.at(seq_id), seq_id);
    }
    twins.clear();

    for (auto it = seqs.begin(); it != seqs.end(); ) {
        it = it->first == seq_id ? std::next(it) : seqs.erase(it);
    }
    version++;
}

void llama_kv_cache_lukv::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    seq_id = get_source(seq_id);

    for (const auto & [id, seq] : seqs) {
        if ((seq_id < 0 || id == seq_id) && shift != 0 && p0 <= seq.pos_max && p0 != p1) {
            LLAMA_LOG_ERROR("%s: LU-KV does not shift positions, see llama_memory_can_shift()\n", __func__);
            return;
        }
    }
}

void llama_kv_cache_lukv::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    if (d != 1) {
        seq_add(seq_id, p0, p1, 1);
    }
}

llama_pos llama_kv_cache_lukv::seq_pos_min(llama_seq_id seq_id) const {
    const auto it = seqs.find(get_source(seq_id));
    return it == seqs.end() ? -1 : it->second.pos_min;
}

llama_pos llama_kv_cache_lukv::seq_pos_max(llama_seq_id seq_id) const {
    const auto it = seqs.find(get_source(seq_id));
    return it == seqs.end() ? -1 : it->second.pos_max;
}

std::map<ggml_backend_buffer_type_t, size_t> llama_kv_cache_lukv::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;
    for (const auto & [ctx, buf] : kv.ctxs_bufs) {
        ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(buf.get());

        if (model.hparams.no_alloc) {
            res[buft] += ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft);
        } else {
            res[buft] += ggml_backend_buffer_get_size(buf.get());
        }
    }
    for (const auto & [buft, size] : queries->memory_breakdown()) {
        res[buft] += size;
    }
    for (const auto & [_, buf] : ctxs_bufs_wo) {
        res[ggml_backend_buffer_get_type(buf.get())] += ggml_backend_buffer_get_size(buf.get());
    }

    return res;
}

uint32_t llama_kv_cache_lukv::get_n_owned(int32_t il, uint32_t ih) const {
    return get_layer(il).pools[ih].n_owned;
}

uint32_t llama_kv_cache_lukv::get_n_used(int32_t il, uint32_t ih) const {
    uint32_t res = 0;
    for (const auto & [id, _] : seqs) {
        res += get_n_used(id, il, ih);
    }
    return res;
}

const llama_kv_cache_lukv::kv_segment & llama_kv_cache_lukv::get_seg(llama_seq_id seq_id, int32_t il, uint32_t ih) const {
    return seqs.at(get_source(seq_id)).segs[map_layer_ids.at(il)*params.n_head_kv + ih];
}

uint32_t llama_kv_cache_lukv::get_n_owned(llama_seq_id seq_id, int32_t il, uint32_t ih) const {
    return seqs.count(get_source(seq_id)) > 0 ? get_seg(seq_id, il, ih).n_owned : 0;
}

uint32_t llama_kv_cache_lukv::get_n_used(llama_seq_id seq_id, int32_t il, uint32_t ih) const {
    const auto it = seqs.find(get_source(seq_id));
    if (it == seqs.end()) {
        return 0;
    }

    const auto & pos        = get_seg(seq_id, il, ih).pos;
    const auto & pos_recent = it->second.pos_recent;

    if (!it->second.has_holes) {
        return pos.size() + pos_recent.size();
    }

    const auto is_used = [](llama_pos p) { return p >= 0; };

    return std::count_if(pos.begin(), pos.end(), is_used) + std::count_if(pos_recent.begin(), pos_recent.end(), is_used);
}

std::vector<llama_pos> llama_kv_cache_lukv::get_positions(llama_seq_id seq_id, int32_t il, uint32_t ih) const {
    if (seqs.count(get_source(seq_id)) == 0) {
        return {};
    }

    std::vector<llama_pos> res = get_seg(seq_id, il, ih).pos;

    const auto & pos_recent = seqs.at(get_source(seq_id)).pos_recent;

    res.insert(res.end(), pos_recent.begin(), pos_recent.end());
    res.erase(std::remove(res.begin(), res.end(), -1), res.end());
    std::sort(res.begin(), res.end());

    return res;
}

bool llama_kv_cache_lukv::is_evicted(llama_seq_id seq_id) const {
    const auto it = seqs.find(get_source(seq_id));
    return it != seqs.end() && it->second.prefill_done;
}

//
// twins
//

llama_seq_id llama_kv_cache_lukv::get_source(llama_seq_id seq_id) const {
    const auto it = twins.find(seq_id);
    return it == twins.end() ? seq_id : it->second;
}

llama_kv_cache_lukv::seq_ids_t llama_kv_cache_lukv::seq_ids_of(const llama_ubatch & ubatch) const {
    seq_ids_t res;
    for (uint32_t i = 0; i < ubatch.n_tokens; i += ubatch.n_seq_tokens) {
        // of empty sequences the first one gets the cells
        res.push_back(get_source(*std::min_element(ubatch.seq_id[i], ubatch.seq_id[i] + ubatch.n_seq_id[i])));
    }
    return res;
}

template <typename T>
llama_kv_cache_lukv::parts_t llama_kv_cache_lukv::parts_of(const T & batch) {
    parts_t res;
    for (int32_t i = 0; i < (int32_t) batch.n_tokens; ++i) {
        for (int32_t s = 0; s < batch.n_seq_id[i]; ++s) {
            res.emplace(batch.seq_id[i][s], i);
        }
    }
    return res;
}

llama_kv_cache_lukv::sources_t llama_kv_cache_lukv::get_owners(const parts_t & parts) const {
    const auto part_of = [&](llama_seq_id id) {
        const auto it = parts.find(id);
        return it == parts.end() ? -1 : it->second;
    };

    std::map<std::pair<llama_seq_id, int32_t>, llama_seq_id> owners; // of the cells of a source, for a part

    sources_t res;
    for (const auto & [id, source] : twins) {
        owners.emplace(std::make_pair(source, part_of(source)), source);

        res[id] = owners.emplace(std::make_pair(source, part_of(id)), id).first->second;
    }
    return res;
}

bool llama_kv_cache_lukv::has_room(const parts_t & parts, uint32_t n_tokens) const {
    // the other policy evicts instead
    if (params.policy != LLAMA_LUKV_POLICY_PREFILL) {
        return true;
    }

    for (const auto & [_, seq] : seqs) {
        n_tokens += seq.n_tokens();
    }
    for (const auto & [id, owner] : get_owners(parts)) {
        n_tokens += owner == id ? seqs.at(twins.at(id)).n_tokens() : 0;
    }
    return n_tokens <= kv_size;
}

bool llama_kv_cache_lukv::separate(const parts_t & parts) {
    sources_t copies;
    sources_t twins_new;
    for (const auto & [id, owner] : get_owners(parts)) {
        if (owner == id) {
            copies[id] = twins.at(id);
        } else {
            twins_new[id] = owner;
        }
    }
    if (copies.empty()) {
        return true;
    }

    if (!has_room(parts, 0)) {
        LLAMA_LOG_ERROR("%s: a context of %u tokens has no room for a copy of the sequence %d\n", __func__, kv_size, copies.begin()->second);
        return false;
    }
    if (!copy(copies, 0, std::numeric_limits<llama_pos>::max())) {
        return false;
    }
    twins = std::move(twins_new);

    return true;
}

bool llama_kv_cache_lukv::apply_batch(const std::vector<llama_ubatch> & ubatches) {
    if (twins.empty()) {
        return true;
    }

    parts_t  parts;
    uint32_t n_tokens = 0;
    for (const auto & ubatch : ubatches) {
        for (const auto & [id, i] : parts_of(ubatch)) {
            parts.emplace(id, n_tokens + i);
        }
        n_tokens += ubatch.n_tokens;
    }
    return separate(parts);
}

void llama_kv_cache_lukv::hand_over(llama_seq_id seq_id, llama_seq_id twin) {
    auto node = seqs.extract(seq_id);
    node.key() = twin;
    seqs.insert(std::move(node));
    version++;

    twins.erase(twin);
    for (auto & [_, source] : twins) {
        if (source == seq_id) {
            source = twin;
        }
    }
}

//
// sharing of the cells
//

std::map<llama_seq_id, uint32_t> llama_kv_cache_lukv::get_quotas(const seq_ids_t & ids, uint32_t n) const {
    std::map<llama_seq_id, uint64_t> n_tokens;

    uint64_t size = kv_size;

    // policy prefill: a sequence that has been evicted has what it keeps
    for (const auto & [id, seq] : seqs) {
        if (seq.prefill_done) {
            size -= std::min<uint64_t>(size, seq.n_tokens());
        } else {
            n_tokens[id] = seq.n_tokens();
        }
    }
    for (llama_seq_id id : ids) {
        const auto it = seqs.find(id);
        if (it == seqs.end() || !it->second.prefill_done) {
            n_tokens[id] += n;
        }
    }

    uint64_t sum = 0;
    for (const auto & [_, n_seq] : n_tokens) {
        sum += n_seq;
    }

    std::map<llama_seq_id, uint32_t> res;
    for (const auto & [id, n_seq] : n_tokens) {
        res[id] = std::max(size*n_seq/sum, std::min<uint64_t>(n_seq, params.n_cells_min()));
    }
    return res;
}

bool llama_kv_cache_lukv::wants_quota(const kv_seq & seq, uint32_t quota_new) const {
    const uint32_t quota    = seq.quota;
    const uint32_t n_tokens = seq.n_tokens();

    if (quota_new <= quota) {
        return false;
    }

    // the moves of a new layout cost as much as the cache is large: they have to be worth it,
    // unless the sequence would have to keep less than its budget although all sequences together have room
    return quota_new >= quota + quota/4 || (n_tokens > quota && (quota_new >= n_tokens || quota_new >= quota + quota/20));
}

std::vector<uint32_t> llama_kv_cache_lukv::n_cells_of(const kv_seq & seq) const {
    std::vector<uint32_t> res;
    for (const auto & seg : seq.segs) {
        res.push_back(seg.pos.size() + seq.pos_recent.size());
    }
    return res;
}

llama_kv_cache_lukv::n_cells_t llama_kv_cache_lukv::n_owned_of(const std::map<llama_seq_id, uint32_t> & quotas) const {
    n_cells_t res;

    for (const auto & [id, seq] : seqs) {
        auto & n_owned = res[id];

        if (params.policy == LLAMA_LUKV_POLICY_CAPACITY) {
            n_owned = params.get_n_cells(quotas.at(id));
        } else if (!seq.prefill_done) {
            n_owned.assign(n_heads(), quotas.at(id));
        } else {
            n_owned = n_cells_of(seq);
            for (auto & n : n_owned) {
                n += N_GROW;
            }
        }
    }

    if (params.policy == LLAMA_LUKV_POLICY_CAPACITY) {
        // the quotas add up, but what they give was rounded, and is never below the minimum
        const auto n_max = n_kept_all();

        for (size_t i = 0; i < n_heads(); ++i) {
            int64_t n_over = -int64_t(n_max[i]);
            for (const auto & [_, n_owned] : res) {
                n_over += n_owned[i];
            }

            while (n_over > 0) {
                const auto largest = std::max_element(res.begin(), res.end(), [&](const auto & a, const auto & b) {
                    return a.second[i] < b.second[i];
                });
                largest->second[i]--;
                n_over--;
            }
        }
    }

    return res;
}

std::vector<uint32_t> llama_kv_cache_lukv::n_rows_of(const n_cells_t & n_owned, const std::map<llama_seq_id, uint32_t> & n_room) const {
    uint32_t n_room_sum = 0;
    for (const auto & [_, n] : n_room) {
        n_room_sum += n;
    }

    std::vector<uint32_t> res(params.budget.size());
    for (const auto & [_, n] : n_owned) {
        for (size_t i = 0; i < res.size(); ++i) {
            res[i] += n[i];
        }
    }

    if (params.policy == LLAMA_LUKV_POLICY_PREFILL && !n_owned.empty()) {
        for (auto & n : res) {
            n += std::max(n_room_all, n_room_sum);
        }
        return res;
    }

    const auto n_kept = n_kept_all();
    for (size_t i = 0; i < res.size(); ++i) {
        res[i] = std::max(res[i] + n_room_sum, n_kept[i] + n_room_all);
    }
    return res;
}

bool llama_kv_cache_lukv::rebalance(const seq_ids_t & ids, uint32_t n) {
    for (llama_seq_id id : ids) {
        seqs[id].segs.resize(n_heads());
    }

    const auto quotas  = get_quotas(ids, n);
    const auto n_owned = n_owned_of(quotas);

    std::vector<eviction> evictions;
    for (auto & [id, seq] : seqs) {
        evictions.push_back({ &seq, n_owned.at(id) });
    }

    if (!evict(evictions) || !set_layout(n_owned, get_rooms(ids))) {
        for (auto it = seqs.begin(); it != seqs.end(); ) {
            it = it->second.pos_max < 0 ? seqs.erase(it) : std::next(it);
        }
        return false;
    }

    for (const auto & [id, quota] : quotas) {
        seqs.at(id).quota = quota;
    }
    is_provisional = false;

    return true;
}

std::map<llama_seq_id, uint32_t> llama_kv_cache_lukv::get_rooms(const seq_ids_t & ids) const {
    std::map<llama_seq_id, uint32_t> res;

    // long ubatches need room, the other sequences a little until their next commit, if there is enough
    const uint32_t n_out = seqs.size() - ids.size();
    const uint32_t n_min = n_out*N_RECENT_DECODE <= n_room_all - n_recent_max ? N_RECENT_DECODE : 0;

    for (const auto & [id, _] : seqs) {
        const bool in = std::find(ids.begin(), ids.end(), id) != ids.end();

        res[id] = in ? (n_room_all - n_out*n_min)/ids.size() : n_min;
    }
    return res;
}

bool llama_kv_cache_lukv::add_seqs(std::map<llama_seq_id, kv_seq> added, bool is_whole) {
    // the cells come after the layout: there is nothing to be moved yet
    seq_ids_t ids;
    for (const auto & [id, seq] : added) {
        auto & cur = seqs[id] = seq;
        cur.pos_recent.clear();
        for (auto & seg : cur.segs) {
            seg.pos.clear();
        }
        ids.push_back(id);
    }

    auto quotas = get_quotas({}, 0);
    auto n_room = get_rooms(ids);
    if (is_whole) {
        for (const auto & [id, seq] : added) {
            if (quotas.count(id) > 0) {
                quotas[id] = seq.quota;
            }
            n_room[id] = seq.n_room;
        }
    }
    auto n_owned = n_owned_of(quotas);

    // as it will be after the next commit, unless there are more cells already: then that commit is due with the next ubatch
    bool fits = n_rows_of(n_owned, n_room) == n_rows_of({}, {});

    std::map<llama_seq_id, uint32_t> n_room_min;
    n_cells_t                        n_owned_min = n_owned;

    for (const auto & [id, cur] : seqs) {
        const auto & seq = added.count(id) > 0 ? added.at(id) : cur;

        const uint32_t n_recent = seq.pos_recent.size();

        n_room_min[id] = std::max<uint32_t>(GGML_PAD(n_recent, N_RECENT_PAD), N_RECENT_DECODE);
        fits = fits && n_recent <= n_room[id];

        for (size_t i = 0; i < n_heads(); ++i) {
            const uint32_t n_kept = seq.segs[i].pos.size();

            n_owned_min[id][i] = std::max(n_owned[id][i], n_kept);
            fits = fits && n_kept <= n_owned[id][i];
        }
    }

    if (!(fits ? set_layout(n_owned, n_room) : set_layout(n_owned_min, n_room_min))) {
        for (llama_seq_id id : ids) {
            seqs.erase(id);
        }
        return false;
    }
    is_provisional = is_provisional || !fits;

    for (auto & [id, seq] : added) {
        auto & cur = seqs.at(id);

        init_queries(cur);
        cur.pos_recent = std::move(seq.pos_recent);
        for (size_t i = 0; i < n_heads(); ++i) {
            cur.segs[i].pos = std::move(seq.segs[i].pos);
        }
    }
    for (const auto & [id, quota] : quotas) {
        seqs.at(id).quota = quota;
    }

    return true;
}

bool llama_kv_cache_lukv::set_layout(const n_cells_t & n_owned, const std::map<llama_seq_id, uint32_t> & n_room) {
    const auto n_rows = n_rows_of(n_owned, n_room);

    bool in_place = true;
    for_each_head([&](const kv_layer & layer, uint32_t ih, size_t i) {
        in_place = in_place && layer.pools[ih].n_rows == n_rows[i];
    });

    std::map<llama_seq_id, std::vector<uint32_t>> offs;

    // the first row of each segment in a storage with such pools
    const auto get_offs = [&](const kv_storage & storage) {
        for (size_t i = 0; i < n_heads(); ++i) {
            uint32_t row = storage.layers[i/params.n_head_kv].pools[i%params.n_head_kv].offs;
            for (const auto & [id, n] : n_owned) {
                offs[id].resize(n_heads());
                offs[id][i] = row;

                row += n[i] + n_room.at(id);
            }
        }
    };

    if (in_place) {
        get_offs(kv);

        cell_moves moves(params.n_layer);
        for (const auto & [id, seq] : seqs) {
            const auto n_cells = n_cells_of(seq);

            for (size_t i = 0; i < n_heads(); ++i) {
                const int32_t src = seq.segs[i].offs;
                const int32_t dst = offs.at(id)[i];

                for (int32_t j = 0; src != dst && j < (int32_t) n_cells[i]; ++j) {
                    moves[i/params.n_head_kv].push_back({ src + j, dst + j });
                }
            }
        }

        // nothing has been computed yet where there is no context: a new allocation then
        const bool none = std::all_of(moves.begin(), moves.end(), [](const auto & m) { return m.empty(); });

        in_place = none || lctx;
        if (in_place && !compute_moves(moves)) {
            return false;
        }
    }

    if (!in_place) {
        // policy prefill: what the sequences own now. capacity: what the budgets give
        auto n_owned_pool = n_owned_all();
        if (params.policy == LLAMA_LUKV_POLICY_PREFILL) {
            std::fill(n_owned_pool.begin(), n_owned_pool.end(), 0);
            for (const auto & [_, n] : n_owned) {
                for (size_t i = 0; i < n_heads(); ++i) {
                    n_owned_pool[i] += n[i];
                }
            }
        }

        kv_storage kv_new;
        try {
            kv_new = alloc(n_rows, n_owned_pool);
        } catch (const std::exception & err) {
            LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
            return false;
        }

        get_offs(kv_new);

        row_copier copy_rows(*this);

        for (const auto & [id, seq] : seqs) {
            const auto n_cells = n_cells_of(seq);

            for (size_t i = 0; i < n_heads(); ++i) {
                const auto & src = kv    .layers[i/params.n_head_kv];
                const auto & dst = kv_new.layers[i/params.n_head_kv];

                for (size_t t = 0; t < src.tensors().size(); ++t) {
                    copy_rows(src.tensors()[t], seq.segs[i].offs, dst.tensors()[t], offs.at(id)[i], n_cells[i]);
                }
            }
        }

        kv = std::move(kv_new);
        version_alloc++;
    }

    for (auto & [id, seq] : seqs) {
        seq.n_room = n_room.at(id);
        for (size_t i = 0; i < n_heads(); ++i) {
            seq.segs[i].offs    = offs.at(id)[i];
            seq.segs[i].n_owned = n_owned.at(id)[i];
        }
    }
    version++;

    return true;
}

//
// llama_kv_cache_lukv_context
//

llama_kv_cache_lukv_context::llama_kv_cache_lukv_context(llama_memory_status status) : status(status) {}

llama_kv_cache_lukv_context::llama_kv_cache_lukv_context(llama_kv_cache_lukv * kv) :
    status(LLAMA_MEMORY_STATUS_SUCCESS), kv(kv) {}

llama_kv_cache_lukv_context::llama_kv_cache_lukv_context(llama_kv_cache_lukv * kv, std::vector<llama_ubatch> ubatches) :
    status(LLAMA_MEMORY_STATUS_SUCCESS), kv(kv), ubatches(std::move(ubatches)) {}

bool llama_kv_cache_lukv_context::next() {
    return ++i_cur < ubatches.size();
}

bool llama_kv_cache_lukv_context::apply() {
    // no ubatches -> this is not a batch processing context
    if (ubatches.empty()) {
        return true;
    }
    return (i_cur > 0 || kv->apply_batch(ubatches)) && kv->apply_ubatch(ubatches[i_cur]);
}

llama_memory_status llama_kv_cache_lukv_context::get_status() const {
    return status;
}

const llama_ubatch & llama_kv_cache_lukv_context::get_ubatch() const {
    return ubatches[i_cur];
}

llama_seq_id llama_kv_cache_lukv_context::get_seq_id() const {
    return ubatches.empty() ? -1 : kv->get_source(ubatches[i_cur].seq_id[0][0]);
}
