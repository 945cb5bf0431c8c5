#include "llama-kv-cache-lukv.h"

#include "llama-context.h"
#include "llama-kv-cache-lukv-iswa.h"
#include "llama-impl.h"
#include "llama-lukv.h"
#include "llama-lukv-state.h"
#include "llama-model.h"

#include "ggml-ragged.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <utility>

// the recent cells are read in multiples of this, so that the graph stays the same while tokens are generated
static constexpr uint32_t N_RECENT_PAD = 64;

// while tokens are generated, commit when there are this many recent ones:
// often enough for the cells read to stay close to the budget, rarely enough for the cost of a commit not to matter
static constexpr uint32_t N_RECENT_DECODE = 64;

// ubatches up to this size count as generation (one token, or a draft to verify)
static constexpr uint32_t N_UBATCH_DECODE = 32;

// policy prefill: cells to grow by once the prompt is evicted
static constexpr uint32_t N_GROW = 512;

// long contexts: recent cells up to this part of the context, but no more than two ubatches
static constexpr uint32_t N_RECENT_FRACTION = 128;

// columns: devices read the mask in words of up to 16 bytes
static constexpr int64_t N_MASK_ALIGN = 8;

// graph nodes for each head: views, permutations, attention and concatenation, or the score and the selection
static constexpr uint32_t N_NODES_HEAD = 24;

// graph nodes for each layer that keep what the metric needs of the queries, and for each sequence of a ubatch
static constexpr uint32_t N_NODES_QUERIES     = 24;
static constexpr uint32_t N_NODES_QUERIES_SEQ = 12;

// nodes of the accumulated attention of a head
static constexpr uint32_t N_NODES_ATTN_SUMS = 24;

// rotations that are computed together
static constexpr uint32_t N_ROTATIONS = 64;

static constexpr uint32_t STATE_MAGIC = 0x6c756b77; // of the format: another one for each change of it

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

// orthonormal Walsh-Hadamard matrix [n, n]
static void fill_rot(float * data, int64_t n) {
    if (n == 0) {
        return;
    }

    // the matrix of twice the size consists of four of these, the last one negative
    data[0] = 1.0f/sqrtf(n);
    for (int64_t m = 1; m < n; m *= 2) {
        for (int64_t i = 0; i < m; ++i) {
            for (int64_t j = 0; j < m; ++j) {
                const float x = data[i*n + j];

                data[ i     *n + m + j] =  x;
                data[(m + i)*n     + j] =  x;
                data[(m + i)*n + m + j] = -x;
            }
        }
    }
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
        /*.mem_size   =*/ 16*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    }) };

    ggml_tensor * q    = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, hparams.n_embd_head_k(il), hparams.n_head(il), 1);
    ggml_tensor * k    = ggml_new_tensor_2d(ctx.get(), type_k, hparams.n_embd_head_k(il), N_RECENT_PAD);
    ggml_tensor * v    = ggml_new_tensor_2d(ctx.get(), type_v, hparams.n_embd_head_v(il), N_RECENT_PAD);
    ggml_tensor * segs = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 2, params.n_head_kv);
    ggml_tensor * n_hidden = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, 1);

    ggml_tensor * scores = ggml_keydiff_ragged(ctx.get(), k, segs);

    layer_ops res;
    res.attn   = ggml_backend_dev_supports_op(dev, ggml_flash_attn_ragged(ctx.get(), q, k, v, segs, n_hidden, nullptr, 1.0f, 0.0f));
    res.score  = ggml_backend_dev_supports_op(dev, scores) && metric.name == "keydiff";
    res.select = ggml_backend_dev_supports_op(dev, ggml_bottom_k_ragged(ctx.get(), scores,
            ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 3, params.n_head_kv), 1));

    res.scores = ggml_backend_dev_supports_op(dev, ggml_attn_sums_ragged(ctx.get(), q, k, segs, n_hidden, scores, 1.0f, 0.0f));

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

    std::map<llama_seq_id, uint32_t> n_left; // tokens of each sequence

    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        if (batch.n_seq_id[i] != 1) {
            LLAMA_LOG_ERROR("%s: LU-KV does not take tokens of several sequences, copy the sequence instead (llama_memory_seq_cp)\n", __func__);
            return {};
        }
        n_left[batch.seq_id[i][0]]++;
    }

    uint32_t n_live = seqs.size();
    for (const auto & [id, _] : n_left) {
        n_live += seqs.count(id) == 0;
    }
    if (n_live > n_seq_max) {
        LLAMA_LOG_WARN("%s: %u sequences do not fit into a cache for %u\n", __func__, n_live, n_seq_max);
        return {};
    }

    // this policy never evicts on its own, so it can be full
    const bool prefill = params.policy == LLAMA_LUKV_POLICY_PREFILL;
    if (prefill) {
        uint32_t n_tokens = batch.n_tokens;
        for (const auto & [_, seq] : seqs) {
            n_tokens += seq.n_tokens();
        }
        if (n_tokens > kv_size) {
            return {};
        }
    }

    // several sequences at once are for the op that knows them: all of the batch, or tokens that are generated beside a prompt
    const uint32_t n_equal = prefill ? 0 : n_tokens_ragged();

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
            const auto it = n_left.find(ubatch.seq_id[i][0]);
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

    return true;
}

void llama_kv_cache_lukv::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    if (seq_id_src == seq_id_dst || seqs.count(seq_id_src) == 0) {
        return;
    }
    if (seqs.count(seq_id_dst) > 0) {
        LLAMA_LOG_ERROR("%s: LU-KV copies a sequence only to an empty one, remove %d first\n", __func__, seq_id_dst);
        return;
    }
    if (seqs.size() >= n_seq_max) {
        LLAMA_LOG_ERROR("%s: %u sequences are in use already\n", __func__, n_seq_max);
        return;
    }

    const kv_seq & src = seqs.at(seq_id_src);

    p0 = std::max(p0, src.pos_min);
    p1 = p1 < 0 ? src.pos_max + 1 : std::min(p1, src.pos_max + 1);
    if (p0 >= p1) {
        return;
    }

    const auto in_range = [&](llama_pos pos) { return pos >= p0 && pos < p1; };

    const auto copy_pos = [&](std::vector<llama_pos> & pos) {
        pos.erase(std::remove_if(pos.begin(), pos.end(), [&](llama_pos p) { return !in_range(p); }), pos.end());
    };

    kv_seq dst = src;
    dst.pos_min   = p0;
    dst.pos_max   = p1 - 1;
    dst.has_holes = false;

    copy_pos(dst.pos_recent);
    for (auto & seg : dst.segs) {
        copy_pos(seg.pos);
    }

    if (!add_seqs({ { seq_id_dst, std::move(dst) } }, false)) {
        LLAMA_LOG_ERROR("%s: failed to copy the sequence %d\n", __func__, seq_id_src);
        return;
    }

    row_copier copy_rows(*this);

    queries->copy(src.queries, seqs.at(seq_id_dst).queries, p0, p1);

    const kv_seq & copy = seqs.at(seq_id_dst);

    for_each_head([&](const kv_layer & layer, uint32_t, size_t i) {
        std::vector<llama_pos> cells = src.segs[i].pos;
        cells.insert(cells.end(), src.pos_recent.begin(), src.pos_recent.end());

        // runs of cells to be copied
        uint32_t dst_row = copy.segs[i].offs;
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

void llama_kv_cache_lukv::seq_keep(llama_seq_id seq_id) {
    for (auto it = seqs.begin(); it != seqs.end(); ) {
        it = it->first == seq_id ? std::next(it) : seqs.erase(it);
    }
    version++;
}

void llama_kv_cache_lukv::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
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
    const auto it = seqs.find(seq_id);
    return it == seqs.end() ? -1 : it->second.pos_min;
}

llama_pos llama_kv_cache_lukv::seq_pos_max(llama_seq_id seq_id) const {
    const auto it = seqs.find(seq_id);
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
    return seqs.at(seq_id).segs[map_layer_ids.at(il)*params.n_head_kv + ih];
}

uint32_t llama_kv_cache_lukv::get_n_owned(llama_seq_id seq_id, int32_t il, uint32_t ih) const {
    return seqs.count(seq_id) > 0 ? get_seg(seq_id, il, ih).n_owned : 0;
}

uint32_t llama_kv_cache_lukv::get_n_used(llama_seq_id seq_id, int32_t il, uint32_t ih) const {
    const auto it = seqs.find(seq_id);
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
    if (seqs.count(seq_id) == 0) {
        return {};
    }

    std::vector<llama_pos> res = get_seg(seq_id, il, ih).pos;

    const auto & pos_recent = seqs.at(seq_id).pos_recent;

    res.insert(res.end(), pos_recent.begin(), pos_recent.end());
    res.erase(std::remove(res.begin(), res.end(), -1), res.end());
    std::sort(res.begin(), res.end());

    return res;
}

template <typename F>
void llama_kv_cache_lukv::for_each_head(const F & f) const {
    size_t i = 0;
    for (const auto & layer : kv.layers) {
        for (uint32_t ih = 0; ih < params.n_head_kv; ++ih) {
            f(layer, ih, i++);
        }
    }
}

// the CPU's if there is none of the device
static ggml_backend_t find_backend(ggml_backend_sched_t sched, ggml_backend_dev_t dev) {
    const int n_backends = ggml_backend_sched_get_n_backends(sched);
    for (int i = 0; i < n_backends; ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_get_device(backend) == dev) {
            return backend;
        }
    }
    return ggml_backend_sched_get_backend(sched, n_backends - 1);
}

// pairwise, so that each row is copied log2(n) times
static ggml_tensor * concat(ggml_context * ctx, std::vector<ggml_tensor *> parts) {
    while (parts.size() > 1) {
        std::vector<ggml_tensor *> pairs;
        for (size_t i = 0; i < parts.size(); i += 2) {
            pairs.push_back(i + 1 < parts.size() ? ggml_concat(ctx, parts[i], parts[i + 1], 0) : parts[i]);
        }
        parts = std::move(pairs);
    }

    return parts[0];
}

//
// sharing of the cells
//

llama_kv_cache_lukv::seq_ids_t llama_kv_cache_lukv::seq_ids_of(const llama_ubatch & ubatch) {
    seq_ids_t res;
    for (uint32_t i = 0; i < ubatch.n_tokens; i += ubatch.n_seq_tokens) {
        res.push_back(ubatch.seq_id[i][0]);
    }
    return res;
}

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
// eviction
//

