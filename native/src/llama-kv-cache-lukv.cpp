#include "llama-kv-cache-lukv.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-lukv.h"
#include "llama-model.h"

#include "ggml-ragged.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstring>
#include <limits>
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

// graph nodes for each head: views, permutations, attention and concatenation, or the score and the selection
static constexpr uint32_t N_NODES_HEAD = 24;

static constexpr uint32_t STATE_MAGIC = 0x6c756b76;

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

llama_kv_cache_lukv::llama_kv_cache_lukv(
        const llama_model       & model,
        const llama_lukv_params & params,
        ggml_type type_k,
        ggml_type type_v,
             bool offload,
         uint32_t kv_size,
         uint32_t n_ubatch) :
    model(model), params(params), type_k(type_k), type_v(type_v), offload(offload), kv_size(kv_size),
    n_recent_max(n_recent_max_of(kv_size, n_ubatch)),
    rot_k(n_rot(model.hparams.n_embd_head_k(), type_k, true)), rot_v(n_rot(model.hparams.n_embd_head_v(), type_v, false)) {
    for (uint32_t il = 0; il < params.n_layer; ++il) {
        ops.push_back(get_ops(il));
    }

    kv = alloc(n_owned_init());

    uint64_t n_cells_min = std::numeric_limits<uint64_t>::max();
    uint64_t n_cells_max = 0;
    for (const auto & layer : kv.layers) {
        for (const auto & head : layer.heads) {
            n_cells_min = std::min<uint64_t>(n_cells_min, head.n_owned);
            n_cells_max = std::max<uint64_t>(n_cells_max, head.n_owned);
        }
    }

    const uint32_t n_heads    = params.n_layer*params.n_head_kv;
    const uint64_t size_stock = uint64_t(kv_size)*n_heads*(
            ggml_row_size(type_k, model.hparams.n_embd_head_k()) + ggml_row_size(type_v, model.hparams.n_embd_head_v()));

    LLAMA_LOG_INFO("%s: size = %7.2f MiB (%.1f%% of %.2f MiB), ratio = %.3f, policy = %s, metric = %s, "
            "cells per head = %u recent + %" PRIu64 " .. %" PRIu64 " kept, %u layers x %u heads\n", __func__,
            kv.size()/1024.0/1024.0, 100.0*kv.size()/size_stock, size_stock/1024.0/1024.0, params.ratio,
            params.policy == LLAMA_LUKV_POLICY_CAPACITY ? "capacity" : "prefill", params.metric.c_str(),
            n_recent_max, n_cells_min, n_cells_max, params.n_layer, params.n_head_kv);
}

uint64_t llama_kv_cache_lukv::kv_storage::size() const {
    uint64_t res = 0;
    for (const auto & layer : layers) {
        res += ggml_nbytes(layer.k) + ggml_nbytes(layer.v);
    }
    return res;
}

ggml_backend_dev_t llama_kv_cache_lukv::get_dev(uint32_t il) const {
    return offload ? model.dev_layer(il) : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

llama_kv_cache_lukv::layer_ops llama_kv_cache_lukv::get_ops(uint32_t il) const {
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
    res.score  = ggml_backend_dev_supports_op(dev, scores);
    res.select = ggml_backend_dev_supports_op(dev, ggml_bottom_k_ragged(ctx.get(), scores,
            ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 3, params.n_head_kv), 1));

    // long ubatches: stock's attention on the CPU works on tiles of queries
    if (ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU) {
        res.n_tokens_attn = N_UBATCH_DECODE;
    }

    return res;
}

std::vector<uint32_t> llama_kv_cache_lukv::n_owned_init() const {
    if (params.policy == LLAMA_LUKV_POLICY_PREFILL) {
        return std::vector<uint32_t>(params.budget.size(), kv_size);
    }

    return params.get_n_cells(kv_size);
}

std::vector<uint32_t> llama_kv_cache_lukv::n_owned_plus(uint32_t n) const {
    std::vector<uint32_t> res;
    for (const auto & layer : kv.layers) {
        for (const auto & head : layer.heads) {
            res.push_back(head.n_owned + n);
        }
    }
    return res;
}

