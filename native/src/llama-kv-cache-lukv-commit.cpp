#include "llama-kv-cache-lukv.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-lukv-impl.h"
#include "llama-lukv.h"
#include "llama-model.h"

#include "ggml-ragged.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>

// rotations that are computed together
static constexpr uint32_t N_ROTATIONS = 64;

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

        for (int32_t j = 0; j < ubatch.n_seq_id[s*n]; ++j) {
            if (ubatch.seq_id[s*n][j] != ids[s]) {
                twins[ubatch.seq_id[s*n][j]] = ids[s];
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

    const auto quotas = get_quotas({}, 0);

    bool balance = is_provisional;

    std::vector<eviction> evictions;
    for (auto & [id, seq] : seqs) {
        auto & cur = evictions.emplace_back(eviction { &seq, {} });

        bool full = false;
        for (const auto & seg : seq.segs) {
            cur.n_keep.push_back(seg.n_owned);
            full = full || seg.pos.size() + seq.pos_recent.size() > seg.n_owned;
        }
        balance = balance || (full && wants_quota(seq, quotas.at(id)));
    }

    return balance ? rebalance({}, 0) : evict(evictions);
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

std::vector<ggml_tensor *> llama_kv_cache_lukv::build_k_sums(commit_graph & graph, const std::vector<eviction> & evictions) const {
    auto * ctx = graph.ctx.get();

    // what is read to repeat a context does not belong to it
    const auto n_new = [](const kv_seq & seq) { return seq.is_repeating ? 0 : seq.pos_recent.size(); };

    // the rows of the recent cells of each layer and sequence, head by head: one input for all of a device
    std::map<ggml_backend_dev_t, std::vector<int32_t>> rows;
    for (size_t l = 0; l < kv.layers.size(); ++l) {
        auto & cur = rows[get_dev(kv.layers[l].il)];
        for (const auto & eviction : evictions) {
            for (uint32_t ih = 0; ih < params.n_head_kv; ++ih) {
                const auto & seg = eviction.seq->segs[l*params.n_head_kv + ih];

                const size_t first = cur.size();
                cur.resize(first + n_new(*eviction.seq));
                std::iota(cur.begin() + first, cur.end(), seg.offs + seg.pos.size());
            }
        }
    }

    std::map<ggml_backend_dev_t, ggml_tensor *> idxs;
    std::map<ggml_backend_dev_t, int64_t>       first;

    std::map<int64_t, ggml_tensor *> ones; // of so many rows

    std::vector<ggml_tensor *> res;
    for (const auto & layer : kv.layers) {
        ggml_backend_dev_t dev = get_dev(layer.il);

        for (const auto & eviction : evictions) {
            const auto & seq = *eviction.seq;

            const int64_t n = params.n_head_kv*n_new(seq);
            if (n == 0) {
                res.push_back(seq.queries.slot >= 0 ? queries->build_k_sum(ctx, seq.queries, nullptr, nullptr, layer.il) : nullptr);
                continue;
            }

            auto & cur = idxs[dev];
            if (!cur) {
                const int64_t n_all = rows[dev].size();
                cur = graph.on_device(graph.input(GGML_TYPE_I32, std::move(rows[dev]), n_all), dev);
            }

            ggml_tensor * keys = ggml_get_rows(ctx, layer.k, ggml_view_1d(ctx, cur, n, first[dev]*cur->nb[0]));
            graph.devs.emplace_back(keys, dev);
            first[dev] += n;

            // on a GPU that would be a product for each head
            ggml_tensor * cur_ones = nullptr;
            if (ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU) {
                auto & t = ones[n];
                if (!t) {
                    t = ggml_reshape_3d(ctx, graph.input(GGML_TYPE_F32, std::vector<float>(n, 1.0f), 1), 1, n/params.n_head_kv, params.n_head_kv);
                }
                cur_ones = t;
            }

            res.push_back(queries->build_k_sum(ctx, seq.queries, keys, cur_ones, layer.il));
            ggml_build_forward_expand(graph.gf, res.back());
        }
    }

    return res;
}

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

    std::vector<ggml_tensor *> k_sums;
    if (needs.k_sum) {
        k_sums = build_k_sums(graph, evictions);
    }

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
            ggml_tensor * k_sums; // of all heads, and which of them are those of the segments
            int64_t       first;
            int64_t       n;
        };
        std::vector<layer_segs> layers;
        std::vector<int32_t>    layer_segs_data;
        std::vector<int32_t>    layer_sums_data;

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

        ggml_tensor * layer_k_sums = nullptr;

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
            if (ops[l].layer && !ops[l].score) {
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
                s.k_sum     = needs.k_sum ? k_sums[l*evictions.size() + e] : nullptr;

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

            ggml_tensor * k_sum = needs.k_sum ? k_sums[l*evictions.size() + e] : nullptr;

            if (ops[l].score && k_sum) {
                layer_k_sums = layer_k_sums ? ggml_concat(ctx, layer_k_sums, k_sum, 1) : k_sum;
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
                    cur.layer_sums_data.push_back(layer_k_sums->ne[1] - params.n_head_kv + ih);
                    continue;
                }

                need_view();

                llama_lukv_scorer s = get_scorer(ctx, seq, i, view);
                s.input_f32 = input_f32;
                s.input_i32 = input_i32;
                s.n_keep    = n_keep;
                if (k_sum) {
                    s.k_sum = ggml_view_1d(ctx, k_sum, k_sum->ne[0], ih*k_sum->nb[1]);
                }
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
            cur.layers.push_back({ cur.scores.size(), layer.k, layer_k_sums, n_segs, (int64_t) segs.size()/2 - n_segs });
            cur.scores.push_back(nullptr);
            cur.n_rows += layer.k->ne[1];
        }
    }

    for (auto & [dev, cur] : selections) {
        if (cur.heads.empty()) {
            continue;
        }

        if (!cur.layers.empty()) {
            ggml_tensor * segs = graph.on_device(graph.input(GGML_TYPE_I32, cur.layer_segs_data, 2), dev);
            ggml_tensor * sums = graph.on_device(graph.input(GGML_TYPE_I32, cur.layer_sums_data, cur.layer_sums_data.size()), dev);

            for (const auto & [i_score, k, k_sums, first, n] : cur.layers) {
                ggml_tensor * anchors = ggml_get_rows(ctx, k_sums, ggml_view_1d(ctx, sums, n, first*sums->nb[0]));
                graph.devs.emplace_back(anchors, dev);

                cur.scores[i_score] = ggml_keydiff_ragged(ctx, k, ggml_view_2d(ctx, segs, 2, n, segs->nb[1], first*segs->nb[1]), anchors);
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

    if (ggml_graph_n_nodes(graph.gf) == 0) {
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

    if (!compact() || !separate({ { seq_id, 0 } })) {
        return false;
    }

    auto & seq = seqs.at(seq_id);

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
