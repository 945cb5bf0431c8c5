#include "llama-lukv-queries.h"

#include "llama-batch.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-lukv-state.h"
#include "llama-model.h"

#include "ggml-ragged.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

//
// llama_lukv_queries
//

bool llama_lukv_queries::rope_op::operator<(const rope_op & other) const {
    return std::tie(none, factors, params) < std::tie(other.none, other.factors, other.params);
}

std::vector<std::pair<ggml_tensor *, uint32_t>> llama_lukv_queries::layer::tensors(uint32_t n_window) const {
    std::vector<std::pair<ggml_tensor *, uint32_t>> res;
    if (last) {
        res.emplace_back(last, n_window);
    }
    for (ggml_tensor * t : { sum, outer, k_sum }) {
        if (t) {
            res.emplace_back(t, 1);
        }
    }
    return res;
}

llama_lukv_queries::llama_lukv_queries(
        const llama_model & model,
        const llama_lukv_needs & needs,
        const std::map<int32_t, ggml_backend_dev_t> & devs,
        uint32_t sink,
        uint32_t n_seq_max) : needs(needs), model(model), sink(sink) {
    const auto & hparams = model.hparams;

    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctx_map;

    for (const auto & [il, dev] : devs) {
        layer cur;

        if (has_state()) {
            auto & ctx = ctx_map[ggml_backend_dev_buffer_type(dev)];
            if (!ctx) {
                ctx.reset(ggml_init({
                    /*.mem_size   =*/ 4*devs.size()*ggml_tensor_overhead(),
                    /*.mem_buffer =*/ nullptr,
                    /*.no_alloc   =*/ true,
                }));
            }

            const int64_t n_head = hparams.n_head(il);
            const int64_t n_embd = hparams.n_embd_head_k(il);

            if (needs.n_window > 0) {
                cur.last = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_embd*n_head, needs.n_window*n_seq_max);
                ggml_format_name(cur.last, "cache_q_last_l%d", il);
            }
            if (needs.n_future > 0) {
                cur.sum = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_embd*n_head, n_seq_max);
                ggml_format_name(cur.sum, "cache_q_sum_l%d", il);
            }
            if (needs.q_cov) {
                cur.outer = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_embd*n_embd*n_head, n_seq_max);
                ggml_format_name(cur.outer, "cache_q_outer_l%d", il);
            }
            if (needs.k_sum) {
                cur.k_sum = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_embd*hparams.n_head_kv(il), n_seq_max);
                ggml_format_name(cur.k_sum, "cache_k_sum_l%d", il);
            }
        }

        layers[il] = cur;
    }

    for (auto & [buft, ctx] : ctx_map) {
        ggml_backend_buffer_t buf;
        if (hparams.no_alloc) {
            buf = ggml_backend_buft_alloc_buffer(buft, /*size =*/ 0); // dummy buffer
            for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t != nullptr; t = ggml_get_next_tensor(ctx.get(), t)) {
                t->buffer = buf;
            }
        } else {
            buf = ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft);
        }
        if (!buf) {
            throw std::runtime_error("failed to allocate buffer for what the metric keeps of sequences");
        }

        LLAMA_LOG_INFO("%s: %10s metric buffer size = %8.2f MiB\n", __func__, ggml_backend_buffer_name(buf), ggml_backend_buffer_get_size(buf)/1024.0/1024.0);

        ggml_backend_buffer_clear(buf, 0);

        ctxs_bufs.emplace_back(std::move(ctx), buf);
    }
}

size_t llama_lukv_queries::size() const {
    size_t res = 0;
    for (const auto & [_, layer] : layers) {
        for (const auto & [t, __] : layer.tensors(needs.n_window)) {
            res += ggml_nbytes(t);
        }
    }
    return res;
}

std::map<ggml_backend_buffer_type_t, size_t> llama_lukv_queries::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;
    for (const auto & [ctx, buf] : ctxs_bufs) {
        ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(buf.get());

        res[buft] += model.hparams.no_alloc ? ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft) : ggml_backend_buffer_get_size(buf.get());
    }
    return res;
}

void llama_lukv_queries::init_seq(seq_state & seq, const std::vector<int32_t> & used) const {
    seq.slot = 0;
    while (std::find(used.begin(), used.end(), seq.slot) != used.end()) {
        seq.slot++;
    }
    seq.pos.assign(needs.n_window, -1);
    seq.n_sum = 0;

    for (const auto & [_, layer] : layers) {
        for (ggml_tensor * t : { layer.sum, layer.outer, layer.k_sum }) {
            if (t) {
                ggml_backend_tensor_memset(t, 0, seq.slot*t->nb[1], t->nb[1]);
            }
        }
    }
}