bool llama_kv_cache_lukv::apply_ubatch(const llama_ubatch & ubatch) {
    const seq_ids_t ids = seq_ids_of(ubatch);

    const uint32_t n = ubatch.n_seq_tokens;

    GGML_ASSERT(ubatch.n_tokens <= n_recent_max);

    if (!compact()) {
        return false;
    }

    const bool prefill = params.policy == LLAMA_LUKV_POLICY_PREFILL;

    // the first token that is generated ends the prompt
    for (llama_seq_id id : ids) {
        if (prefill && n == 1 && seqs.count(id) > 0 && !seqs.at(id).is_repeating && !end_prefill(seqs.at(id))) {
            return false;
        }
    }

    const auto quotas = get_quotas(ids, n);

    bool balance = is_provisional;

    std::vector<eviction> evictions;

    for (llama_seq_id id : ids) {
        if (seqs.count(id) == 0 || n > seqs.at(id).n_room) {
            balance = true;
            continue;
        }

        kv_seq & seq = seqs.at(id);

        const uint32_t n_recent = seq.pos_recent.size();
        const uint32_t n_lim    = n <= N_UBATCH_DECODE && !prefill ? std::min(N_RECENT_DECODE, seq.n_room) : seq.n_room;

        if (n_recent == 0 || n_recent + n <= n_lim) {
            continue;
        }

        bool full = false;

        auto & cur = evictions.emplace_back(eviction { &seq, {} });
        for (const auto & seg : seq.segs) {
            cur.n_keep.push_back(seg.n_owned);

            full = full || seg.pos.size() + n_recent > seg.n_owned;
        }

        balance = balance || (full && (prefill || wants_quota(seq, quotas.at(id))));
    }

    if (balance ? !rebalance(ids, n) : !evict(evictions)) {
        return false;
    }

    for (size_t s = 0; s < ids.size(); ++s) {
        kv_seq & seq = seqs.at(ids[s]);

        if (seq.pos_max < 0) {
            init_queries(seq);
        }
        queries->add(seq.queries, ubatch.pos + s*n, n, seq.pos_min < 0 ? ubatch.pos[s*n] : seq.pos_min);

        for (uint32_t i = s*n; i < (s + 1)*n; ++i) {
            seq.pos_recent.push_back(ubatch.pos[i]);

            seq.pos_max = std::max(seq.pos_max, ubatch.pos[i]);
            if (seq.pos_min < 0) {
                seq.pos_min = ubatch.pos[i];
            }
        }
    }
    n_tokens_all += ubatch.n_tokens;

    return true;
}

bool llama_kv_cache_lukv::end_prefill(kv_seq & seq) {
    if (seq.prefill_done) {
        return true;
    }
    if (needs.repeated && !seq.is_recorded) {
        LLAMA_LOG_ERROR("%s: LU-KV evicts by %s only after the context was repeated, see llama_lukv_seq_kvzip()\n", __func__, params.metric.c_str());
        return false;
    }

    if (!evict({ { &seq, params.get_n_cells(seq.n_tokens()) } })) {
        return false;
    }
    seq.prefill_done = true;

    // give the rest of the memory back
    const auto quotas = get_quotas({}, 0);

    n_cells_t n_owned;
    std::map<llama_seq_id, uint32_t> n_room;

    for (const auto & [id, cur] : seqs) {
        for (const auto & seg : cur.segs) {
            n_owned[id].push_back(&cur == &seq ? seg.pos.size() : cur.prefill_done ? seg.n_owned : quotas.at(id));
        }
        n_room[id] = cur.n_room;
    }

    seq.prefill_done = set_layout(n_owned, n_room);

    return seq.prefill_done;
}

bool llama_kv_cache_lukv::commit(llama_context * lctx) {
    this->lctx = lctx;

    if (!compact()) {
        return false;
    }

    if (params.policy == LLAMA_LUKV_POLICY_PREFILL) {
        for (auto & [_, seq] : seqs) {
            if (!end_prefill(seq)) {
                return false;
            }
        }
        return true;
    }

    if (is_provisional) {
        return rebalance({}, 0);
    }

    std::vector<eviction> evictions;
    for (auto & [_, seq] : seqs) {
        auto & cur = evictions.emplace_back(eviction { &seq, {} });
        for (const auto & seg : seq.segs) {
            cur.n_keep.push_back(seg.n_owned);
        }
    }

    return evict(evictions);
}

// the cells that stay become the first rows of a head: those behind them fill the places of the ones that go
// rows - that go, ascending
// n    - rows in all
// move - called for each cell that has to move, with its old and its new row
template <typename F>
static void plan_moves(const std::vector<int32_t> & rows, int32_t n, const F & move) {
    const int32_t n_new = n - (int32_t) rows.size();

    auto dst  = rows.begin();
    auto gone = std::lower_bound(rows.begin(), rows.end(), n_new);
    for (int32_t src = n_new; src < n; ++src) {
        if (gone != rows.end() && *gone == src) {
            ++gone;
        } else {
            move(src, *dst++);
        }
    }
}

bool llama_kv_cache_lukv::compact() {
    const auto is_hole = [](llama_pos pos) { return pos < 0; };

    cell_moves moves(params.n_layer);

    std::vector<std::pair<kv_seq *, kv_seq>> compacted;

    for (auto & [_, seq] : seqs) {
        if (!seq.has_holes) {
            continue;
        }

        kv_seq seq_new = seq;
        seq_new.has_holes = false;
        seq_new.pos_recent.erase(std::remove_if(seq_new.pos_recent.begin(), seq_new.pos_recent.end(), is_hole), seq_new.pos_recent.end());

        for (size_t i = 0; i < n_heads(); ++i) {
            const auto & seg = seq.segs[i];

            auto & pos = seq_new.segs[i].pos;
            auto & cur = moves[i/params.n_head_kv];

            std::vector<int32_t> holes;
            for (uint32_t j = 0; j < seg.pos.size(); ++j) {
                if (is_hole(seg.pos[j])) {
                    holes.push_back(j);
                }
            }

            plan_moves(holes, pos.size(), [&](int32_t src, int32_t dst) {
                cur.push_back({ (int32_t) seg.offs + src, (int32_t) seg.offs + dst });
                pos[dst] = pos[src];
            });
            pos.resize(pos.size() - holes.size());

            // the recent cells follow the kept ones, in their order
            int32_t src = seg.offs + seg.pos.size();
            int32_t dst = seg.offs + pos.size();
            for (llama_pos p : seq.pos_recent) {
                if (!is_hole(p)) {
                    if (src != dst) {
                        cur.push_back({ src, dst });
                    }
                    dst++;
                }
                src++;
            }
        }

        compacted.emplace_back(&seq, std::move(seq_new));
    }

    if (compacted.empty()) {
        return true;
    }

    if (!compute_moves(moves)) {
        return false;
    }

    for (auto & [seq, seq_new] : compacted) {
        *seq = std::move(seq_new);
    }
    version++;

    return true;
}

std::vector<int32_t> llama_kv_cache_lukv::get_protected(const kv_seq & seq, const kv_segment & seg) const {
    const int32_t n_kept  = seg.pos.size();
    const int32_t n_cells = n_kept + seq.pos_recent.size();

    const auto pos_at    = [&](int32_t i) { return i < n_kept ? seg.pos[i] : seq.pos_recent[i - n_kept]; };
    const auto is_sink   = [&](int32_t i) { return pos_at(i) - seq.pos_min < (llama_pos) params.sink;   };
    const auto is_recent = [&](int32_t i) { return seq.pos_max - pos_at(i) < (llama_pos) params.recent; };

    std::vector<int32_t> res;

    const auto add = [&](int32_t first, int32_t last, const auto & is) {
        // there are not more of them than rows here: if all these are, no others can be
        bool all = true;
        for (int32_t i = first; i < last; ++i) {
            all = all && is(i);
        }
        for (int32_t i = all ? first : 0; i < (all ? last : n_cells); ++i) {
            if (is(i)) {
                res.push_back(i);
            }
        }
    };
    add(0, std::min<int64_t>(params.sink, n_cells), is_sink);
    add(std::max<int64_t>(n_cells - (int64_t) params.recent, 0), n_cells, is_recent);

    return res;
}

bool llama_kv_cache_lukv::evict(const std::vector<eviction> & evictions) {
    const int64_t t_start_us = ggml_time_us();

    std::vector<std::vector<int32_t>> rows;
    if (!compute_norms(evictions) || !compute_evicted(evictions, rows)) {
        return false;
    }

    const int64_t t_selected_us = ggml_time_us();

    uint32_t n_recent = 0;

    cell_moves moves(params.n_layer);
    for (size_t e = 0; e < evictions.size(); ++e) {
        const auto & seq = *evictions[e].seq;

        const auto n_cells = n_cells_of(seq);

        for (size_t i = 0; i < n_heads(); ++i) {
            plan_moves(rows[e*n_heads() + i], n_cells[i], [&](int32_t src, int32_t dst) {
                moves[i/params.n_head_kv].push_back({ (int32_t) seq.segs[i].offs + src, (int32_t) seq.segs[i].offs + dst });
            });
        }
        n_recent += seq.pos_recent.size();
    }

    // the host goes on meanwhile
    if (!compute_moves(moves, true)) {
        return false;
    }

    int64_t n_gone = 0;

    for (size_t e = 0; e < evictions.size(); ++e) {
        auto & seq = *evictions[e].seq;

        for (size_t i = 0; i < n_heads(); ++i) {
            const auto & gone = rows[e*n_heads() + i];

            auto & pos = seq.segs[i].pos;

            pos.insert(pos.end(), seq.pos_recent.begin(), seq.pos_recent.end());
            plan_moves(gone, pos.size(), [&](int32_t src, int32_t dst) {
                pos[dst] = pos[src];
            });
            pos.resize(pos.size() - gone.size());

            n_gone += gone.size();
        }
        seq.pos_recent.clear();
    }

    if (n_recent == 0 && n_gone == 0) {
        return true;
    }

    const int64_t t_end_us = ggml_time_us();

    LLAMA_LOG_DEBUG("%s: %u recent cells, selection %.2f ms, moves %.2f ms\n", __func__, n_recent,
            (t_selected_us - t_start_us)/1000.0, (t_end_us - t_selected_us)/1000.0);

    t_commit_us += t_end_us - t_start_us;

    n_evictions += n_gone > 0;
    n_evicted   += n_gone;
    version++;

    return true;
}