llama_kv_cache_lukv::kv_storage llama_kv_cache_lukv::alloc(const std::vector<uint32_t> & n_owned) const {
    const auto & hparams = model.hparams;

    struct buft_comparator {
        bool operator()(const ggml_backend_buffer_type_t & lhs, const ggml_backend_buffer_type_t & rhs) const {
            return strcmp(ggml_backend_buft_name(lhs), ggml_backend_buft_name(rhs)) < 0;
        }
    };
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr, buft_comparator> ctx_map;

    kv_storage res;

    for (uint32_t il = 0; il < params.n_layer; ++il) {
        ggml_backend_buffer_type_t buft = ggml_backend_dev_buffer_type(get_dev(il));

        auto & ctx = ctx_map[buft];
        if (!ctx) {
            ctx.reset(ggml_init({
                /*.mem_size   =*/ 2u*params.n_layer*ggml_tensor_overhead(),
                /*.mem_buffer =*/ nullptr,
                /*.no_alloc   =*/ true,
            }));
            if (!ctx) {
                throw std::runtime_error("failed to create ggml context for kv cache");
            }
        }

        kv_layer layer;

        uint32_t n_rows = 0;
        for (uint32_t ih = 0; ih < params.n_head_kv; ++ih) {
            kv_head head;
            head.offs    = n_rows;
            head.n_owned = n_owned[il*params.n_head_kv + ih];

            n_rows += n_recent_max + head.n_owned;

            layer.heads.push_back(std::move(head));
        }

        layer.k = ggml_new_tensor_2d(ctx.get(), type_k, hparams.n_embd_head_k(il), n_rows);
        layer.v = ggml_new_tensor_2d(ctx.get(), type_v, hparams.n_embd_head_v(il), n_rows);
        ggml_format_name(layer.k, "cache_k_l%d", il);
        ggml_format_name(layer.v, "cache_v_l%d", il);

        res.layers.push_back(std::move(layer));
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

bool llama_kv_cache_lukv::resize(const std::vector<uint32_t> & n_owned) {
    kv_storage kv_new;
    try {
        kv_new = alloc(n_owned);
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        return false;
    }

    ggml_context_ptr ctx { ggml_init({
        /*.mem_size   =*/ 8*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    }) };

    const auto copy_rows = [&](ggml_tensor * src, uint32_t src_row, ggml_tensor * dst, uint32_t dst_row, uint32_t n_rows) {
        if (n_rows == 0) {
            return;
        }

        ggml_reset(ctx.get());

        ggml_tensor * view_src = ggml_view_2d(ctx.get(), src, src->ne[0], n_rows, src->nb[1], src_row*src->nb[1]);
        ggml_tensor * view_dst = ggml_view_2d(ctx.get(), dst, dst->ne[0], n_rows, dst->nb[1], dst_row*dst->nb[1]);
        ggml_backend_view_init(view_src);
        ggml_backend_view_init(view_dst);

        ggml_backend_tensor_copy(view_src, view_dst);
    };

    if (lctx) {
        ggml_backend_sched_synchronize(lctx->get_sched());
    }

    for (uint32_t il = 0; il < params.n_layer; ++il) {
        auto & src = kv.layers[il];
        auto & dst = kv_new.layers[il];

        for (uint32_t ih = 0; ih < params.n_head_kv; ++ih) {
            auto & head_src = src.heads[ih];
            auto & head_dst = dst.heads[ih];

            GGML_ASSERT(head_src.pos.size() <= head_dst.n_owned);

            const uint32_t n_rows = head_src.pos.size() + pos_recent.size();

            copy_rows(src.k, head_src.offs, dst.k, head_dst.offs, n_rows);
            copy_rows(src.v, head_src.offs, dst.v, head_dst.offs, n_rows);

            head_dst.pos = std::move(head_src.pos);
        }
    }

    kv = std::move(kv_new);
    version++;
    version_alloc++;

    return true;
}

llama_memory_context_ptr llama_kv_cache_lukv::init_batch(
            llama_batch_allocr & balloc,
            uint32_t n_ubatch,
            bool embd_all) {
    GGML_UNUSED(embd_all);

    balloc.split_reset();

    std::vector<llama_ubatch> ubatches;
    while (true) {
        auto ubatch = balloc.split_simple(std::min(n_ubatch, n_recent_max));

        if (ubatch.n_tokens == 0) {
            break;
        }

        ubatches.push_back(std::move(ubatch)); // NOLINT
    }

    if (balloc.get_n_used() < balloc.get_n_tokens()) {
        return std::make_unique<llama_kv_cache_lukv_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }

    // this policy never evicts on its own, so it can be full
    if (params.policy == LLAMA_LUKV_POLICY_PREFILL && pos_max + 1 + balloc.get_n_tokens() > kv_size) {
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
    return N_NODES_HEAD*params.n_layer*params.n_head_kv;
}

void llama_kv_cache_lukv::clear(bool data) {
    pos_recent.clear();
    pos_min = -1;
    pos_max = -1;

    has_holes = false;

    for (auto & layer : kv.layers) {
        for (auto & head : layer.heads) {
            head.pos.clear();
        }
    }

    if (prefill_done) {
        prefill_done = false;

        // a new prompt is cached in full again. should there be no memory for it now, the cache grows with the prompt
        resize(n_owned_init());
    }

    if (data) {
        for (auto & [_, buf] : kv.ctxs_bufs) {
            ggml_backend_buffer_clear(buf.get(), 0);
        }
    }

    version++;
}

void llama_kv_cache_lukv::remove_range(llama_pos p0, llama_pos p1) {
    const auto remove = [&](std::vector<llama_pos> & cells) {
        for (auto & pos : cells) {
            if (pos >= p0 && pos < p1) {
                pos = -1;
                has_holes = true;
            }
        }
    };

    remove(pos_recent);
    for (auto & layer : kv.layers) {
        for (auto & head : layer.heads) {
            remove(head.pos);
        }
    }
}

bool llama_kv_cache_lukv::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (seq_id > 0 || pos_max < 0) {
        return true;
    }

    p0 = std::max(p0, 0);
    if (p1 < 0) {
        p1 = std::numeric_limits<llama_pos>::max();
    }

    if (p0 > pos_max || p1 <= pos_min || p0 >= p1) {
        return true;
    }

    if (p0 <= pos_min && p1 > pos_max) {
        clear(false);
        return true;
    }

    remove_range(p0, p1);

    // the logical range. some of its cells may have been evicted from every head
    if (p1 > pos_max) {
        pos_max = p0 - 1;
    } else if (p0 <= pos_min) {
        pos_min = p1;
    }

    return true;
}

void llama_kv_cache_lukv::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);

    if (seq_id_src != seq_id_dst) {
        LLAMA_LOG_ERROR("%s: LU-KV holds one sequence, cannot copy it to another one\n", __func__);
    }
}

void llama_kv_cache_lukv::seq_keep(llama_seq_id seq_id) {
    if (seq_id != 0) {
        clear(false);
    }
}

void llama_kv_cache_lukv::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    if (seq_id <= 0 && shift != 0 && pos_max >= 0 && p0 <= pos_max && p0 != p1) {
        LLAMA_LOG_ERROR("%s: LU-KV does not shift positions, see llama_memory_can_shift()\n", __func__);
    }
}

void llama_kv_cache_lukv::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    if (seq_id <= 0 && d != 1 && pos_max >= 0 && p0 <= pos_max && p0 != p1) {
        LLAMA_LOG_ERROR("%s: LU-KV does not shift positions, see llama_memory_can_shift()\n", __func__);
    }
}

llama_pos llama_kv_cache_lukv::seq_pos_min(llama_seq_id seq_id) const {
    return seq_id == 0 ? pos_min : -1;
}