void llama_lukv_queries::add(seq_state & seq, const llama_pos * pos, uint32_t n, llama_pos pos_min) const {
    for (uint32_t i = n - std::min(n, needs.n_window); i < n; ++i) {
        seq.pos[pos[i] % needs.n_window] = pos[i];
    }
    seq.n_sum += std::count_if(pos, pos + n, [&](llama_pos p) { return p - pos_min >= (llama_pos) sink; });
}

void llama_lukv_queries::remove(seq_state & seq, llama_pos p0, llama_pos p1) const {
    // what was summed stays: it says what queries and keys are like
    for (llama_pos & pos : seq.pos) {
        if (pos >= p0 && pos < p1) {
            pos = -1;
        }
    }
}

void llama_lukv_queries::copy(const seq_state & src, seq_state & dst, llama_pos p0, llama_pos p1) const {
    dst.pos   = src.pos;
    dst.n_sum = src.n_sum;
    for (llama_pos & pos : dst.pos) {
        if (pos < p0 || pos >= p1) {
            pos = -1;
        }
    }

    std::vector<uint8_t> data;
    for (const auto & [_, layer] : layers) {
        for (const auto & [t, n] : layer.tensors(needs.n_window)) {
            data.resize(n*t->nb[1]);

            ggml_backend_tensor_get(t, data.data(), src.slot*data.size(), data.size());
            ggml_backend_tensor_set(t, data.data(), dst.slot*data.size(), data.size());
        }
    }
}

void llama_lukv_queries::state_write(llama_io_write_i & io, const seq_state & seq) const {
    io.write(seq.pos.data(), seq.pos.size()*sizeof(llama_pos));
    io.write(&seq.n_sum, sizeof(seq.n_sum));

    for (const auto & [_, layer] : layers) {
        for (const auto & [t, n] : layer.tensors(needs.n_window)) {
            llama_lukv_write_rows(io, t, seq.slot*n, n);
        }
    }
}

void llama_lukv_queries::state_read(llama_io_read_i & io, seq_state & seq) const {
    io.read(seq.pos.data(), seq.pos.size()*sizeof(llama_pos));
    io.read(&seq.n_sum, sizeof(seq.n_sum));

    for (uint32_t i = 0; i < seq.pos.size(); ++i) {
        if (seq.pos[i] < -1 || (seq.pos[i] >= 0 && seq.pos[i] % needs.n_window != i)) {
            throw std::runtime_error("it is damaged");
        }
    }

    for (const auto & [_, layer] : layers) {
        for (const auto & [t, n] : layer.tensors(needs.n_window)) {
            llama_lukv_read_rows(io, t, seq.slot*n, n);
        }
    }
}

//
// graph_build API
//

uint32_t llama_lukv_queries::n_last(const llama_ubatch & ubatch) const {
    return std::min(ubatch.n_tokens/ubatch.n_seqs, needs.n_window);
}

llama_lukv_queries::graph_inputs llama_lukv_queries::build_inputs(ggml_context * ctx, const llama_ubatch & ubatch) const {
    const auto input = [&](ggml_type type, int64_t ne0, int64_t ne1, const char * name) {
        ggml_tensor * res = ggml_new_tensor_2d(ctx, type, ne0, ne1);
        ggml_set_input(res);
        ggml_set_name (res, name);
        return res;
    };

    graph_inputs res;
    if (needs.n_window > 0) {
        res.rows = input(GGML_TYPE_I64, n_last(ubatch)*ubatch.n_seqs, 1, "attn_inp_q_rows_lukv");
    }
    if (needs.n_future > 0) {
        res.slots   = input(GGML_TYPE_I32, ubatch.n_seqs, 1, "attn_inp_q_slots_lukv");
        res.counted = input(GGML_TYPE_F32, ubatch.n_tokens/ubatch.n_seqs, ubatch.n_seqs, "attn_inp_q_counted_lukv");
    }
    return res;
}

