#include "llama-kv-cache-lukv.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-lukv-impl.h"
#include "llama-model.h"

#include "ggml-ragged.h"

#include <algorithm>
#include <cmath>
#include <utility>

// columns: devices read the mask in words of up to 16 bytes
static constexpr int64_t N_MASK_ALIGN = 8;

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

static ggml_tensor * rotate(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * rot) {
    return rot ? llama_mul_mat_hadamard(ctx, cur, rot) : cur;
}

static ggml_tensor * cpy_rows(ggml_context * ctx, ggml_tensor * dst, ggml_tensor * cur, ggml_tensor * idxs) {
    // the heads may be a part of a larger tensor
    if (!ggml_is_contiguous(cur)) {
        cur = ggml_cont(ctx, cur);
    }

    return ggml_set_rows(ctx, dst, ggml_reshape_2d(ctx, cur, cur->ne[0], cur->ne[1]*cur->ne[2]), idxs);
}

void llama_kv_cache_lukv::build_store(const llm_graph_context & gctx, const llm_graph_input_attn_kv_lukv * inp,
        ggml_tensor * k_cur, ggml_tensor * v_cur, int32_t il) const {
    ggml_context * ctx = gctx.ctx0;

    ggml_tensor * idxs = view_idxs(ctx, inp->on_device(gctx, inp->self_idxs, il), il);

    if (ops[map_layer_ids.at(il)].store) {
        ggml_build_forward_expand(gctx.gf, ggml_store_ragged(ctx, k_cur, v_cur, get_k(il), get_v(il), idxs, rot_k, rot_v));
        return;
    }
    ggml_build_forward_expand(gctx.gf, cpy_rows(ctx, get_k(il), rotate(ctx, k_cur, inp->rot_k), idxs));
    ggml_build_forward_expand(gctx.gf, cpy_rows(ctx, get_v(il), rotate(ctx, v_cur, inp->rot_v), idxs));
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
    if (!queries->has_state()) {
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
        const auto & pos_recent = seqs.at(get_source(ubatch.seq_id[i][0])).pos_recent;

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

    const llama_seq_id id = get_source(ubatch.seq_id[0][0]);

    const auto &   pos_recent   = seqs.at(id).pos_recent;
    const uint32_t n_recent_pad = get_n_recent_pad(id);

    if (dst->type == GGML_TYPE_F16) {
        fill_kq_mask((ggml_fp16_t *) dst->data, dst->ne[0], pos_recent, n_recent_pad, ubatch, cparams.causal_attn,
                ggml_fp32_to_fp16(0.0f), ggml_fp32_to_fp16(-INFINITY));
    } else {
        fill_kq_mask((float *) dst->data, dst->ne[0], pos_recent, n_recent_pad, ubatch, cparams.causal_attn, 0.0f, -INFINITY);
    }
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

    for (ggml_tensor * rot : { rot_k, rot_v }) {
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
    inp->rot_k = new_rot(kv->get_rot_k(), "attn_inp_k_rot_lukv");
    inp->rot_v = new_rot(kv->get_rot_v(), "attn_inp_v_rot_lukv");

    return inp;
}

void llama_kv_cache_lukv::build_attn_sums(const llm_graph_context & gctx, const llm_graph_input_attn_kv_lukv * inp, ggml_tensor * q_cur,
        float kq_scale, int32_t il) const {
    ggml_context * ctx = gctx.ctx0;

    ggml_tensor * sums = get_layer(il).attn_sums;

    const float soft_cap = model.hparams.attn_soft_cap ? model.hparams.f_attn_logit_softcapping : 0.0f;

    if (has_scores_op(il)) {
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

    // what fits the keys as they are stored. where the op for all heads rotates by itself and nothing else asks for this, it is not computed
    ggml_tensor * q_rot = rotate(ctx0, q_cur, inp->rot_k);

    kv->build_store(gctx, inp, k_cur, v_cur, il);

    if (kv->get_queries().active()) {
        kv->get_queries().build_store(gctx, inp->self_queries, q_rot, inp->rot_k, kq_scale, il, kv->has_query_sums_op(il));
    }
    if (kv->get_needs().attn_sums) {
        kv->build_attn_sums(gctx, inp, q_rot, kq_scale, il);
    }

    const uint32_t n_head_kv = kv->get_params().n_head_kv;
    const int64_t  n_gqa     = q_cur->ne[1]/n_head_kv;

    if (kv->use_ragged(il, gctx.n_tokens)) {
        ggml_tensor * segs = kv->view_segs(ctx0, inp->on_device(gctx, inp->self_segs, il), il);

        const bool inside = kv->has_rotating_op(il);

        ggml_tensor * cur = ggml_flash_attn_ragged(ctx0, inside ? q_cur : q_rot, kv->get_k(il), kv->get_v(il), segs, inp->self_n_hidden,
                sinks, kq_scale, gctx.hparams.attn_soft_cap ? gctx.hparams.f_attn_logit_softcapping : 0.0f,
                inside ? kv->get_rot_k() : 0, inside ? kv->get_rot_v() : 0);

        cur = ggml_reshape_2d(ctx0, cur, cur->ne[0]*cur->ne[1], cur->ne[2]);
        cur = inside ? cur : rotate(ctx0, cur, inp->rot_v);
        ggml_build_forward_expand(gctx.gf, cur);

        return cur;
    }

    std::vector<ggml_tensor *> outs;

    for (uint32_t ih = 0; ih < n_head_kv; ++ih) {
        const uint32_t n_cells = kv->get_n_cells(inp->seq_id, il, ih);

        ggml_tensor * q = ggml_view_3d(ctx0, q_rot, q_rot->ne[0], n_gqa, q_rot->ne[2], q_rot->nb[1], q_rot->nb[2], ih*n_gqa*q_rot->nb[1]);
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
    cur = rotate(ctx0, ggml_reshape_2d(ctx0, cur, cur->ne[0], cur->ne[2]), inp->rot_v);
    ggml_build_forward_expand(gctx.gf, cur);

    return cur;
}