llama_pos llama_kv_cache_lukv::seq_pos_max(llama_seq_id seq_id) const {
    return seq_id == 0 ? pos_max : -1;
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

    return res;
}

uint32_t llama_kv_cache_lukv::get_n_owned(uint32_t il, uint32_t ih) const {
    return kv.layers[il].heads[ih].n_owned;
}

uint32_t llama_kv_cache_lukv::get_n_used(uint32_t il, uint32_t ih) const {
    const auto & pos = kv.layers[il].heads[ih].pos;

    const auto is_used = [](llama_pos p) { return p >= 0; };

    return std::count_if(pos.begin(), pos.end(), is_used) + std::count_if(pos_recent.begin(), pos_recent.end(), is_used);
}

std::vector<llama_pos> llama_kv_cache_lukv::get_positions(uint32_t il, uint32_t ih) const {
    std::vector<llama_pos> res = kv.layers[il].heads[ih].pos;

    res.insert(res.end(), pos_recent.begin(), pos_recent.end());
    res.erase(std::remove(res.begin(), res.end(), -1), res.end());
    std::sort(res.begin(), res.end());

    return res;
}

uint32_t llama_kv_cache_lukv::get_n_recent_pad(uint32_t n_recent) const {
    return std::min<uint32_t>(GGML_PAD(n_recent, N_RECENT_PAD), n_recent_max);
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
// eviction
//

bool llama_kv_cache_lukv::apply_ubatch(const llama_ubatch & ubatch) {
    const uint32_t n_tokens = ubatch.n_tokens;

    GGML_ASSERT(n_tokens <= n_recent_max);

    if (!compact()) {
        return false;
    }

    if (params.policy == LLAMA_LUKV_POLICY_PREFILL) {
        // the first token that is generated ends the prompt
        if (!prefill_done && n_tokens == 1 && pos_max >= 0 && !commit(lctx)) {
            return false;
        }
        if (pos_recent.size() + n_tokens > n_recent_max) {
            const uint32_t n_recent = pos_recent.size();

            bool grow = false;
            for (const auto & layer : kv.layers) {
                for (const auto & head : layer.heads) {
                    grow = grow || head.pos.size() + n_recent > head.n_owned;
                }
            }

            if ((grow && !resize(n_owned_plus(std::max(N_GROW, n_recent)))) || !evict(n_owned_plus(0))) {
                return false;
            }
        }
    } else {
        const uint32_t n_recent_lim = n_tokens <= N_UBATCH_DECODE ? std::min(N_RECENT_DECODE, n_recent_max) : n_recent_max;

        if (pos_recent.size() + n_tokens > n_recent_lim && !pos_recent.empty() && !commit(lctx)) {
            return false;
        }
    }

    for (uint32_t i = 0; i < n_tokens; ++i) {
        pos_recent.push_back(ubatch.pos[i]);

        pos_max = std::max(pos_max, ubatch.pos[i]);
        if (pos_min < 0) {
            pos_min = ubatch.pos[i];
        }
    }

    return true;
}

bool llama_kv_cache_lukv::commit(llama_context * lctx) {
    this->lctx = lctx;

    if (pos_max < 0) {
        return true;
    }

    if (!compact()) {
        return false;
    }

    if (params.policy == LLAMA_LUKV_POLICY_CAPACITY) {
        return evict(n_owned_plus(0));
    }

    if (prefill_done) {
        return true;
    }

    const uint32_t n_tokens = pos_max - pos_min + 1;

    if (!evict(params.get_n_cells(n_tokens))) {
        return false;
    }

    // give the rest of the memory back
    std::vector<uint32_t> n_owned;
    for (const auto & layer : kv.layers) {
        for (const auto & head : layer.heads) {
            n_owned.push_back(head.pos.size());
        }
    }

    prefill_done = resize(n_owned);

    return prefill_done;
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
    if (!has_holes) {
        return true;
    }

    const auto is_hole = [](llama_pos pos) { return pos < 0; };

    std::vector<llama_pos> pos_recent_new = pos_recent;
    pos_recent_new.erase(std::remove_if(pos_recent_new.begin(), pos_recent_new.end(), is_hole), pos_recent_new.end());

    cell_moves moves(params.n_layer);
    std::vector<std::vector<llama_pos>> pos_new;

    for (uint32_t il = 0; il < params.n_layer; ++il) {
        for (const auto & head : kv.layers[il].heads) {
            std::vector<int32_t> holes;
            for (uint32_t i = 0; i < head.pos.size(); ++i) {
                if (is_hole(head.pos[i])) {
                    holes.push_back(i);
                }
            }

            auto & pos = pos_new.emplace_back(head.pos);
            plan_moves(holes, pos.size(), [&](int32_t src, int32_t dst) {
                moves[il].push_back({ (int32_t) (head.offs + src), (int32_t) (head.offs + dst) });
                pos[dst] = pos[src];
            });
            pos.resize(pos.size() - holes.size());

            // the recent cells follow the kept ones, in their order
            uint32_t src = head.offs + head.pos.size();
            uint32_t dst = head.offs + pos.size();
            for (llama_pos pos : pos_recent) {
                if (!is_hole(pos)) {
                    if (src != dst) {
                        moves[il].push_back({ (int32_t) src, (int32_t) dst });
                    }
                    dst++;
                }
                src++;
            }
        }
    }

    if (!compute_moves(moves)) {
        return false;
    }

    for (uint32_t il = 0; il < params.n_layer; ++il) {
        for (uint32_t ih = 0; ih < params.n_head_kv; ++ih) {
            kv.layers[il].heads[ih].pos = std::move(pos_new[il*params.n_head_kv + ih]);
        }
    }
    pos_recent = std::move(pos_recent_new);

    has_holes = false;
    version++;

    return true;
}

std::vector<int32_t> llama_kv_cache_lukv::get_protected(const kv_head & head) const {
    const int32_t n_kept  = head.pos.size();
    const int32_t n_cells = n_kept + pos_recent.size();

    const auto pos_at    = [&](int32_t i) { return i < n_kept ? head.pos[i] : pos_recent[i - n_kept]; };
    const auto is_sink   = [&](int32_t i) { return pos_at(i) - pos_min < (llama_pos) params.sink;   };
    const auto is_recent = [&](int32_t i) { return pos_max - pos_at(i) < (llama_pos) params.recent; };

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

bool llama_kv_cache_lukv::evict(const std::vector<uint32_t> & n_keep) {
    const int64_t t_start_us = ggml_time_us();

    std::vector<std::vector<int32_t>> rows;
    if (!compute_evicted(n_keep, rows)) {
        return false;
    }

    const int64_t t_selected_us = ggml_time_us();

    const uint32_t n_recent = pos_recent.size();

    cell_moves moves(params.n_layer);
    for (uint32_t il = 0; il < params.n_layer; ++il) {
        for (uint32_t ih = 0; ih < params.n_head_kv; ++ih) {
            const auto & head = kv.layers[il].heads[ih];

            plan_moves(rows[il*params.n_head_kv + ih], head.pos.size() + n_recent, [&](int32_t src, int32_t dst) {
                moves[il].push_back({ (int32_t) head.offs + src, (int32_t) head.offs + dst });
            });
        }
    }

    if (!compute_moves(moves)) {
        return false;
    }

    bool evicted = false;

    for (uint32_t il = 0; il < params.n_layer; ++il) {
        for (uint32_t ih = 0; ih < params.n_head_kv; ++ih) {
            const auto & gone = rows[il*params.n_head_kv + ih];

            auto & pos = kv.layers[il].heads[ih].pos;

            pos.insert(pos.end(), pos_recent.begin(), pos_recent.end());
            plan_moves(gone, pos.size(), [&](int32_t src, int32_t dst) {
                pos[dst] = pos[src];
            });
            pos.resize(pos.size() - gone.size());

            evicted = evicted || !gone.empty();
        }
    }
    pos_recent.clear();

    LLAMA_LOG_DEBUG("%s: %u recent cells, selection %.2f ms, moves %.2f ms\n", __func__, n_recent,
            (t_selected_us - t_start_us)/1000.0, (ggml_time_us() - t_selected_us)/1000.0);

    n_evictions += evicted;
    version++;

    return true;
}

// KeyDiff: the cells whose keys differ most from the mean of the normalised keys stay
// ref: https://arxiv.org/abs/2504.15364
// k [n_embd_head_k, n_cells], ones [1, n_cells] -> [n_cells]
static ggml_tensor * build_score_keydiff(ggml_context * ctx, ggml_tensor * k, ggml_tensor * ones) {
    if (k->type != GGML_TYPE_F32) {
        k = ggml_cast(ctx, k, GGML_TYPE_F32);
    }

    // only the order of the scores matters: neither the length of the normalised keys nor that of their sum does
    ggml_tensor * k_norm = ggml_rms_norm(ctx, k, 1e-12f);
    ggml_tensor * k_sum  = ggml_out_prod(ctx, k_norm, ones); // [n_embd_head_k, 1]

    return ggml_scale(ctx, ggml_mul_mat(ctx, k_norm, k_sum), -1.0f/k->ne[0]/k->ne[1]);
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

    void output(ggml_tensor * t) {
        ggml_set_output(t);
        ggml_build_forward_expand(gf, t);
    }

    bool compute(const char * what) {
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
            ggml_backend_tensor_set(t, data.data(), 0, data.size());
        }
        if (ggml_backend_sched_graph_compute(sched, gf) != GGML_STATUS_SUCCESS) {
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

bool llama_kv_cache_lukv::compute_evicted(const std::vector<uint32_t> & n_keep, std::vector<std::vector<int32_t>> & rows) {
    const uint32_t n_recent = pos_recent.size();

    rows.assign(n_keep.size(), {});

    commit_graph graph(*this, n_nodes_extra() + 1024);

    auto * ctx = graph.ctx.get();

    // the scores on a device, and the heads that give up cells: the first row of each in the scores, its cells, and how many go
    struct selection {
        std::vector<ggml_tensor *> scores;
        std::vector<uint32_t>      heads;
        std::vector<int32_t>       segs;
        std::vector<int64_t>       rows_prot;

        int64_t n_rows = 0;

        bool          on_device = true;
        ggml_tensor * res       = nullptr;
    };
    std::map<ggml_backend_dev_t, selection> selections;

    for (uint32_t il = 0; il < params.n_layer; ++il) {
        const auto & layer = kv.layers[il];

        auto & cur = selections[get_dev(il)];
        cur.on_device = ops[il].select;

        // with the op the scores of a layer have the rows of K, else each head has its own
        std::vector<int32_t> segs;

        for (uint32_t ih = 0; ih < params.n_head_kv; ++ih) {
            const auto & head = layer.heads[ih];

            const uint32_t i       = il*params.n_head_kv + ih;
            const int32_t  n_cells = head.pos.size() + n_recent;

            if (n_cells <= (int32_t) n_keep[i]) {
                continue;
            }

            const int64_t offs = cur.n_rows + (ops[il].score ? head.offs : 0);

            cur.heads.push_back(i);
            cur.segs .insert(cur.segs.end(), { (int32_t) offs, n_cells, n_cells - (int32_t) n_keep[i] });
            for (int32_t row : get_protected(head)) {
                cur.rows_prot.push_back(offs + row);
            }

            if (ops[il].score) {
                segs.insert(segs.end(), { (int32_t) head.offs, n_cells });
                continue;
            }

            ggml_tensor * k    = ggml_view_2d(ctx, layer.k, layer.k->ne[0], n_cells, layer.k->nb[1], head.offs*layer.k->nb[1]);
            ggml_tensor * ones = graph.input(GGML_TYPE_F32, std::vector<float>(n_cells, 1.0f), 1);

            cur.scores.push_back(build_score_keydiff(ctx, k, ones));
            cur.n_rows += n_cells;
        }

        if (!segs.empty()) {
            cur.scores.push_back(ggml_keydiff_ragged(ctx, layer.k, graph.input(GGML_TYPE_I32, segs, 2)));
            cur.n_rows += layer.k->ne[1];
        }
    }

    bool empty = true;

    for (auto & [dev, cur] : selections) {
        if (cur.heads.empty()) {
            continue;
        }
        empty = false;

        for (ggml_tensor * t : cur.scores) {
            graph.devs.emplace_back(t, dev);
        }
        ggml_tensor * scores = concat(ctx, cur.scores);

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

bool llama_kv_cache_lukv::compute_moves(const cell_moves & moves) {
    commit_graph graph(*this, 16*params.n_layer + 16);

    bool empty = true;

    for (uint32_t il = 0; il < params.n_layer; ++il) {
        if (moves[il].empty()) {
            continue;
        }
        empty = false;

        std::vector<int32_t> src;
        std::vector<int64_t> dst;
        for (const auto & move : moves[il]) {
            src.push_back(move.src);
            dst.push_back(move.dst);
        }

        ggml_tensor * idxs_src = graph.input(GGML_TYPE_I32, src, src.size());
        ggml_tensor * idxs_dst = graph.input(GGML_TYPE_I64, dst, dst.size());

        for (ggml_tensor * t : { kv.layers[il].k, kv.layers[il].v }) {
            ggml_tensor * raw = view_raw(graph.ctx.get(), t);

            // note: all rows are read before the first one is written
            ggml_build_forward_expand(graph.gf, ggml_set_rows(graph.ctx.get(), raw, ggml_get_rows(graph.ctx.get(), raw, idxs_src), idxs_dst));
        }
    }

    return empty || graph.compute("moves of cells");
}

//
// graph_build API
//

uint32_t llama_kv_cache_lukv::get_n_kept(uint32_t il, uint32_t ih, bool full) const {
    const auto & head = kv.layers[il].heads[ih];

    return full ? head.n_owned : head.pos.size();
}

uint32_t llama_kv_cache_lukv::get_n_kept_max(bool full) const {
    uint32_t res = 0;
    for (uint32_t il = 0; il < params.n_layer; ++il) {
        for (uint32_t ih = 0; ih < params.n_head_kv; ++ih) {
            res = std::max(res, get_n_kept(il, ih, full));
        }
    }
    return res;
}

static ggml_tensor * view_cells(ggml_context * ctx, ggml_tensor * t, uint32_t row, uint32_t n_cells) {
    return ggml_view_3d(ctx, t, t->ne[0], 1, n_cells, t->nb[1], t->nb[1], row*t->nb[1]);
}

ggml_tensor * llama_kv_cache_lukv::get_k(ggml_context * ctx, uint32_t il, uint32_t ih, uint32_t n_cells) const {
    return view_cells(ctx, kv.layers[il].k, kv.layers[il].heads[ih].offs, n_cells);
}

ggml_tensor * llama_kv_cache_lukv::get_v(ggml_context * ctx, uint32_t il, uint32_t ih, uint32_t n_cells) const {
    return view_cells(ctx, kv.layers[il].v, kv.layers[il].heads[ih].offs, n_cells);
}

static ggml_tensor * cpy_rows(ggml_context * ctx, ggml_tensor * dst, ggml_tensor * cur, ggml_tensor * idxs, uint32_t il) {
    const int64_t n_rows = cur->ne[1]*cur->ne[2];

    // the heads may be a part of a larger tensor
    if (!ggml_is_contiguous(cur)) {
        cur = ggml_cont(ctx, cur);
    }

    return ggml_set_rows(ctx, dst,
            ggml_reshape_2d(ctx, cur, cur->ne[0], n_rows),
            ggml_view_1d(ctx, idxs, n_rows, il*idxs->nb[1]));
}

ggml_tensor * llama_kv_cache_lukv::cpy_k(ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * idxs, uint32_t il) const {
    return cpy_rows(ctx, kv.layers[il].k, k_cur, idxs, il);
}

ggml_tensor * llama_kv_cache_lukv::cpy_v(ggml_context * ctx, ggml_tensor * v_cur, ggml_tensor * idxs, uint32_t il) const {
    return cpy_rows(ctx, kv.layers[il].v, v_cur, idxs, il);
}

void llama_kv_cache_lukv::set_input_idxs(ggml_tensor * dst, uint32_t n_tokens) const {
    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer));
    GGML_ASSERT(n_tokens <= pos_recent.size());

    int64_t * data = (int64_t *) dst->data;

    const uint32_t i0 = pos_recent.size() - n_tokens;

    for (uint32_t il = 0; il < params.n_layer; ++il) {
        for (uint32_t i = 0; i < n_tokens; ++i) {
            for (uint32_t ih = 0; ih < params.n_head_kv; ++ih) {
                const auto & head = kv.layers[il].heads[ih];

                *data++ = head.offs + head.pos.size() + i0 + i;
            }
        }
    }
}

void llama_kv_cache_lukv::set_input_segs(ggml_tensor * dst, uint32_t n_recent_pad) const {
    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer));

    int32_t * data = (int32_t *) dst->data;

    for (const auto & layer : kv.layers) {
        for (const auto & head : layer.heads) {
            *data++ = head.offs;
            *data++ = head.pos.size() + n_recent_pad;
        }
    }
}

void llama_kv_cache_lukv::set_input_n_hidden(ggml_tensor * dst, const llama_ubatch & ubatch, bool causal_attn) const {
    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer));

    int32_t * data = (int32_t *) dst->data;

    // the positions of a sequence ascend
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const auto n_seen = causal_attn ?
            std::upper_bound(pos_recent.begin(), pos_recent.end(), ubatch.pos[i]) - pos_recent.begin() : pos_recent.size();

        data[i] = get_n_recent_pad(pos_recent.size()) - n_seen;
    }
}