// a graph of the cache's own, apart from the one of the model: that one stays allocated and can be reused
class llama_kv_cache_lukv::commit_graph {
public:
    commit_graph(llama_kv_cache_lukv & kv, size_t max_nodes) : kv(kv) {
        ctx.reset(ggml_init({
            /*.mem_size   =*/ ggml_tensor_overhead()*max_nodes + ggml_graph_overhead_custom(max_nodes, false),
            /*.mem_buffer =*/ nullptr,
            /*.no_alloc   =*/ true,
        }));
        gf = ggml_new_graph_custom(ctx.get(), max_nodes, false);

        auto * sched = kv.lctx->get_sched();
        if (kv.sched && max_nodes <= kv.sched_max_nodes) {
            return;
        }

        std::vector<ggml_backend_t>             backends;
        std::vector<ggml_backend_buffer_type_t> bufts;
        for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
            backends.push_back(ggml_backend_sched_get_backend(sched, i));
            bufts   .push_back(ggml_backend_sched_get_buffer_type(sched, backends.back()));
        }
        kv.sched.reset(ggml_backend_sched_new(backends.data(), bufts.data(), backends.size(), max_nodes, false, false));
        kv.sched_max_nodes = max_nodes;
    }

    // tensors with the data that they get before the graph runs
    template <typename T>
    ggml_tensor * input(ggml_type type, std::vector<T> data, int64_t ne0) {
        GGML_ASSERT(sizeof(T) == ggml_type_size(type));

        ggml_tensor * res = ggml_new_tensor_2d(ctx.get(), type, ne0, data.size()/ne0);
        ggml_set_input(res);
        inputs.emplace_back(res, std::vector<char>((const char *) data.data(), (const char *) (data.data() + data.size())));

        return res;
    }

    // an input on a device as a whole: the views of an input would be copied there one by one
    ggml_tensor * on_device(ggml_tensor * t, ggml_backend_dev_t dev) {
        ggml_tensor * res = ggml_cont(ctx.get(), t);
        if (ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU || !ggml_backend_dev_supports_op(dev, res)) {
            return t;
        }
        devs.emplace_back(res, dev);
        return res;
    }

    void output(ggml_tensor * t) {
        ggml_set_output(t);
        ggml_build_forward_expand(gf, t);
    }

    // async - what is computed next on the same backends sees the results, nobody else
    bool compute(const char * what, bool async = false) {
        auto * sched = kv.sched.get();

        ggml_backend_sched_synchronize(kv.lctx->get_sched());
        ggml_backend_sched_reset(sched);

        for (const auto & [t, dev] : devs) {
            ggml_backend_sched_set_tensor_backend(sched, t, find_backend(sched, dev));
        }

        if (!ggml_backend_sched_alloc_graph(sched, gf)) {
            LLAMA_LOG_ERROR("%s: failed to allocate the graph for the %s\n", __func__, what);
            return false;
        }
        for (const auto & [t, data] : inputs) {
            // not of the queries that a metric does not look at
            if (t->buffer) {
                ggml_backend_tensor_set(t, data.data(), 0, data.size());
            }
        }
        const auto status = ggml_backend_sched_graph_compute_async(sched, gf);
        if (!async) {
            ggml_backend_sched_synchronize(sched);
        }
        if (status != GGML_STATUS_SUCCESS) {
            LLAMA_LOG_ERROR("%s: failed to compute the %s\n", __func__, what);
            return false;
        }
        return true;
    }

    ggml_context_ptr ctx;
    ggml_cgraph    * gf;

    std::vector<std::pair<ggml_tensor *, ggml_backend_dev_t>> devs; // where tensors are computed, nullptr for the CPU

private:
    llama_kv_cache_lukv & kv;

    std::vector<std::pair<ggml_tensor *, std::vector<char>>> inputs;
};

bool llama_kv_cache_lukv::compute_evicted(const std::vector<eviction> & evictions, std::vector<std::vector<int32_t>> & rows) {
    rows.assign(evictions.size()*n_heads(), {});

    // the layers of a model mostly rotate alike
    std::map<std::tuple<llama_lukv_queries::rope_op, float, llama_pos>, std::vector<float>> futures;

    const auto get_future = [&](int32_t il, const kv_seq & seq) -> std::vector<float> & {
        const auto & attn = queries->get_attn(il);
        return futures[{ attn.rope, attn.q_scale, seq.pos_max + 1 }];
    };
    for (size_t e = 0; e < evictions.size() && needs.n_future > 0; ++e) {
        const auto & seq = *evictions[e].seq;

        for (const auto & layer : kv.layers) {
            auto & rows_future = get_future(layer.il, seq);
            if (rows_future.empty() && !compute_future_rotation(layer.il, seq.pos_max + 1, rows_future)) {
                return false;
            }
        }
    }

    commit_graph graph(*this, evictions.size()*(llama_lukv_metric::N_NODES*n_heads() + N_NODES_QUERIES*params.n_layer) + 1024);

    auto * ctx = graph.ctx.get();

    const auto input_f32 = [&](const std::vector<float>   & data, int64_t ne0) { return graph.input(GGML_TYPE_F32, data, ne0); };
    const auto input_i32 = [&](const std::vector<int32_t> & data, int64_t ne0) { return graph.input(GGML_TYPE_I32, data, ne0); };

    const auto input_rot = [&](uint32_t n) -> ggml_tensor * {
        if (!needs.plain || n == 0) {
            return nullptr;
        }
        std::vector<float> data(n*n);
        fill_rot(data.data(), n);

        return input_f32(data, n);
    };
    ggml_tensor * inp_rot_k = input_rot(rot_k);
    ggml_tensor * inp_rot_v = input_rot(rot_v);

    // the scores on a device, and the heads that give up cells: the first row of each in the scores, its cells, and how many go
    struct selection {
        std::vector<ggml_tensor *> scores;
        std::vector<size_t>        heads; // in rows
        std::vector<int32_t>       segs;
        std::vector<int64_t>       rows_prot;

        // the segments of the layers whose scores one op computes
        struct layer_segs {
            size_t        i_score;
            ggml_tensor * k;
            int64_t       first;
            int64_t       n;
        };
        std::vector<layer_segs> layers;
        std::vector<int32_t>    layer_segs_data;

        int64_t n_rows = 0;

        bool          on_device = true;
        ggml_tensor * res       = nullptr;
    };
    std::map<ggml_backend_dev_t, selection> selections;

    for (size_t l = 0; l < kv.layers.size(); ++l) {
        const auto & layer = kv.layers[l];

        auto & cur = selections[get_dev(layer.il)];
        cur.on_device = ops[l].select;

        // with the op the scores of a layer have the rows of K, else each head has its own
        auto & segs = cur.layer_segs_data;

        const int64_t n_segs = segs.size()/2;

        for (size_t e = 0; e < evictions.size(); ++e) {
            const auto & seq = *evictions[e].seq;

            llama_lukv_queries::seq_view view; // made for the first head that needs it
            bool has_view = !queries->active();

            const auto need_view = [&] {
                if (!has_view) {
                    ggml_tensor * rotation = needs.n_future > 0 ? input_f32(get_future(layer.il, seq), layer.k->ne[0]) : nullptr;

                    view     = queries->build_view(ctx, input_i32, seq.queries, layer.il, rotation);
                    has_view = true;
                }
            };

            // all heads of the layer together
            if (ops[l].scores && !ops[l].score) {
                std::vector<llama_lukv_layer_scorer::segment> found;
                for (uint32_t ih = 0; ih < params.n_head_kv; ++ih) {
                    const auto & seg = seq.segs[l*params.n_head_kv + ih];

                    const int32_t n_cells = seg.pos.size() + seq.pos_recent.size();
                    const int32_t n_keep  = evictions[e].n_keep[l*params.n_head_kv + ih];

                    if (n_cells > n_keep) {
                        found.push_back({ (int32_t) ih, (int32_t) seg.offs, n_cells, n_keep });
                    }
                }
                if (found.empty()) {
                    continue;
                }

                need_view();

                llama_lukv_layer_scorer s = get_layer_scorer(seq, l, view, found);
                s.ctx       = ctx;
                s.input_f32 = input_f32;
                s.input_i32 = input_i32;

                if (ggml_tensor * scores = metric.build(s)) {
                    int64_t offs = cur.n_rows;
                    for (const auto & seg : found) {
                        cur.heads.push_back(e*n_heads() + l*params.n_head_kv + seg.ih);
                        cur.segs .insert(cur.segs.end(), { (int32_t) offs, seg.n, seg.n - seg.n_keep });
                        offs += seg.n;
                    }
                    for (int32_t cell : s.prot) {
                        cur.rows_prot.push_back(cur.n_rows + cell);
                    }
                    cur.scores.push_back(ggml_reshape_1d(ctx, scores, s.pos.size()));
                    cur.n_rows += s.pos.size();
                    continue;
                }
            }

            for (uint32_t ih = 0; ih < params.n_head_kv; ++ih) {
                const size_t i   = l*params.n_head_kv + ih;
                const auto & seg = seq.segs[i];

                const int32_t n_cells = seg.pos.size() + seq.pos_recent.size();
                const int32_t n_keep  = evictions[e].n_keep[i];

                if (n_cells <= n_keep) {
                    continue;
                }

                const int64_t offs = cur.n_rows + (ops[l].score ? seg.offs : 0);

                cur.heads.push_back(e*n_heads() + i);
                cur.segs .insert(cur.segs.end(), { (int32_t) offs, n_cells, n_cells - n_keep });
                for (int32_t row : get_protected(seq, seg)) {
                    cur.rows_prot.push_back(offs + row);
                }

                if (ops[l].score) {
                    segs.insert(segs.end(), { (int32_t) seg.offs, n_cells });
                    continue;
                }

                need_view();

                llama_lukv_scorer s = get_scorer(ctx, seq, i, view);
                s.input_f32 = input_f32;
                s.input_i32 = input_i32;
                s.n_keep    = n_keep;
                if (needs.plain) {
                    build_plain(s, inp_rot_k, inp_rot_v);
                }
                s.on_cpu    = [&](ggml_tensor * cur) { graph.devs.emplace_back(cur, nullptr); };
                s.set_past  = [&, dst = s.past](ggml_tensor * cur) { ggml_build_forward_expand(graph.gf, ggml_cpy(ctx, cur, dst)); };

                cur.scores.push_back(ggml_reshape_1d(ctx, metric.build(s), n_cells));
                cur.n_rows += n_cells;
            }
        }

        if ((int64_t) segs.size()/2 > n_segs) {
            cur.layers.push_back({ cur.scores.size(), layer.k, n_segs, (int64_t) segs.size()/2 - n_segs });
            cur.scores.push_back(nullptr);
            cur.n_rows += layer.k->ne[1];
        }
    }

    bool empty = true;

    for (auto & [dev, cur] : selections) {
        if (cur.heads.empty()) {
            continue;
        }
        empty = false;

        if (!cur.layers.empty()) {
            ggml_tensor * segs = graph.on_device(graph.input(GGML_TYPE_I32, cur.layer_segs_data, 2), dev);

            for (const auto & [i_score, k, first, n] : cur.layers) {
                cur.scores[i_score] = ggml_keydiff_ragged(ctx, k, ggml_view_2d(ctx, segs, 2, n, segs->nb[1], first*segs->nb[1]));
            }
        }

        for (ggml_tensor * t : cur.scores) {
            ggml_tensor * base = t->view_src ? t->view_src : t;
            // inputs stay where they are
            if (base->op != GGML_OP_NONE) {
                graph.devs.emplace_back(base, dev);
            }
        }

        // one copy of each, where pairwise concatenation would be several
        ggml_tensor * scores = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, cur.n_rows);
        ggml_set_input(scores);
        graph.devs.emplace_back(scores, dev);

        int64_t n_copied = 0;
        for (ggml_tensor * t : cur.scores) {
            const int64_t n = ggml_nelements(t);

            ggml_build_forward_expand(graph.gf, ggml_cpy(ctx, t, ggml_view_1d(ctx, scores, n, n_copied*scores->nb[0])));
            n_copied += n;
        }

        // after the removal of a tail there may be none
        if (!cur.rows_prot.empty()) {
            const std::vector<float> inf(cur.rows_prot.size(), INFINITY);

            scores = ggml_set_rows(ctx, ggml_reshape_2d(ctx, scores, 1, cur.n_rows),
                    graph.input(GGML_TYPE_F32, inf, 1), graph.input(GGML_TYPE_I64, cur.rows_prot, cur.rows_prot.size()));
            graph.devs.emplace_back(scores, dev); // not where most of the inputs are
        }

        int32_t k_max = 0;
        for (size_t i = 0; i < cur.heads.size(); ++i) {
            k_max = std::max(k_max, cur.segs[3*i + 2]);
        }

        cur.res = ggml_bottom_k_ragged(ctx, scores, graph.input(GGML_TYPE_I32, cur.segs, 3), k_max);
        graph.devs.emplace_back(cur.res, cur.on_device ? dev : nullptr);
        graph.output(cur.res);
    }

    if (empty) {
        return true;
    }

    if (!graph.compute("selection of cells")) {
        return false;
    }

    std::vector<int32_t> data;
    for (const auto & [dev, cur] : selections) {
        if (cur.heads.empty()) {
            continue;
        }

        data.resize(ggml_nelements(cur.res));
        ggml_backend_tensor_get(cur.res, data.data(), 0, ggml_nbytes(cur.res));

        for (size_t i = 0; i < cur.heads.size(); ++i) {
            const auto first = data.begin() + i*cur.res->ne[0];

            rows[cur.heads[i]].assign(first, first + cur.segs[3*i + 2]);
        }
    }

    return true;
}