void llama_lukv_queries::set_inputs(const graph_inputs & inp, const llama_ubatch & ubatch, const std::vector<const seq_state *> & seqs,
        const std::vector<llama_pos> & pos_min) const {
    const uint32_t n = ubatch.n_tokens/ubatch.n_seqs;

    if (inp.rows && inp.rows->buffer) {
        int64_t * data = (int64_t *) inp.rows->data;
        for (uint32_t s = 0; s < ubatch.n_seqs; ++s) {
            for (uint32_t i = (s + 1)*n - n_last(ubatch); i < (s + 1)*n; ++i) {
                *data++ = int64_t(seqs[s]->slot)*needs.n_window + ubatch.pos[i] % needs.n_window;
            }
        }
    }
    if (inp.slots && inp.slots->buffer) {
        int32_t * slots   = (int32_t *) inp.slots->data;
        float   * counted = (float   *) inp.counted->data;
        for (uint32_t s = 0; s < ubatch.n_seqs; ++s) {
            *slots++ = seqs[s]->slot;
            for (uint32_t i = s*n; i < (s + 1)*n; ++i) {
                *counted++ = ubatch.pos[i] - pos_min[s] >= (llama_pos) sink ? 1.0f : 0.0f;
            }
        }
    }
}

// what a query was before RoPE, and what was done to it from there on
// rot - matrix that it was multiplied with at last
static ggml_tensor * find_plain(ggml_tensor * q, const ggml_tensor * rot, llama_lukv_queries::attn_info & info) {
    info.q_scale   = 1.0f;
    info.rope      = {};

    while (true) {
        if (q->op == GGML_OP_MUL_MAT && q->src[0] == rot) {
            q = q->src[1];
        } else if (q->op == GGML_OP_RESHAPE) {
            q = q->src[0];
        } else if (q->op == GGML_OP_SCALE) {
            float scale;
            memcpy(&scale, q->op_params, sizeof(scale));

            info.q_scale *= scale;
            q = q->src[0];
        } else {
            break;
        }
    }

    if (q->op == GGML_OP_ROPE) {
        info.rope.none    = false;
        info.rope.factors = q->src[2];
        memcpy(info.rope.params.data(), q->op_params, sizeof(info.rope.params));

        q = q->src[0];
    }

    return q;
}

void llama_lukv_queries::build_store(const llm_graph_context & gctx, const graph_inputs & inp, ggml_tensor * q_cur, ggml_tensor * rot, float scale, int32_t il, bool fused) const {
    const auto & layer = layers.at(il);

    ggml_context * ctx = gctx.ctx0;

    ggml_tensor * plain = find_plain(q_cur, rot, layer.attn);
    layer.attn.scale = scale;

    const int64_t n_embd = q_cur->ne[0];
    const int64_t n_head = q_cur->ne[1];
    const int64_t n_seqs = gctx.ubatch.n_seqs;
    const int64_t n      = q_cur->ne[2]/n_seqs;

    // [n_embd*n_head, n, n_seqs]
    const auto as_rows = [&](ggml_tensor * t) {
        return ggml_reshape_3d(ctx, ggml_is_contiguous(t) ? t : ggml_cont(ctx, t), n_embd*n_head, n, n_seqs);
    };

    if (layer.last) {
        const int64_t n_rows = n_last(gctx.ubatch);

        ggml_tensor * rows = as_rows(q_cur);
        rows = ggml_view_3d(ctx, rows, rows->ne[0], n_rows, n_seqs, rows->nb[1], rows->nb[2], (n - n_rows)*rows->nb[1]);
        rows = ggml_reshape_2d(ctx, ggml_cont(ctx, rows), rows->ne[0], n_rows*n_seqs);

        ggml_build_forward_expand(gctx.gf, ggml_set_rows(ctx, layer.last, rows, ggml_reshape_1d(ctx, inp.rows, n_rows*n_seqs)));
    }

    if (!layer.sum) {
        return;
    }

    ggml_tensor * rows  = as_rows(plain);
    ggml_tensor * slots = ggml_reshape_1d(ctx, inp.slots, n_seqs);

    if (fused) {
        rows = ggml_reshape_3d(ctx, rows, n_embd, n_head, n*n_seqs);

        ggml_build_forward_expand(gctx.gf, ggml_query_sums_ragged(ctx, rows, inp.counted, slots, layer.sum, layer.outer));
        return;
    }

    ggml_tensor * sum   = nullptr;
    ggml_tensor * outer = nullptr;

    for (int64_t s = 0; s < n_seqs; ++s) {
        ggml_tensor * q       = ggml_view_2d(ctx, rows, rows->ne[0], n, rows->nb[1], s*rows->nb[2]);
        ggml_tensor * counted = ggml_view_1d(ctx, inp.counted, n, s*inp.counted->nb[1]);

        // [n, n_embd*n_head]. of one token there is nothing to add up
        ggml_tensor * columns = n > 1 || layer.outer ? ggml_cont(ctx, ggml_transpose(ctx, q)) : nullptr;

        ggml_tensor * cur = n > 1 ? ggml_mul_mat(ctx, columns, counted) : ggml_mul(ctx, q, counted);
        sum = sum ? ggml_concat(ctx, sum, cur, 1) : cur;

        if (layer.outer) {
            columns = ggml_reshape_3d(ctx, columns, n, n_embd, n_head);
            cur     = ggml_mul_mat(ctx, columns, ggml_mul(ctx, columns, counted));
            cur = ggml_reshape_2d(ctx, cur, n_embd*n_embd*n_head, 1);

            outer = outer ? ggml_concat(ctx, outer, cur, 1) : cur;
        }
    }

    const auto accumulate = [&](ggml_tensor * dst, ggml_tensor * cur) {
        ggml_build_forward_expand(gctx.gf, ggml_set_rows(ctx, dst, ggml_add(ctx, ggml_get_rows(ctx, dst, slots), cur), slots));
    };
    accumulate(layer.sum, sum);
    if (layer.outer) {
        accumulate(layer.outer, outer);
    }
}