bool llama_kv_cache_lukv::use_ragged(uint32_t il, uint32_t n_tokens) const {
    return ops[il].attn && n_tokens <= ops[il].n_tokens_attn;
}

bool llama_kv_cache_lukv::use_ragged(uint32_t n_tokens) const {
    for (uint32_t il = 0; il < params.n_layer; ++il) {
        if (!use_ragged(il, n_tokens)) {
            return false;
        }
    }
    return true;
}

// orthonormal Walsh-Hadamard matrix
void llama_kv_cache_lukv::set_input_rot(ggml_tensor * dst) {
    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer));

    const uint32_t n = dst->ne[0];
    for (uint32_t i = 0; i < n; ++i) {
        for (uint32_t j = 0; j < n; ++j) {
            bool odd = false;
            for (uint32_t bits = i & j; bits != 0; bits &= bits - 1) {
                odd = !odd;
            }
            ((float *) dst->data)[i*n + j] = (odd ? -1.0f : 1.0f)/sqrtf(n);
        }
    }
}

template <typename T>
static void fill_kq_mask(T * data, int64_t n_cols, const std::vector<llama_pos> & pos_recent, uint32_t n_recent_pad,
        const llama_ubatch & ubatch, bool causal_attn, T visible, T hidden) {
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        T * row    = data + i*n_cols;
        T * recent = row  + n_cols - n_recent_pad;

        std::fill(row,    recent,                visible);
        std::fill(recent, recent + n_recent_pad, hidden);

        for (uint32_t j = 0; j < pos_recent.size(); ++j) {
            if (!causal_attn || pos_recent[j] <= ubatch.pos[i]) {
                recent[j] = visible;
            }
        }
    }
}