llama_lukv_scorer llama_kv_cache_lukv::get_scorer(ggml_context * ctx, const kv_seq & seq, size_t i, const llama_lukv_queries::seq_view & view) const {
    const auto & layer   = kv.layers[i/params.n_head_kv];
    const auto & hparams = model.hparams;
    const auto & seg     = seq.segs[i];

    const uint32_t ih = i%params.n_head_kv;

    llama_lukv_scorer res;

    res.use_out_prod = ops[i/params.n_head_kv].out_prod;

    res.ctx     = ctx;
    res.params  = params.metric_params;
    res.il      = layer.il;
    res.ih      = ih;
    res.weights = params.weights.get();
    res.n_head_kv = params.n_head_kv;
    res.n_gqa   = hparams.n_head(layer.il)/params.n_head_kv;
    res.prot    = get_protected(seq, seg);
    res.pos_min = seq.pos_min;
    res.pos_max = seq.pos_max;
    res.sink    = params.sink;

    res.pos = seg.pos;
    res.pos.insert(res.pos.end(), seq.pos_recent.begin(), seq.pos_recent.end());

    const auto view_rows = [&](ggml_tensor * t) {
        return ggml_view_2d(ctx, t, t->ne[0], res.n_cells(), t->nb[1], seg.offs*t->nb[1]);
    };
    res.k = view_rows(layer.k);
    res.v = view_rows(layer.v);
    if (layer.norms) {
        res.out_norms = view_rows(layer.norms);
    }
    if (layer.attn_sums) {
        res.attn_sums = ggml_view_1d(ctx, layer.attn_sums, res.n_cells(), seg.offs*layer.attn_sums->nb[1]);
    }
    if (layer.past) {
        res.past = ggml_view_1d(ctx, layer.past, res.n_cells(), seg.offs*layer.past->nb[1]);
    }

    if (queries->active()) {
        res.kq_scale = queries->get_attn(layer.il).scale;
        res.soft_cap = hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f;
    }

    // the query heads of this one
    res.pos_q = view.pos;
    if (view.q) {
        res.q = ggml_view_3d(ctx, view.q, view.q->ne[0], res.n_gqa, view.q->ne[2], view.q->nb[1], view.q->nb[2], ih*res.n_gqa*view.q->nb[1]);
    }
    if (view.mean) {
        res.q_mean = ggml_view_2d(ctx, view.mean, view.mean->ne[0], res.n_gqa, view.mean->nb[1], ih*res.n_gqa*view.mean->nb[1]);
    }
    if (view.cov) {
        res.q_cov = ggml_view_3d(ctx, view.cov, view.cov->ne[0], view.cov->ne[1], res.n_gqa, view.cov->nb[1], view.cov->nb[2], ih*res.n_gqa*view.cov->nb[2]);
    }

    return res;
}

bool llama_kv_cache_lukv::begin_repetition(llama_context * lctx, llama_seq_id seq_id) {
    this->lctx = lctx;

    auto & seq = seqs.at(seq_id);

    if (!compact()) {
        return false;
    }

    // nothing is said about new cells, and none is new from now on
    const auto n_cells = n_cells_of(seq);

    bool fits = true;
    for (size_t i = 0; i < n_heads(); ++i) {
        fits = fits && n_cells[i] <= seq.segs[i].n_owned;
    }
    if (fits ? !evict({ { &seq, n_cells } }) : !rebalance({ seq_id }, 0)) {
        return false;
    }
    seq.is_repeating = true;

    return true;
}

void llama_kv_cache_lukv::end_repetition(llama_seq_id seq_id, bool recorded) {
    auto & seq = seqs.at(seq_id);

    seq.is_repeating = false;
    seq.is_recorded  = seq.is_recorded || recorded;
}

bool llama_kv_cache_lukv::record(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos pos_first, llama_pos pos_end) {
    const auto & seq = seqs.at(seq_id);

    commit_graph graph(*this, 48*n_heads() + 8*params.n_layer + 64);

    auto * ctx = graph.ctx.get();

    const auto input_f32 = [&](const std::vector<float>   & data, int64_t ne0) { return graph.input(GGML_TYPE_F32, data, ne0); };
    const auto input_i32 = [&](const std::vector<int32_t> & data, int64_t ne0) { return graph.input(GGML_TYPE_I32, data, ne0); };

    // nothing was evicted yet: the cells of all heads are in the same order
    std::vector<llama_pos> pos = seq.segs[0].pos;
    pos.insert(pos.end(), seq.pos_recent.begin(), seq.pos_recent.end());

    // the softmax runs over the part that is repeated, the sinks before it, and the repetition
    std::vector<int32_t> rows;
    const auto add_rows = [&](llama_pos first, llama_pos last) {
        for (size_t i = 0; i < pos.size(); ++i) {
            if (pos[i] >= first && pos[i] < last) {
                rows.push_back(i);
            }
        }
    };
    add_rows(p0, p1);
    const int64_t n_part = rows.size();
    add_rows(seq.pos_min, std::min(p0, seq.pos_min + (llama_pos) params.sink));
    add_rows(pos_end, std::numeric_limits<llama_pos>::max());

    const int64_t n   = rows.size();
    const int64_t n_q = seq.pos_max - pos_first + 1;

    std::vector<float> mask(n*n_q);
    for (int64_t j = 0; j < n_q; ++j) {
        for (int64_t i = 0; i < n; ++i) {
            mask[j*n + i] = pos[rows[i]] > pos_first + j ? -INFINITY : 0.0f;
        }
    }
    ggml_tensor * inp_rows = input_i32(rows, n);
    ggml_tensor * inp_part = input_i32({ rows.begin(), rows.begin() + n_part }, n_part);
    ggml_tensor * inp_mask = input_f32(mask, n);

    for (size_t l = 0; l < kv.layers.size(); ++l) {
        const auto view = queries->build_view(ctx, input_i32, seq.queries, kv.layers[l].il, nullptr);

        // queries of this batch
        const int64_t i_q = view.pos.size() - n_q;

        for (uint32_t ih = 0; ih < params.n_head_kv; ++ih) {
            const llama_lukv_scorer s = get_scorer(ctx, seq, l*params.n_head_kv + ih, view);

            ggml_tensor * k = ggml_get_rows(ctx, s.k, inp_rows);
            ggml_tensor * q = ggml_view_3d(ctx, s.q, s.q->ne[0], s.n_gqa, n_q, s.q->nb[1], s.q->nb[2], i_q*s.q->nb[2]);

            q = ggml_cont(ctx, ggml_permute(ctx, q, 0, 2, 1, 3)); // [n_embd, n_q, n_gqa]

            ggml_tensor * kq = ggml_mul_mat(ctx, k, ggml_reshape_2d(ctx, q, q->ne[0], n_q*s.n_gqa));

            float scale = s.kq_scale;
            if (s.soft_cap > 0.0f) {
                kq    = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, kq, scale/s.soft_cap)), s.soft_cap);
                scale = 1.0f;
            }
            kq = ggml_soft_max_ext(ctx, ggml_reshape_3d(ctx, kq, n, n_q, s.n_gqa), inp_mask, scale, 0.0f);
            kq = ggml_reshape_2d(ctx, kq, n, n_q*s.n_gqa);

            // the largest of each cell: [1, n_part]
            kq = ggml_cont(ctx, ggml_transpose(ctx, ggml_view_2d(ctx, kq, n_part, kq->ne[1], kq->nb[1], 0)));

            ggml_tensor * largest = ggml_get_rows(ctx, ggml_reshape_3d(ctx, kq, 1, kq->ne[0], n_part),
                    ggml_reshape_2d(ctx, ggml_argmax(ctx, kq), 1, n_part));
            largest = ggml_reshape_2d(ctx, largest, 1, n_part);

            // the larger of it and what is known
            ggml_tensor * past = ggml_reshape_2d(ctx, s.past, 1, s.n_cells());
            ggml_tensor * old  = ggml_get_rows(ctx, past, inp_part);

            largest = ggml_add(ctx, old, ggml_relu(ctx, ggml_sub(ctx, largest, old)));
            ggml_build_forward_expand(graph.gf, ggml_set_rows(ctx, past, largest, inp_part));
        }
    }

    return graph.compute("attention of a repetition");
}

void llama_kv_cache_lukv::build_plain(llama_lukv_scorer & s, ggml_tensor * rot_k, ggml_tensor * rot_v) const {
    const auto plain = [&](ggml_tensor * t, ggml_tensor * rot) {
        ggml_tensor * res = t->type == GGML_TYPE_F32 ? t : ggml_cast(s.ctx, t, GGML_TYPE_F32);

        // its own inverse
        return rot ? ggml_reshape_2d(s.ctx, ggml_mul_mat(s.ctx, rot, ggml_reshape_2d(s.ctx, res, rot->ne[0], ggml_nelements(t)/rot->ne[0])),
                t->ne[0], t->ne[1]) : res;
    };
    s.k_plain = plain(s.k, rot_k);
    s.v_plain = plain(s.v, rot_v);

    const auto & rope = queries->get_attn(s.il).rope;
    if (rope.none) {
        return;
    }

    float f[6]; // freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow
    memcpy(f, rope.params.data() + 5, sizeof(f));

    // back to where it was, and to the length that it had
    const float magnitude = f[3]*(f[2] != 0.0f ? 1.0f + 0.1f*logf(1.0f/f[1]) : 1.0f);

    std::vector<int32_t> positions;
    for (llama_pos pos : s.pos) {
        positions.push_back(-pos);
    }

    ggml_tensor * cur = ggml_reshape_3d(s.ctx, s.k_plain, s.k_plain->ne[0], 1, s.n_cells());
    cur = ggml_rope_ext(s.ctx, cur, s.input_i32(positions, s.n_cells()), rope.factors,
            rope.params[1], rope.params[2], rope.params[4], f[0], f[1], f[2], f[3]/(magnitude*magnitude), f[4], f[5]);

    s.k_plain = ggml_reshape_2d(s.ctx, cur, cur->ne[0], s.n_cells());
}