llama_lukv_queries::seq_view llama_lukv_queries::build_view(ggml_context * ctx, const std::function<ggml_tensor * (const std::vector<int32_t> & data, int64_t ne0)> & input_i32,
        const seq_state & seq, int32_t il, ggml_tensor * rotation) const {
    const auto & layer = layers.at(il);

    const int64_t n_embd = model.hparams.n_embd_head_k(il);
    const int64_t n_head = model.hparams.n_head(il);

    seq_view res;

    if (layer.last) {
        std::copy_if(seq.pos.begin(), seq.pos.end(), std::back_inserter(res.pos), [](llama_pos pos) { return pos >= 0; });
        std::sort(res.pos.begin(), res.pos.end());

        std::vector<int32_t> rows;
        for (llama_pos pos : res.pos) {
            rows.push_back(seq.slot*needs.n_window + pos % needs.n_window);
        }
        if (!rows.empty()) {
            res.q = ggml_reshape_3d(ctx, ggml_get_rows(ctx, layer.last, input_i32(rows, rows.size())), n_embd, n_head, rows.size());
        }
    }

    if (layer.sum) {
        const float scale = 1.0f/std::max<int64_t>(seq.n_sum, 1);

        ggml_tensor * mean = ggml_view_2d(ctx, layer.sum, n_embd, n_head, n_embd*sizeof(float), seq.slot*layer.sum->nb[1]);
        mean = ggml_scale(ctx, mean, scale);

        res.mean = ggml_mul_mat(ctx, rotation, mean);

        if (layer.outer) {
            ggml_tensor * cov = ggml_view_3d(ctx, layer.outer, n_embd, n_embd, n_head,
                    n_embd*sizeof(float), n_embd*n_embd*sizeof(float), seq.slot*layer.outer->nb[1]);
            ggml_tensor * row = ggml_reshape_3d(ctx, mean, 1, n_embd, n_head);

            cov = ggml_sub(ctx, ggml_scale(ctx, cov, scale), ggml_mul_mat(ctx, row, row));

            // from both sides. it is symmetric
            cov = ggml_mul_mat(ctx, rotation, cov);
            res.cov = ggml_mul_mat(ctx, rotation, ggml_cont(ctx, ggml_transpose(ctx, cov)));
        }
    }

    return res;
}

ggml_tensor * llama_lukv_queries::build_k_sum(ggml_context * ctx, const seq_state & seq, ggml_tensor * keys, ggml_tensor * ones, int32_t il) const {
    ggml_tensor * all = layers.at(il).k_sum;

    const int64_t n_embd = model.hparams.n_embd_head_k(il);
    const int64_t n_head = all->ne[0]/n_embd;

    ggml_tensor * sum = ggml_view_2d(ctx, all, n_embd, n_head, n_embd*sizeof(float), seq.slot*all->nb[1]);
    if (!keys) {
        return sum;
    }

    ggml_tensor * cur = ggml_rms_norm(ctx, keys, 1e-12f);
    cur = ggml_reshape_3d(ctx, cur, n_embd, cur->ne[1]/n_head, n_head);
    // saves the transposed copy
    cur = ones ? ggml_out_prod(ctx, cur, ones) : ggml_sum_rows(ctx, ggml_cont(ctx, ggml_transpose(ctx, cur)));

    return ggml_add_inplace(ctx, sum, ggml_reshape_2d(ctx, cur, n_embd, n_head));
}