void llama_kv_cache_lukv::set_input_kq_mask(ggml_tensor * dst, const llama_ubatch & ubatch, bool causal_attn) const {
    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer));

    const uint32_t n_recent_pad = get_n_recent_pad(pos_recent.size());

    if (dst->type == GGML_TYPE_F16) {
        fill_kq_mask((ggml_fp16_t *) dst->data, dst->ne[0], pos_recent, n_recent_pad, ubatch, causal_attn,
                ggml_fp32_to_fp16(0.0f), ggml_fp32_to_fp16(-INFINITY));
    } else {
        fill_kq_mask((float *) dst->data, dst->ne[0], pos_recent, n_recent_pad, ubatch, causal_attn, 0.0f, -INFINITY);
    }
}

//
// state
//

void llama_kv_cache_lukv::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    GGML_UNUSED(flags);

    const auto write_u32 = [&](uint32_t val) { io.write(&val, sizeof(val)); };

    const bool empty = seq_id > 0 || pos_max < 0;

    write_u32(STATE_MAGIC);
    write_u32(params.n_layer);
    write_u32(params.n_head_kv);
    write_u32(type_k);
    write_u32(type_v);
    write_u32(empty ? -1 : pos_min);
    write_u32(empty ? -1 : pos_max);
    write_u32(prefill_done);

    if (empty) {
        return;
    }

    const uint32_t n_recent = pos_recent.size();

    write_u32(n_recent);
    io.write(pos_recent.data(), n_recent*sizeof(llama_pos));

    for (const auto & layer : kv.layers) {
        for (const auto & head : layer.heads) {
            const uint32_t n_kept = head.pos.size();

            write_u32(n_kept);
            io.write(head.pos.data(), n_kept*sizeof(llama_pos));

            for (ggml_tensor * t : { layer.k, layer.v }) {
                io.write_tensor(t, head.offs*t->nb[1], (n_kept + n_recent)*t->nb[1]);
            }
        }
    }
}