llama_lukv_layer_scorer llama_kv_cache_lukv::get_layer_scorer(const kv_seq & seq, size_t l, const llama_lukv_queries::seq_view & view,
        const std::vector<llama_lukv_layer_scorer::segment> & segs) const {
    const auto & layer   = kv.layers[l];
    const auto & hparams = model.hparams;

    llama_lukv_layer_scorer res;

    res.params  = params.metric_params;
    res.il      = layer.il;
    res.k       = layer.k;
    res.v       = layer.v;
    res.segs    = segs;
    res.pos_min = seq.pos_min;
    res.pos_max = seq.pos_max;
    res.sink    = params.sink;

    res.out_norms = layer.norms;
    res.attn_sums = layer.attn_sums;
    res.past      = layer.past;
    res.n_head_kv = params.n_head_kv;

    for (const auto & cur : segs) {
        const auto & seg = seq.segs[l*params.n_head_kv + cur.ih];

        for (int32_t cell : get_protected(seq, seg)) {
            res.prot.push_back(res.pos.size() + cell);
        }
        res.pos.insert(res.pos.end(), seg.pos.begin(), seg.pos.end());
        res.pos.insert(res.pos.end(), seq.pos_recent.begin(), seq.pos_recent.end());
    }

    if (queries->active()) {
        res.kq_scale = queries->get_attn(layer.il).scale;
        res.soft_cap = hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f;
    }
    res.pos_q  = view.pos;
    res.q      = view.q;
    res.q_mean = view.mean;
    res.q_cov  = view.cov;

    return res;
}

bool llama_kv_cache_lukv::compute_norms(const std::vector<eviction> & evictions) {
    // nothing was said about the recent cells yet
    if (needs.past) {
        ggml_backend_sched_synchronize(lctx->get_sched());
    }
    for (size_t e = 0; e < evictions.size() && needs.past; ++e) {
        const auto & seq = *evictions[e].seq;

        for (size_t i = 0; i < n_heads() && !seq.pos_recent.empty(); ++i) {
            ggml_tensor * t = kv.layers[i/params.n_head_kv].past;

            ggml_backend_tensor_memset(t, 0, (seq.segs[i].offs + seq.segs[i].pos.size())*t->nb[1], seq.pos_recent.size()*t->nb[1]);
        }
    }

    if (!needs.out_norms) {
        return true;
    }

    if (!wo_copied && !compute_wo_copies()) {
        return false;
    }

    const auto & hparams = model.hparams;

    commit_graph graph(*this, (16 + 8*evictions.size()*hparams.n_head())*params.n_layer + 64);

    auto * ctx = graph.ctx.get();

    std::vector<float> rot_data(rot_v*rot_v);
    fill_rot(rot_data.data(), rot_v);

    ggml_tensor * rot = rot_v > 0 ? graph.input(GGML_TYPE_F32, rot_data, rot_v) : nullptr;

    bool empty = true;

    for (size_t l = 0; l < kv.layers.size(); ++l) {
        const auto & layer = kv.layers[l];

        const int64_t n_embd_v = layer.v->ne[0];
        const int64_t n_gqa    = hparams.n_head(layer.il)/params.n_head_kv;

        // [n_embd_head_v*n_head, n_embd]
        ggml_tensor * wo = wo_copies.count(layer.il) ? wo_copies.at(layer.il) : model.layers[layer.il].wo;

        const bool fused = ops[l].scores && wo->buffer && ggml_backend_buffer_is_host(wo->buffer);

        if (wo->type != GGML_TYPE_F32 && wo->type != GGML_TYPE_F16) {
            wo = ggml_cast(ctx, wo, GGML_TYPE_F32);
        }

        for (const auto & eviction : evictions) {
            const auto & seq = *eviction.seq;

            const int64_t n_recent = seq.pos_recent.size();
            if (n_recent == 0) {
                continue;
            }
            empty = false;

            if (fused) {
                std::vector<int32_t> segs;
                for (uint32_t ih = 0; ih < params.n_head_kv; ++ih) {
                    const auto & seg = seq.segs[l*params.n_head_kv + ih];
                    segs.insert(segs.end(), { (int32_t) (seg.offs + seg.pos.size()), (int32_t) n_recent });
                }

                ggml_build_forward_expand(graph.gf, ggml_value_norms_ragged(ctx, layer.v, wo, rot, graph.input(GGML_TYPE_I32, segs, 2), layer.norms));
                continue;
            }

            for (uint32_t ih = 0; ih < params.n_head_kv; ++ih) {
                const auto & seg = seq.segs[l*params.n_head_kv + ih];

                const int64_t row = seg.offs + seg.pos.size();

                ggml_tensor * v = ggml_view_2d(ctx, layer.v, n_embd_v, n_recent, layer.v->nb[1], row*layer.v->nb[1]);
                if (v->type != GGML_TYPE_F32) {
                    v = ggml_cast(ctx, v, GGML_TYPE_F32);
                }
                if (rot) {
                    v = ggml_reshape_2d(ctx, ggml_mul_mat(ctx, rot, ggml_reshape_2d(ctx, v, rot_v, n_embd_v*n_recent/rot_v)), n_embd_v, n_recent);
                }

                ggml_tensor * sum = nullptr;
                for (int64_t ig = ih*n_gqa; ig < (ih + 1)*n_gqa; ++ig) {
                    ggml_tensor * w   = ggml_view_2d(ctx, wo, n_embd_v, wo->ne[1], wo->nb[1], ig*n_embd_v*wo->nb[0]);
                    ggml_tensor * cur = ggml_sum_rows(ctx, ggml_abs(ctx, ggml_mul_mat(ctx, w, v)));

                    sum = sum ? ggml_add(ctx, sum, cur) : cur;
                }

                std::vector<int64_t> rows(n_recent);
                std::iota(rows.begin(), rows.end(), row);

                ggml_tensor * res = ggml_set_rows(ctx, layer.norms, ggml_scale(ctx, sum, 1.0f/n_gqa), graph.input(GGML_TYPE_I64, rows, n_recent));
                ggml_build_forward_expand(graph.gf, res);
            }
        }
    }

    return empty || graph.compute("norms of values");
}

bool llama_kv_cache_lukv::compute_wo_copies() {
    for (const auto & [il, copy] : wo_copies) {
        const int64_t n = copy->ne[0];

        std::vector<float> identity(n*n);
        for (int64_t i = 0; i < n; ++i) {
            identity[i*n + i] = 1.0f;
        }

        commit_graph graph(*this, 16);

        auto * ctx = graph.ctx.get();

        ggml_tensor * columns = ggml_mul_mat(ctx, model.layers[il].wo, graph.input(GGML_TYPE_F32, identity, n));
        ggml_build_forward_expand(graph.gf, ggml_cpy(ctx, ggml_cont(ctx, ggml_transpose(ctx, columns)), copy));

        if (!graph.compute("copy of W_O")) {
            return false;
        }
    }
    wo_copied = true;

    return true;
}

bool llama_kv_cache_lukv::compute_rotation(const llama_lukv_queries::rope_op & rope, llama_pos pos, uint32_t n, std::vector<float> & res) {
    const int64_t n_embd = model.hparams.n_embd_head_k();

    std::vector<float> identity(n_embd*n_embd);
    for (int64_t i = 0; i < n_embd; ++i) {
        identity[i*n_embd + i] = 1.0f;
    }

    commit_graph graph(*this, 64);

    auto * ctx = graph.ctx.get();

    std::vector<int32_t> positions(n);
    std::iota(positions.begin(), positions.end(), pos);

    float f[6]; // freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow
    memcpy(f, rope.params.data() + 5, sizeof(f));

    ggml_tensor * cur = graph.input(GGML_TYPE_F32, identity, n_embd);
    cur = ggml_repeat_4d(ctx, cur, n_embd, n_embd, n, 1);
    cur = ggml_rope_ext(ctx, cur, graph.input(GGML_TYPE_I32, positions, n), rope.factors,
            rope.params[1], rope.params[2], rope.params[4], f[0], f[1], f[2], f[3], f[4], f[5]);
    cur = ggml_sum_rows(ctx, ggml_cont(ctx, ggml_transpose(ctx, ggml_reshape_2d(ctx, cur, n_embd*n_embd, n))));
    graph.output(cur);

    if (!graph.compute("rotation of queries")) {
        return false;
    }

    res.resize(n_embd*n_embd);
    ggml_backend_tensor_get(cur, res.data(), 0, ggml_nbytes(cur));

    return true;
}

bool llama_kv_cache_lukv::compute_future_rotation(int32_t il, llama_pos pos, std::vector<float> & res) {
    const auto & attn = queries->get_attn(il);

    const size_t n = model.hparams.n_embd_head_k(il);

    // rows of the matrix: identity, or R(pos) times the mean of R(0) ... R(n_future - 1)
    std::vector<float> rows(n*n);

    if (attn.rope.none) {
        for (size_t i = 0; i < n; ++i) {
            rows[i*n + i] = attn.q_scale;
        }
    } else {
        auto & mean = rotations[attn.rope];
        if (mean.empty()) {
            std::vector<float> sum(n*n);
            std::vector<float> cur;
            for (uint32_t i = 0; i < needs.n_future; i += N_ROTATIONS) {
                if (!compute_rotation(attn.rope, i, std::min(N_ROTATIONS, needs.n_future - i), cur)) {
                    return false;
                }
                std::transform(sum.begin(), sum.end(), cur.begin(), sum.begin(), std::plus<float>());
            }

            // a rotation may scale what it rotates: once, not twice
            if (!compute_rotation(attn.rope, 0, 1, cur)) {
                return false;
            }
            for (size_t j = 0; j < n; ++j) {
                for (size_t i = 0; i < n; ++i) {
                    sum[j*n + i] /= needs.n_future*cur[i*n + i];
                }
            }
            mean = std::move(sum);
        }

        std::vector<float> turn;
        if (!compute_rotation(attn.rope, pos, 1, turn)) {
            return false;
        }
        for (size_t k = 0; k < n; ++k) {
            for (size_t i = 0; i < n; ++i) {
                const float x = turn[k*n + i]*attn.q_scale;
                for (size_t j = 0; x != 0.0f && j < n; ++j) {
                    rows[i*n + j] += x*mean[j*n + k];
                }
            }
        }
    }

    // K may be rotated once more
    if (rot_k > 0) {
        std::vector<float> rot(rot_k*rot_k);
        fill_rot(rot.data(), rot_k);

        std::vector<float> rotated(n*n);
        for (size_t i = 0; i < n; ++i) {
            const size_t first = i/rot_k*rot_k;
            for (size_t k = first; k < first + rot_k; ++k) {
                const float x = rot[(i - first)*rot_k + k - first];
                for (size_t j = 0; j < n; ++j) {
                    rotated[i*n + j] += x*rows[k*n + j];
                }
            }
        }
        rows = std::move(rotated);
    }

    res = std::move(rows);

    return true;
}

// the rows of K or V as numbers of 32 bits, so that they can be moved as they are
static ggml_tensor * view_raw(ggml_context * ctx, ggml_tensor * t) {
    ggml_tensor * res = ggml_view_tensor(ctx, t);

    // q8_0 and the like with a head size such as 96 have rows of another length: these are dequantised and quantised again
    if (t->nb[1] % sizeof(float) == 0) {
        res->type  = GGML_TYPE_F32;
        res->ne[0] = t->nb[1]/sizeof(float);
        res->nb[0] = sizeof(float);
    }

    return res;
}

bool llama_kv_cache_lukv::compute_moves(const cell_moves & moves, bool async) {
    // per device: the old rows of each layer's cells, then the new ones
    std::map<ggml_backend_dev_t, std::vector<int32_t>> rows;
    for (uint32_t l = 0; l < params.n_layer; ++l) {
        auto & cur = rows[get_dev(kv.layers[l].il)];
        for (const auto & move : moves[l]) {
            cur.push_back(move.src);
        }
        for (const auto & move : moves[l]) {
            cur.push_back(move.dst);
        }
    }

    if (std::all_of(rows.begin(), rows.end(), [](const auto & cur) { return cur.second.empty(); })) {
        return true;
    }

    commit_graph graph(*this, 16*params.n_layer + 16);

    auto * ctx = graph.ctx.get();

    std::map<ggml_backend_dev_t, ggml_tensor *> idxs;
    std::map<ggml_backend_dev_t, int64_t>       first;

    for (uint32_t l = 0; l < params.n_layer; ++l) {
        const int64_t n = moves[l].size();
        if (n == 0) {
            continue;
        }

        ggml_backend_dev_t dev = get_dev(kv.layers[l].il);

        auto & cur = idxs[dev];
        if (!cur) {
            const int64_t n_all = rows[dev].size();
            cur = graph.on_device(graph.input(GGML_TYPE_I32, std::move(rows[dev]), n_all), dev);
        }

        ggml_tensor * src = ggml_view_1d(ctx, cur, n,  first[dev]     *cur->nb[0]);
        ggml_tensor * dst = ggml_view_1d(ctx, cur, n, (first[dev] + n)*cur->nb[0]);
        first[dev] += 2*n;

        for (ggml_tensor * t : kv.layers[l].tensors()) {
            ggml_tensor * raw = view_raw(ctx, t);

            // note: all rows are read before the first one is written
            ggml_build_forward_expand(graph.gf, ggml_set_rows(ctx, raw, ggml_get_rows(ctx, raw, src), dst));
        }
    }

    return graph.compute("moves of cells", async);
}

//
// graph_build API
//

uint32_t llama_kv_cache_lukv::get_n_recent_pad(llama_seq_id seq_id) const {
    if (seq_id < 0) {
        return n_room_all;
    }

    const auto & seq = seqs.at(seq_id);

    return std::min<uint32_t>(GGML_PAD(seq.pos_recent.size(), N_RECENT_PAD), seq.n_room);
}

uint32_t llama_kv_cache_lukv::get_n_cells(llama_seq_id seq_id, int32_t il, uint32_t ih) const {
    return (seq_id < 0 ? get_n_owned(il, ih) : get_seg(seq_id, il, ih).pos.size()) + get_n_recent_pad(seq_id);
}

uint32_t llama_kv_cache_lukv::get_n_cells_max(llama_seq_id seq_id) const {
    uint32_t res = 0;
    for_each_head([&](const kv_layer & layer, uint32_t ih, size_t) {
        res = std::max(res, get_n_cells(seq_id, layer.il, ih));
    });
    return res;
}

ggml_tensor * llama_kv_cache_lukv::view_cells(ggml_context * ctx, ggml_tensor * t, llama_seq_id seq_id, int32_t il, uint32_t ih, uint32_t n_cells) const {
    const uint32_t row = seq_id < 0 ? get_layer(il).pools[ih].offs : get_seg(seq_id, il, ih).offs;

    return ggml_view_3d(ctx, t, t->ne[0], 1, n_cells, t->nb[1], t->nb[1], row*t->nb[1]);
}

ggml_tensor * llama_kv_cache_lukv::get_k(ggml_context * ctx, llama_seq_id seq_id, int32_t il, uint32_t ih, uint32_t n_cells) const {
    return view_cells(ctx, get_k(il), seq_id, il, ih, n_cells);
}

ggml_tensor * llama_kv_cache_lukv::get_v(ggml_context * ctx, llama_seq_id seq_id, int32_t il, uint32_t ih, uint32_t n_cells) const {
    return view_cells(ctx, get_v(il), seq_id, il, ih, n_cells);
}

static ggml_tensor * cpy_rows(ggml_context * ctx, ggml_tensor * dst, ggml_tensor * cur, ggml_tensor * idxs) {
    // the heads may be a part of a larger tensor
    if (!ggml_is_contiguous(cur)) {
        cur = ggml_cont(ctx, cur);
    }

    return ggml_set_rows(ctx, dst, ggml_reshape_2d(ctx, cur, cur->ne[0], cur->ne[1]*cur->ne[2]), idxs);
}

ggml_tensor * llama_kv_cache_lukv::cpy_k(ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * idxs, int32_t il) const {
    return cpy_rows(ctx, get_k(il), k_cur, view_idxs(ctx, idxs, il));
}

ggml_tensor * llama_kv_cache_lukv::cpy_v(ggml_context * ctx, ggml_tensor * v_cur, ggml_tensor * idxs, int32_t il) const {
    return cpy_rows(ctx, get_v(il), v_cur, view_idxs(ctx, idxs, il));
}

ggml_tensor * llama_kv_cache_lukv::view_idxs(ggml_context * ctx, ggml_tensor * idxs, int32_t il) const {
    return ggml_view_1d(ctx, idxs, idxs->ne[0], map_layer_ids.at(il)*idxs->nb[1]);
}

ggml_tensor * llama_kv_cache_lukv::view_segs(ggml_context * ctx, ggml_tensor * segs, int32_t il) const {
    return ggml_view_3d(ctx, segs, segs->ne[0], segs->ne[1], segs->ne[2], segs->nb[1], segs->nb[2], map_layer_ids.at(il)*segs->nb[3]);
}

void llama_kv_cache_lukv::set_input_idxs(ggml_tensor * dst, const llama_ubatch & ubatch) const {
    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer));

    const uint32_t n = ubatch.n_seq_tokens;

    int32_t * data = (int32_t *) dst->data;

    const seq_ids_t ids = seq_ids_of(ubatch);

    for (size_t l = 0; l < kv.layers.size(); ++l) {
        for (llama_seq_id id : ids) {
            const auto & seq = seqs.at(id);

            for (uint32_t i = seq.pos_recent.size() - n; i < seq.pos_recent.size(); ++i) {
                for (uint32_t ih = 0; ih < params.n_head_kv; ++ih) {
                    const auto & seg = seq.segs[l*params.n_head_kv + ih];

                    *data++ = seg.offs + seg.pos.size() + i;
                }
            }
        }
    }
}

void llama_kv_cache_lukv::init_queries(kv_seq & seq) {
    if (!queries->active()) {
        return;
    }

    if (lctx) {
        ggml_backend_sched_synchronize(lctx->get_sched());
    }

    std::vector<int32_t> used;
    for (const auto & [_, other] : seqs) {
        if (&other != &seq && other.queries.slot >= 0) {
            used.push_back(other.queries.slot);
        }
    }
    queries->init_seq(seq.queries, used);
}

void llama_kv_cache_lukv::set_input_queries(const llama_lukv_queries::graph_inputs & inp, const llama_ubatch & ubatch) const {
    if (!queries->active()) {
        return;
    }

    std::vector<const llama_lukv_queries::seq_state *> states;
    std::vector<llama_pos> pos_min;
    for (llama_seq_id id : seq_ids_of(ubatch)) {
        states .push_back(&seqs.at(id).queries);
        pos_min.push_back(seqs.at(id).pos_min);
    }
    queries->set_inputs(inp, ubatch, states, pos_min);
}

void llama_kv_cache_lukv::set_input_segs(ggml_tensor * dst, const llama_ubatch & ubatch) const {
    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer));

    int32_t * data = (int32_t *) dst->data;

    const seq_ids_t ids = seq_ids_of(ubatch);

    for (size_t l = 0; l < kv.layers.size(); ++l) {
        for (llama_seq_id id : ids) {
            const auto & seq = seqs.at(id);

            for (uint32_t ih = 0; ih < params.n_head_kv; ++ih) {
                const auto & seg = seq.segs[l*params.n_head_kv + ih];

                *data++ = seg.offs;
                *data++ = seg.pos.size() + seq.pos_recent.size();
            }
        }
    }
}

// recent cells that a token sees: the positions of a sequence ascend
static uint32_t n_recent_seen(const std::vector<llama_pos> & pos_recent, llama_pos pos, bool causal_attn) {
    return causal_attn ? std::upper_bound(pos_recent.begin(), pos_recent.end(), pos) - pos_recent.begin() : pos_recent.size();
}

void llama_kv_cache_lukv::set_input_n_hidden(ggml_tensor * dst, const llama_ubatch & ubatch) const {
    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer));

    int32_t * data = (int32_t *) dst->data;

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const auto & pos_recent = seqs.at(ubatch.seq_id[i][0]).pos_recent;

        data[i] = pos_recent.size() - n_recent_seen(pos_recent, ubatch.pos[i], cparams.causal_attn);
    }
}

uint32_t llama_kv_cache_lukv::n_tokens_ragged() const {
    uint32_t res = cparams.flash_attn ? n_recent_max : 0;
    for (const auto & op : ops) {
        res = op.attn ? std::min(res, op.n_tokens_attn) : 0;
    }
    return res;
}

bool llama_kv_cache_lukv::use_ragged(int32_t il, uint32_t n_tokens) const {
    const auto & op = ops[map_layer_ids.at(il)];

    return cparams.flash_attn && op.attn && n_tokens <= op.n_tokens_attn;
}

void llama_kv_cache_lukv::set_input_rot(ggml_tensor * dst) {
    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer));

    fill_rot((float *) dst->data, dst->ne[0]);
}

template <typename T>
static void fill_kq_mask(T * data, int64_t n_cols, const std::vector<llama_pos> & pos_recent, uint32_t n_recent_pad,
        const llama_ubatch & ubatch, bool causal_attn, T visible, T hidden) {
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        T * row  = data + i*n_cols;
        T * last = row  + n_cols - N_MASK_ALIGN - n_recent_pad + n_recent_seen(pos_recent, ubatch.pos[i], causal_attn);

        std::fill(row,  last,         visible);
        std::fill(last, row + n_cols, hidden);
    }
}

void llama_kv_cache_lukv::set_input_kq_mask(ggml_tensor * dst, const llama_ubatch & ubatch) const {
    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer));

    const llama_seq_id id = ubatch.seq_id[0][0];

    const auto &   pos_recent   = seqs.at(id).pos_recent;
    const uint32_t n_recent_pad = get_n_recent_pad(id);

    if (dst->type == GGML_TYPE_F16) {
        fill_kq_mask((ggml_fp16_t *) dst->data, dst->ne[0], pos_recent, n_recent_pad, ubatch, cparams.causal_attn,
                ggml_fp32_to_fp16(0.0f), ggml_fp32_to_fp16(-INFINITY));
    } else {
        fill_kq_mask((float *) dst->data, dst->ne[0], pos_recent, n_recent_pad, ubatch, cparams.causal_attn, 0.0f, -INFINITY);
    }
}

//
// state
//