void llama_kv_cache_lukv::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    GGML_UNUSED(seq_id);
    GGML_UNUSED(flags);

    clear(false);

    if (!state_read_impl(io)) {
        io.discard();
        clear(false);
        throw std::runtime_error("failed to restore kv cache");
    }
}

bool llama_kv_cache_lukv::state_read_impl(llama_io_read_i & io) {
    const auto read_u32 = [&]() { uint32_t val; io.read(&val, sizeof(val)); return val; };

    if (read_u32() != STATE_MAGIC) {
        LLAMA_LOG_ERROR("%s: the state was saved without LU-KV, it cannot be restored with it\n", __func__);
        return false;
    }

    if (read_u32() != params.n_layer || read_u32() != params.n_head_kv || read_u32() != (uint32_t) type_k || read_u32() != (uint32_t) type_v) {
        LLAMA_LOG_ERROR("%s: the state was saved for another model or another type of the KV cache\n", __func__);
        return false;
    }

    const llama_pos p_min = read_u32();
    const llama_pos p_max = read_u32();

    const bool done = read_u32();

    if (p_max < 0) {
        return true;
    }

    if (done) {
        if (params.policy != LLAMA_LUKV_POLICY_PREFILL) {
            LLAMA_LOG_ERROR("%s: the state was saved under another policy\n", __func__);
            return false;
        }
    }

    const uint32_t n_recent = read_u32();
    if (n_recent > n_recent_max) {
        LLAMA_LOG_ERROR("%s: the state has %u recent tokens, but there is room for %u: use the n_ubatch that it was saved with\n", __func__, n_recent, n_recent_max);
        return false;
    }

    pos_recent.resize(n_recent);
    io.read(pos_recent.data(), n_recent*sizeof(llama_pos));

    for (auto & layer : kv.layers) {
        for (auto & head : layer.heads) {
            const uint32_t n_kept = read_u32();
            if (n_kept > head.n_owned) {
                LLAMA_LOG_ERROR("%s: the state has more cells for a head than it owns (%u > %u): use the ratio and n_ctx that it was saved with\n", __func__, n_kept, head.n_owned);
                return false;
            }

            head.pos.resize(n_kept);
            io.read(head.pos.data(), n_kept*sizeof(llama_pos));

            for (ggml_tensor * t : { layer.k, layer.v }) {
                io.read_tensor(t, head.offs*t->nb[1], (n_kept + n_recent)*t->nb[1]);
            }
        }
    }

    pos_min = p_min;
    pos_max = p_max;

    prefill_done = done;

    has_holes = true; // perhaps

    return true;
}