// FNV-1a
static void hash_add(uint64_t & hash, const void * data, size_t size) {
    for (size_t i = 0; i < size; ++i) {
        hash = (hash ^ ((const uint8_t *) data)[i])*0x100000001b3;
    }
}

uint64_t llama_kv_cache_lukv::hash_metric() const {
    uint64_t res = 0xcbf29ce484222325;

    hash_add(res, params.metric.data(), params.metric.size());
    for (const auto & [name, value] : params.metric_params) {
        hash_add(res, name.data(), name.size());
        hash_add(res, &value, sizeof(value));
    }
    hash_add(res, &params.sink,   sizeof(params.sink));
    hash_add(res, &params.recent, sizeof(params.recent));
    hash_add(res, &params.policy, sizeof(params.policy));

    return res;
}

uint64_t llama_kv_cache_lukv::hash_budget() const {
    uint64_t res = 0xcbf29ce484222325;

    hash_add(res, params.budget.data(), params.budget.size()*sizeof(float));

    return res;
}

static void write_pos(llama_io_write_i & io, const std::vector<llama_pos> & pos) {
    llama_lukv_write<uint32_t>(io, pos.size());
    io.write(pos.data(), pos.size()*sizeof(llama_pos));
}

// positions as they are cached: within the range of the sequence, or a hole
static std::vector<llama_pos> read_pos(llama_io_read_i & io, llama_pos pos_min, llama_pos pos_max, uint32_t n_max) {
    const uint32_t n = llama_lukv_read<uint32_t>(io);
    if (n > n_max) {
        throw std::runtime_error(format("it has %u cells for a head, but there is room for %u", n, n_max));
    }

    std::vector<llama_pos> res(n);
    io.read(res.data(), n*sizeof(llama_pos));

    for (llama_pos pos : res) {
        if (pos != -1 && (pos < pos_min || pos > pos_max)) {
            throw std::runtime_error(format("it has the position %d, which is not in [%d, %d]", pos, pos_min, pos_max));
        }
    }
    return res;
}

void llama_kv_cache_lukv::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    GGML_UNUSED(flags);

    llama_lukv_write<uint32_t>(io, STATE_MAGIC);
    llama_lukv_write<uint32_t>(io, params.n_layer);
    llama_lukv_write<uint32_t>(io, params.n_head_kv);
    llama_lukv_write<uint32_t>(io, type_k);
    llama_lukv_write<uint32_t>(io, type_v);
    llama_lukv_write<uint64_t>(io, hash_metric());
    llama_lukv_write<uint64_t>(io, hash_budget());
    llama_lukv_write<uint32_t>(io, seq_id < 0 ? seqs.size() : seqs.count(seq_id));

    seq_ids_t ids;
    for (const auto & [id, _] : seqs) {
        if (seq_id < 0 || id == seq_id) {
            ids.push_back(id);
        }
    }

    // all that decides where the cells go comes before them
    for (llama_seq_id id : ids) {
        const auto & seq = seqs.at(id);

        llama_lukv_write(io, id);
        llama_lukv_write(io, seq.pos_min);
        llama_lukv_write(io, seq.pos_max);
        // for all sequences together only: one of them may find others beside it when it is restored
        llama_lukv_write<uint32_t>(io, seq_id < 0 ? seq.quota  : 0);
        llama_lukv_write<uint32_t>(io, seq_id < 0 ? seq.n_room : 0);
        llama_lukv_write<uint32_t>(io, seq.prefill_done + 2*seq.is_recorded);

        write_pos(io, seq.pos_recent);
        for (const auto & seg : seq.segs) {
            write_pos(io, seg.pos);
        }
    }

    for (llama_seq_id id : ids) {
        const auto & seq = seqs.at(id);

        queries->state_write(io, seq.queries);

        const auto n_cells = n_cells_of(seq);

        for_each_head([&](const kv_layer & layer, uint32_t, size_t i) {
            for (ggml_tensor * t : layer.tensors()) {
                llama_lukv_write_rows(io, t, seq.segs[i].offs, n_cells[i]);
            }
        });
    }
}

void llama_kv_cache_lukv::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    GGML_UNUSED(flags);

    seq_rm(seq_id, -1, -1);

    seq_ids_t ids;

    try {
        if (llama_lukv_read<uint32_t>(io) != STATE_MAGIC) {
            throw std::runtime_error("it was saved without LU-KV, or by another version of it");
        }
        if (llama_lukv_read<uint32_t>(io) != params.n_layer || llama_lukv_read<uint32_t>(io) != params.n_head_kv ||
                llama_lukv_read<uint32_t>(io) != (uint32_t) type_k || llama_lukv_read<uint32_t>(io) != (uint32_t) type_v) {
            throw std::runtime_error("it was saved for another model or another type of the KV cache");
        }
        if (llama_lukv_read<uint64_t>(io) != hash_metric()) {
            throw std::runtime_error("it was saved with another metric, policy, lukv.sink or lukv.recent: use those that it was saved with");
        }
        const bool same_budget = llama_lukv_read<uint64_t>(io) == hash_budget();

        const uint32_t n_seqs = llama_lukv_read<uint32_t>(io);
        if (n_seqs > (seq_id < 0 ? n_seq_max : 1) || seqs.size() + n_seqs > n_seq_max) {
            throw std::runtime_error(format("it has %u sequences, but there is room for %zu", n_seqs, n_seq_max - seqs.size()));
        }

        std::map<llama_seq_id, kv_seq> added;
        for (uint32_t s = 0; s < n_seqs; ++s) {
            const llama_seq_id id = llama_lukv_read<llama_seq_id>(io);

            const auto & seq = added[seq_id < 0 ? id : seq_id] = state_read_seq(io);

            // a prompt that is cached in full does not know its budgets yet
            if (!same_budget && (params.policy != LLAMA_LUKV_POLICY_PREFILL || seq.prefill_done)) {
                throw std::runtime_error("it was saved with another table of budgets: use the model and the ratio that it was saved with");
            }
        }

        for (const auto & [id, _] : added) {
            ids.push_back(id);
        }
        if (ids.size() != n_seqs || (!ids.empty() && (ids.front() < 0 || ids.back() >= LLAMA_MAX_SEQ))) {
            throw std::runtime_error("it is damaged");
        }
        if (!add_seqs(std::move(added), seq_id < 0)) {
            throw std::runtime_error("there is no memory for it");
        }

        for (llama_seq_id id : ids) {
            queries->state_read(io, seqs.at(id).queries);

            const auto & seq = seqs.at(id);

            const auto n_cells = n_cells_of(seq);

            for_each_head([&](const kv_layer & layer, uint32_t, size_t i) {
                for (ggml_tensor * t : layer.tensors()) {
                    llama_lukv_read_rows(io, t, seq.segs[i].offs, n_cells[i]);
                }
            });
        }
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: the state cannot be restored: %s\n", __func__, err.what());

        io.discard();

        // some cells may have been written. they are masked from now on, but they are read: no NaNs
        for (llama_seq_id id : ids) {
            if (seqs.count(id) == 0) {
                continue;
            }
            const auto & seq = seqs.at(id);

            const auto n_cells = n_cells_of(seq);

            for_each_head([&](const kv_layer & layer, uint32_t, size_t i) {
                for (ggml_tensor * t : layer.tensors()) {
                    ggml_backend_tensor_memset(t, 0, seq.segs[i].offs*t->nb[1], n_cells[i]*t->nb[1]);
                }
            });
        }
        seq_rm(seq_id, -1, -1);

        throw std::runtime_error("failed to restore kv cache");
    }
}

llama_kv_cache_lukv::kv_seq llama_kv_cache_lukv::state_read_seq(llama_io_read_i & io) const {
    kv_seq res;
    res.pos_min      = llama_lukv_read<llama_pos>(io);
    res.pos_max      = llama_lukv_read<llama_pos>(io);
    res.quota        = llama_lukv_read<uint32_t>(io);
    res.n_room       = llama_lukv_read<uint32_t>(io);
    const uint32_t flags = llama_lukv_read<uint32_t>(io);
    res.prefill_done = flags & 1;
    res.is_recorded  = flags & 2;
    res.has_holes    = true; // perhaps

    if (res.pos_min < 0 || res.pos_max < res.pos_min || res.quota > kv_size || res.n_room > n_room_all) {
        throw std::runtime_error("it was saved with another size of the context or of the ubatches, or it is damaged");
    }

    res.pos_recent = read_pos(io, res.pos_min, res.pos_max, n_room_all);

    res.segs.resize(n_heads());
    for (auto & seg : res.segs) {
        seg.pos = read_pos(io, res.pos_min, res.pos_max, kv_size);
    }

    return res;
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
    return ubatches.empty() || kv->apply_ubatch(ubatches[i_cur]);
}

llama_memory_status llama_kv_cache_lukv_context::get_status() const {
    return status;
}

const llama_ubatch & llama_kv_cache_lukv_context::get_ubatch() const {
    return ubatches[i_cur];
}

llama_seq_id llama_kv_cache_lukv_context::get_seq_id() const {
    return ubatches.empty() ? -1 : ubatches[i_cur].seq_id[0][0];
}

//
// graph
//

llm_graph_input_attn_kv_lukv::llm_graph_input_attn_kv_lukv(
        const llama_hparams & hparams,
        const llama_cparams & cparams,
        const llama_kv_cache_lukv_context * mctx) :
    llm_graph_input_attn_kv(hparams, cparams, nullptr),
    mctx_lukv(mctx) {
}

void llm_graph_input_attn_kv_lukv::set_input(const llama_ubatch * ubatch) {
    const auto * kv = mctx_lukv->get_kv();

    kv->set_input_idxs(self_idxs, *ubatch);

    // where the attention is computed head by head
    if (self_kq_mask && self_kq_mask->buffer) {
        kv->set_input_kq_mask(self_kq_mask, *ubatch);
    }

    // where it is computed for all heads together
    if (self_segs->buffer) {
        kv->set_input_segs    (self_segs,     *ubatch);
        kv->set_input_n_hidden(self_n_hidden, *ubatch);
    }

    kv->set_input_queries(self_queries, *ubatch);

    if (self_zeros && self_zeros->buffer) {
        ggml_backend_tensor_memset(self_zeros, 0, 0, ggml_nbytes(self_zeros));
    }

    for (ggml_tensor * rot : { self_k_rot, self_v_rot }) {
        if (rot && rot->buffer) {
            llama_kv_cache_lukv::set_input_rot(rot);
        }
    }
}

bool llm_graph_input_attn_kv_lukv::can_reuse(const llm_graph_params & params) {
    return can_reuse(static_cast<const llama_kv_cache_lukv_context *>(params.mctx), params.ubatch);
}

bool llm_graph_input_attn_kv_lukv::can_reuse(const llama_kv_cache_lukv_context * mctx, const llama_ubatch & ubatch) {
    mctx_lukv = mctx;

    const auto * kv = mctx->get_kv();

    const llama_seq_id id = mctx->get_seq_id();

    return self_n_hidden->ne[0] == ubatch.n_tokens && self_segs->ne[2] == ubatch.n_seqs &&
        version_alloc == kv->get_version_alloc() &&
        (ragged || (seq_id == id && version == kv->get_version() && n_recent_pad == kv->get_n_recent_pad(id)));
}

ggml_tensor * llm_graph_input_attn_kv_lukv::on_device(const llm_graph_context & gctx, ggml_tensor * input, int il) const {
    ggml_backend_dev_t dev = mctx_lukv->get_kv()->get_dev(il);
    if (ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU) {
        return input;
    }

    auto & res = copies[{ input, dev }];
    if (!res) {
        res = ggml_cont(gctx.ctx0, input);
        if (ggml_backend_dev_supports_op(dev, res)) {
            ggml_backend_sched_set_tensor_backend(gctx.sched, res, find_backend(gctx.sched, dev));
        } else {
            res = input;
        }
    }
    return res;
}

// the columns of a mask for n_cells cells: the last ones, but for N_MASK_ALIGN
static ggml_tensor * view_mask(ggml_context * ctx, ggml_tensor * mask, int64_t n_cells, bool align) {
    const int64_t first = mask->ne[0] - N_MASK_ALIGN - n_cells;

    if (align && first % N_MASK_ALIGN != 0) {
        mask = ggml_cont(ctx, ggml_view_2d(ctx, mask, GGML_PAD(n_cells, N_MASK_ALIGN), mask->ne[1], mask->nb[1], first*mask->nb[0]));

        return ggml_view_2d(ctx, mask, n_cells, mask->ne[1], mask->nb[1], 0);
    }
    return ggml_view_2d(ctx, mask, n_cells, mask->ne[1], mask->nb[1], first*mask->nb[0]);
}

std::unique_ptr<llm_graph_input_attn_kv_lukv> build_attn_inp_kv_lukv(
           ggml_context * ctx,
     const llama_ubatch & ubatch,
    const llama_hparams & hparams,
    const llama_cparams & cparams,
    const llama_kv_cache_lukv_context * mctx) {
    const auto * kv = mctx->get_kv();

    auto inp = std::make_unique<llm_graph_input_attn_kv_lukv>(hparams, cparams, mctx);

    const uint32_t n_head_kv = kv->get_params().n_head_kv;

    inp->version       = kv->get_version();
    inp->version_alloc = kv->get_version_alloc();
    inp->seq_id        = mctx->get_seq_id();
    inp->n_recent_pad  = kv->get_n_recent_pad(inp->seq_id);
    inp->ragged        = ubatch.n_tokens <= kv->n_tokens_ragged();

    inp->self_idxs = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_head_kv*ubatch.n_tokens, kv->get_n_layer());
    ggml_set_input(inp->self_idxs);
    ggml_set_name (inp->self_idxs, "attn_inp_idxs_lukv");

    inp->self_segs = ggml_new_tensor_4d(ctx, GGML_TYPE_I32, 2, n_head_kv, ubatch.n_seqs, kv->get_n_layer());
    ggml_set_input(inp->self_segs);
    ggml_set_name (inp->self_segs, "attn_inp_segs_lukv");

    inp->self_n_hidden = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, ubatch.n_tokens);
    ggml_set_input(inp->self_n_hidden);
    ggml_set_name (inp->self_n_hidden, "attn_inp_n_hidden_lukv");

    if (!inp->ragged) {
        // flash attention requires an f16 mask
        inp->self_kq_mask = ggml_new_tensor_2d(ctx, cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32,
                GGML_PAD(kv->get_n_cells_max(inp->seq_id), N_MASK_ALIGN) + N_MASK_ALIGN, ubatch.n_tokens);
        ggml_set_input(inp->self_kq_mask);
        ggml_set_name (inp->self_kq_mask, "attn_inp_kq_mask_lukv");
    }

    inp->self_queries = kv->get_queries().build_inputs(ctx, ubatch);

    if (kv->get_needs().attn_sums) {
        inp->self_zeros = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 1, n_head_kv*ubatch.n_tokens);
        ggml_set_input(inp->self_zeros);
        ggml_set_name (inp->self_zeros, "attn_inp_zeros_lukv");
    }

    const auto new_rot = [&](uint32_t n, const char * name) {
        ggml_tensor * res = n > 0 ? ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n, n) : nullptr;
        if (res) {
            ggml_set_input(res);
            ggml_set_name (res, name);
        }
        return res;
    };
    inp->self_k_rot = new_rot(kv->get_rot_k(), "attn_inp_k_rot_lukv");
    inp->self_v_rot = new_rot(kv->get_rot_v(), "attn_inp_v_rot_lukv");

    return inp;
}

void llama_kv_cache_lukv::build_attn_sums(const llm_graph_context & gctx, const llm_graph_input_attn_kv_lukv * inp, ggml_tensor * q_cur,
        float kq_scale, int32_t il) const {
    ggml_context * ctx = gctx.ctx0;

    ggml_tensor * sums = get_layer(il).attn_sums;

    const float soft_cap = model.hparams.attn_soft_cap ? model.hparams.f_attn_logit_softcapping : 0.0f;

    if (ops[map_layer_ids.at(il)].scores) {
        ggml_tensor * segs = view_segs(ctx, inp->on_device(gctx, inp->self_segs, il), il);

        ggml_build_forward_expand(gctx.gf, ggml_attn_sums_ragged(ctx, q_cur, get_k(il), segs, inp->self_n_hidden, sums, kq_scale, soft_cap));
        return;
    }

    const int64_t n_gqa = q_cur->ne[1]/params.n_head_kv;

    // the tokens' own cells begin at 0
    ggml_build_forward_expand(gctx.gf, ggml_set_rows(ctx, sums, inp->self_zeros, view_idxs(ctx, inp->on_device(gctx, inp->self_idxs, il), il)));

    for (uint32_t ih = 0; ih < params.n_head_kv; ++ih) {
        const uint32_t n_cells = get_n_cells(inp->seq_id, il, ih);

        ggml_tensor * k = get_k(ctx, inp->seq_id, il, ih, n_cells);
        k = ggml_view_2d(ctx, k, k->ne[0], n_cells, k->nb[2], 0);

        ggml_tensor * q = ggml_view_3d(ctx, q_cur, q_cur->ne[0], n_gqa, q_cur->ne[2], q_cur->nb[1], q_cur->nb[2], ih*n_gqa*q_cur->nb[1]);
        q = ggml_cont(ctx, ggml_permute(ctx, q, 0, 2, 1, 3));

        ggml_tensor * kq = ggml_mul_mat(ctx, k, q); // [n_cells, n_tokens, n_gqa]

        float scale = kq_scale;
        if (soft_cap > 0.0f) {
            kq    = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, kq, scale/soft_cap)), soft_cap);
            scale = 1.0f;
        }

        ggml_tensor * mask = ggml_cont(ctx, view_mask(ctx, inp->on_device(gctx, inp->self_kq_mask, il), n_cells, false));

        ggml_tensor * cur = ggml_reshape_2d(ctx, ggml_soft_max_ext(ctx, kq, mask, scale, 0.0f), n_cells, kq->ne[1]*n_gqa);
        cur = ggml_scale(ctx, ggml_sum_rows(ctx, ggml_cont(ctx, ggml_transpose(ctx, cur))), 1.0f/n_gqa); // [1, n_cells]

        ggml_tensor * dst = view_cells(ctx, sums, inp->seq_id, il, ih, n_cells);
        dst = ggml_view_2d(ctx, dst, 1, n_cells, sums->nb[1], 0);

        ggml_build_forward_expand(gctx.gf, ggml_cpy(ctx, ggml_add(ctx, dst, cur), dst));
    }
}

ggml_tensor * build_attn_lukv(
        const llm_graph_context & gctx,
        const llm_graph_input_attn_kv_lukv * inp,
        ggml_tensor * q_cur,
        ggml_tensor * k_cur,
        ggml_tensor * v_cur,
        ggml_tensor * sinks,
        float kq_scale,
        int   il) {
    ggml_context * ctx0 = gctx.ctx0;

    const auto * kv = inp->mctx_lukv->get_kv();

    ggml_tensor * idxs = inp->on_device(gctx, inp->self_idxs, il);

    ggml_build_forward_expand(gctx.gf, kv->cpy_k(ctx0, k_cur, idxs, il));
    ggml_build_forward_expand(gctx.gf, kv->cpy_v(ctx0, v_cur, idxs, il));

    if (kv->get_queries().active()) {
        kv->get_queries().build_store(gctx, inp->self_queries, q_cur, inp->self_k_rot, kq_scale, il);
    }
    if (kv->get_needs().attn_sums) {
        kv->build_attn_sums(gctx, inp, q_cur, kq_scale, il);
    }

    const uint32_t n_head_kv = kv->get_params().n_head_kv;
    const int64_t  n_gqa     = q_cur->ne[1]/n_head_kv;

    if (kv->use_ragged(il, gctx.n_tokens)) {
        ggml_tensor * segs = kv->view_segs(ctx0, inp->on_device(gctx, inp->self_segs, il), il);

        ggml_tensor * cur = ggml_flash_attn_ragged(ctx0, q_cur, kv->get_k(il), kv->get_v(il), segs, inp->self_n_hidden,
                sinks, kq_scale, gctx.hparams.attn_soft_cap ? gctx.hparams.f_attn_logit_softcapping : 0.0f);

        cur = ggml_reshape_2d(ctx0, cur, cur->ne[0]*cur->ne[1], cur->ne[2]);
        ggml_build_forward_expand(gctx.gf, cur);

        return cur;
    }

    std::vector<ggml_tensor *> outs;

    for (uint32_t ih = 0; ih < n_head_kv; ++ih) {
        const uint32_t n_cells = kv->get_n_cells(inp->seq_id, il, ih);

        ggml_tensor * q = ggml_view_3d(ctx0, q_cur, q_cur->ne[0], n_gqa, q_cur->ne[2], q_cur->nb[1], q_cur->nb[2], ih*n_gqa*q_cur->nb[1]);
        ggml_tensor * k = kv->get_k(ctx0, inp->seq_id, il, ih, n_cells);
        ggml_tensor * v = kv->get_v(ctx0, inp->seq_id, il, ih, n_cells);

        ggml_tensor * kq_mask = view_mask(ctx0, inp->on_device(gctx, inp->self_kq_mask, il), n_cells,
                gctx.cparams.flash_attn && ggml_backend_dev_type(kv->get_dev(il)) != GGML_BACKEND_DEVICE_TYPE_CPU);
        if (!gctx.cparams.flash_attn) {
            kq_mask = ggml_cont(ctx0, kq_mask); // required by the soft max
        }

        ggml_tensor * sinks_h = sinks ? ggml_view_1d(ctx0, sinks, n_gqa, ih*n_gqa*sinks->nb[0]) : nullptr;

        outs.push_back(gctx.build_attn_mha(q, k, v, nullptr, kq_mask, sinks_h, nullptr, 0, kq_scale, il));
    }

    // the tokens as the third dimension: threads share those
    for (auto & out : outs) {
        out = ggml_reshape_3d(ctx0, out, out->ne[0], 1, out->ne[1]);
    }
    ggml_tensor * cur = concat(ctx0, std::move(outs));
    cur = ggml_reshape_2d(ctx0, cur, cur->ne[0], cur->ne[2]);
    ggml_build_forward_expand(gctx.gf, cur);

    return cur;
}

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