//
// llama_kv_cache_lukv_context
//

llama_kv_cache_lukv_context::llama_kv_cache_lukv_context(llama_memory_status status) : status(status) {}

llama_kv_cache_lukv_context::llama_kv_cache_lukv_context(llama_kv_cache_lukv * kv) :
    status(LLAMA_MEMORY_STATUS_SUCCESS), kv(kv), full(true) {}

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

uint32_t llama_kv_cache_lukv_context::get_n_recent_pad(uint32_t n_tokens) const {
    // the tokens of the ubatch are recent already when the graph is built
    return full ? kv->get_n_recent_max() : kv->get_n_recent_pad(std::max(kv->get_n_recent(), n_tokens));
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

    kv->set_input_idxs(self_idxs, ubatch->n_tokens);

    // where the attention is computed head by head
    if (self_kq_mask && self_kq_mask->buffer) {
        kv->set_input_kq_mask(self_kq_mask, *ubatch, cparams.causal_attn);
    }

    // where it is computed for all heads together
    if (self_segs->buffer) {
        kv->set_input_segs    (self_segs, n_recent_pad);
        kv->set_input_n_hidden(self_n_hidden, *ubatch, cparams.causal_attn);
    }

    for (ggml_tensor * rot : { self_k_rot, self_v_rot }) {
        if (rot && rot->buffer) {
            llama_kv_cache_lukv::set_input_rot(rot);
        }
    }
}

bool llm_graph_input_attn_kv_lukv::can_reuse(const llm_graph_params & params) {
    mctx_lukv = static_cast<const llama_kv_cache_lukv_context *>(params.mctx);

    const auto * kv = mctx_lukv->get_kv();

    return self_n_hidden->ne[0] == params.ubatch.n_tokens &&
        version_alloc == kv->get_version_alloc() &&
        (ragged || version == kv->get_version()) &&
        n_recent_pad == mctx_lukv->get_n_recent_pad(params.ubatch.n_tokens);
}

ggml_tensor * llm_graph_input_attn_kv_lukv::on_device(const llm_graph_context & gctx, ggml_tensor * input, int il) const {
    ggml_backend_dev_t dev = mctx_lukv->get_kv()->get_dev(il);
    if (ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU) {
        return input;
    }

    auto & res = copies[{ input, dev }];
    if (!res) {
        res = ggml_cont(gctx.ctx0, input);
        ggml_backend_sched_set_tensor_backend(gctx.sched, res, find_backend(gctx.sched, dev));
    }
    return res;
}

std::unique_ptr<llm_graph_input_attn_kv_lukv> build_attn_inp_kv_lukv(
           ggml_context * ctx,
     const llama_ubatch & ubatch,
    const llama_hparams & hparams,
    const llama_cparams & cparams,
    const llama_kv_cache_lukv_context * mctx) {
    const auto * kv = mctx->get_kv();

    auto inp = std::make_unique<llm_graph_input_attn_kv_lukv>(hparams, cparams, mctx);

    inp->version       = kv->get_version();
    inp->version_alloc = kv->get_version_alloc();
    inp->n_recent_pad  = mctx->get_n_recent_pad(ubatch.n_tokens);
    inp->ragged        = cparams.flash_attn && kv->use_ragged(ubatch.n_tokens);

    inp->self_idxs = ggml_new_tensor_2d(ctx, GGML_TYPE_I64, kv->get_params().n_head_kv*ubatch.n_tokens, kv->get_params().n_layer);
    ggml_set_input(inp->self_idxs);
    ggml_set_name (inp->self_idxs, "attn_inp_idxs_lukv");

    inp->self_segs = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, 2, kv->get_params().n_head_kv, kv->get_params().n_layer);
    ggml_set_input(inp->self_segs);
    ggml_set_name (inp->self_segs, "attn_inp_segs_lukv");

    inp->self_n_hidden = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, ubatch.n_tokens);
    ggml_set_input(inp->self_n_hidden);
    ggml_set_name (inp->self_n_hidden, "attn_inp_n_hidden_lukv");

    if (!inp->ragged) {
        // flash attention requires an f16 mask
        inp->self_kq_mask = ggml_new_tensor_2d(ctx, cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32,
                inp->n_recent_pad + kv->get_n_kept_max(mctx->is_full()), ubatch.n_tokens);
        ggml_set_input(inp->self_kq_mask);
        ggml_set_name (inp->self_kq_mask, "attn_inp_kq_mask_lukv");
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

    const uint32_t n_head_kv = kv->get_params().n_head_kv;
    const int64_t  n_gqa     = q_cur->ne[1]/n_head_kv;

    if (gctx.cparams.flash_attn && kv->use_ragged(il, gctx.n_tokens)) {
        ggml_tensor * segs = inp->on_device(gctx, inp->self_segs, il);

        ggml_tensor * cur = ggml_flash_attn_ragged(ctx0, q_cur, kv->get_k(il), kv->get_v(il),
                ggml_view_2d(ctx0, segs, segs->ne[0], segs->ne[1], segs->nb[1], il*segs->nb[2]), inp->self_n_hidden,
                sinks, kq_scale, gctx.hparams.attn_soft_cap ? gctx.hparams.f_attn_logit_softcapping : 0.0f);

        cur = ggml_reshape_2d(ctx0, cur, cur->ne[0]*cur->ne[1], cur->ne[2]);
        ggml_build_forward_expand(gctx.gf, cur);

        return cur;
    }

    std::vector<ggml_tensor *> outs;

    for (uint32_t ih = 0; ih < n_head_kv; ++ih) {
        const uint32_t n_cells = kv->get_n_kept(il, ih, inp->mctx_lukv->is_full()) + inp->n_recent_pad;

        ggml_tensor * q = ggml_view_3d(ctx0, q_cur, q_cur->ne[0], n_gqa, q_cur->ne[2], q_cur->nb[1], q_cur->nb[2], ih*n_gqa*q_cur->nb[1]);
        ggml_tensor * k = kv->get_k(ctx0, il, ih, n_cells);
        ggml_tensor * v = kv->get_v(ctx0, il, ih, n_cells);

        // the last columns of the mask
        ggml_tensor * kq_mask = inp->on_device(gctx, inp->self_kq_mask, il);
        kq_mask = ggml_view_2d(ctx0, kq_mask, n_cells, kq_mask->ne[1], kq_mask->nb[1], (kq_mask->ne[0] - n_cells)*kq_mask->nb[0]);
        if (!gctx.cparams.flash_attn) {
            kq_mask = ggml_cont(ctx0, kq_mask); // required by the soft max
        }

        ggml_tensor * sinks_h = sinks ? ggml_view_1d(ctx0, sinks, n_gqa, ih*n_gqa*sinks->nb[0]) : nullptr;

        outs.push_back(gctx.build_attn_mha(q, k, v, nullptr, kq_mask, sinks_h, nullptr, 0, kq_scale, il));
    }

    ggml_tensor * cur = concat(ctx0, std::move(outs));
    ggml_build_forward_expand(gctx.gf, cur);

    return cur;
}

//
// memory
//

static std::string lukv_unsupported(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
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
            break;
        default:
            return format("the architecture %s is not supported yet", llm_arch_name(model.arch));
    }

    if (hparams.swa_type != LLAMA_SWA_TYPE_NONE) {
        return "sliding-window attention is not supported yet";
    }
    if (hparams.use_alibi || hparams.n_pos_per_embd() > 1 || hparams.n_layer_nextn > 0 || params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT) {
        return "this kind of model or context is not supported";
    }
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        if (hparams.n_head_kv(il) != hparams.n_head_kv(0) || !hparams.has_kv(il)) {
            return "layers with different numbers of KV heads are not supported yet";
        }
    }
    if (hparams.n_embd_head_k() % ggml_blck_size(params.type_k) != 0 || hparams.n_embd_head_v() % ggml_blck_size(params.type_v) != 0) {
        return format("heads of the size %u cannot be stored as %s and %s", hparams.n_embd_head_k(), ggml_type_name(params.type_k), ggml_type_name(params.type_v));
    }
    if (cparams.n_seq_max > 1) {
        return format("%u parallel sequences are not supported yet, use 1 (--parallel 1)", cparams.n_seq_max);
    }

    return "";
}

llama_memory_i * llama_lukv_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    if (!model.lukv) {
        return nullptr;
    }

    const std::string reason = lukv_unsupported(model, params, cparams);
    if (!reason.empty()) {
        LLAMA_LOG_WARN("%s: LU-KV is off, the KV cache has its full size: %s\n", __func__, reason.c_str());
        return nullptr;
    }

    return new llama_kv_cache_lukv(model, *model.lukv, params.type_k, params.type_v, cparams.offload_kqv, cparams.n_ctx_seq, cparams.n_ubatch);
}

//
// interface implementation
//

static llama_kv_cache_lukv * get_lukv(const llama_context * ctx) {
    return dynamic_cast<llama_kv_cache_lukv *>(ctx->get_memory());
}

static bool has_head(const llama_kv_cache_lukv * kv, int32_t il, int32_t ih) {
    return kv && il >= 0 && ih >= 0 && il < (int32_t) kv->get_params().n_layer && ih < (int32_t) kv->get_params().n_head_kv;
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

int32_t llama_lukv_n_layer(const llama_context * ctx) {
    const auto * kv = get_lukv(ctx);
    return kv ? kv->get_params().n_layer : 0;
}

int32_t llama_lukv_n_head_kv(const llama_context * ctx) {
    const auto * kv = get_lukv(ctx);
    return kv ? kv->get_params().n_head_kv : 0;
}

float llama_lukv_ratio(const llama_context * ctx) {
    const auto * kv = get_lukv(ctx);
    return kv ? kv->get_params().ratio : 0.0f;
}

int32_t llama_lukv_n_cells_recent(const llama_context * ctx) {
    const auto * kv = get_lukv(ctx);
    return kv ? kv->get_n_recent_max() : 0;
}

int64_t llama_lukv_n_evictions(const llama_context * ctx) {
    const auto * kv = get_lukv(ctx);
    return kv ? kv->get_n_evictions() : 0;
}

int32_t llama_lukv_n_cells_owned(const llama_context * ctx, int32_t il, int32_t ih) {
    const auto * kv = get_lukv(ctx);
    return has_head(kv, il, ih) ? kv->get_n_owned(il, ih) : -1;
}

int32_t llama_lukv_n_cells_used(const llama_context * ctx, int32_t il, int32_t ih) {
    const auto * kv = get_lukv(ctx);
    return has_head(kv, il, ih) ? kv->get_n_used(il, ih) : -1;
}

int32_t llama_lukv_get_positions(const llama_context * ctx, int32_t il, int32_t ih, llama_pos * res, int32_t n_max) {
    const auto * kv = get_lukv(ctx);
    if (!has_head(kv, il, ih)) {
        return -1;
    }

    const auto pos = kv->get_positions(il, ih);
    if (res) {
        std::copy_n(pos.begin(), std::min<size_t>(pos.size(), std::max(n_max, 0)), res);
    }

    return pos.size();
}

bool llama_lukv_commit(llama_context * ctx) {
    auto * kv = get_lukv(ctx);
    return kv ? kv->commit(ctx) : true;
}
