#pragma once

#include "llama-batch.h"
#include "llama-graph.h"
#include "llama-lukv-params.h"
#include "llama-memory.h"

#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

struct llama_model;
struct llama_cparams;
struct llama_context;

//
// llama_kv_cache_lukv
//
// KV cache in which every KV head owns a number of cells of its own
// ref: https://arxiv.org/abs/2602.08585
//
// K (and likewise V) of a layer is one flat tensor of cells. Each head has a segment of n_owned + n_recent_max rows in it:
//
//     row:   offs                          offs + n_kept
//            | k0 k1 k2 ...                | r0 r1 r2 ...           |  free  |
//            '------------ kept -----------'-------- recent --------'
//
//   - kept: at most n_owned. Every token of a batch can see them. Their order does not matter: it is that of the tokens
//     until the first eviction
//   - recent: the tokens since the last commit, at most n_recent_max, oldest first. Their number is the same for all
//     heads, hence one mask serves all heads and layers: each head reads as many of its last columns as it has cells
//
// A commit turns the recent cells into kept ones. Where they do not fit, the metric decides which cells stay, and the
// recent cells that stay move to the places of those that go: the cost is in the number of new tokens.
// It runs between two graphs: every query of the last ubatch has seen the cells that are evicted.
//
class llama_kv_cache_lukv : public llama_memory_i {
public:
    llama_kv_cache_lukv(
            const llama_model       & model,
            const llama_lukv_params & params,
            ggml_type type_k,
            ggml_type type_v,
                 bool offload,
             uint32_t kv_size,
             uint32_t n_ubatch);

    ~llama_kv_cache_lukv() = default;

    //
    // llama_memory_i
    //

    llama_memory_context_ptr init_batch(
            llama_batch_allocr & balloc,
            uint32_t n_ubatch,
            bool embd_all) override;

    llama_memory_context_ptr init_full() override;

    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift() const override;

    uint32_t n_nodes_extra() const override;

    void clear(bool data) override;

    bool seq_rm  (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id)                                                          override;
    void seq_add (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    //
    // llama_kv_cache_lukv specific API
    //

    const llama_lukv_params & get_params() const { return params; }

    uint32_t get_n_recent_max() const { return n_recent_max; }
    int64_t  get_n_evictions()  const { return n_evictions; }

    uint32_t get_n_owned(uint32_t il, uint32_t ih) const;
    uint32_t get_n_used (uint32_t il, uint32_t ih) const;

    // positions that a head can attend to, ascending
    std::vector<llama_pos> get_positions(uint32_t il, uint32_t ih) const;

    // bring every head down to its budget. nothing changes if it fails
    bool commit(llama_context * lctx);

    // make room for the ubatch and account for its tokens as recent
    bool apply_ubatch(const llama_ubatch & ubatch);

    //
    // graph_build API
    //

    // changes whenever a graph with views of the heads' cells would read the wrong ones
    uint64_t get_version() const { return version; }

    // changes whenever the cells are in other tensors
    uint64_t get_version_alloc() const { return version_alloc; }

    // sizes of the rotations of K and V, 0 for none
    uint32_t get_rot_k() const { return rot_k; }
    uint32_t get_rot_v() const { return rot_v; }

    // recent cells that a graph reads, n_recent of them in use
    uint32_t get_n_recent_pad(uint32_t n_recent) const;

    uint32_t get_n_recent() const { return pos_recent.size(); }

    // full - as if all cells that the head owns were in use
    uint32_t get_n_kept    (uint32_t il, uint32_t ih, bool full) const;
    uint32_t get_n_kept_max(                          bool full) const;

    // the first n_cells cells of a head: [n_embd_head, 1, n_cells]
    ggml_tensor * get_k(ggml_context * ctx, uint32_t il, uint32_t ih, uint32_t n_cells) const;
    ggml_tensor * get_v(ggml_context * ctx, uint32_t il, uint32_t ih, uint32_t n_cells) const;

    // the cells of all heads: [n_embd_head, n_rows]
    ggml_tensor * get_k(uint32_t il) const { return kv.layers[il].k; }
    ggml_tensor * get_v(uint32_t il) const { return kv.layers[il].v; }

    // where the cells of a layer are
    ggml_backend_dev_t get_dev(uint32_t il) const;

    // true if the attention of a layer, or of all layers, is computed by one op for all heads
    bool use_ragged(uint32_t il, uint32_t n_tokens) const;
    bool use_ragged(uint32_t n_tokens) const;

    // store k_cur, v_cur [n_embd_head, n_head_kv, n_tokens] in the rows idxs [n_head_kv*n_tokens]
    ggml_tensor * cpy_k(ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * idxs, uint32_t il) const;
    ggml_tensor * cpy_v(ggml_context * ctx, ggml_tensor * v_cur, ggml_tensor * idxs, uint32_t il) const;

    // rows of the last n_tokens recent tokens: I64 [n_head_kv*n_tokens, n_layer]
    void set_input_idxs(ggml_tensor * dst, uint32_t n_tokens) const;

    // first row and number of cells of each head: I32 [2, n_head_kv, n_layer]
    void set_input_segs(ggml_tensor * dst, uint32_t n_recent_pad) const;

    // recent cells, unused ones included, that each token does not see: I32 [n_tokens]
    void set_input_n_hidden(ggml_tensor * dst, const llama_ubatch & ubatch, bool causal_attn) const;

    // F16/F32 [n_kept_max + n_recent_pad, n_tokens]
    void set_input_kq_mask(ggml_tensor * dst, const llama_ubatch & ubatch, bool causal_attn) const;

    static void set_input_rot(ggml_tensor * dst);

private:
    struct kv_head {
        uint32_t offs    = 0; // first row of the segment
        uint32_t n_owned = 0; // kept cells at most

        std::vector<llama_pos> pos; // of the kept cells, -1 for a hole that is left to be filled
    };

    struct kv_layer {
        ggml_tensor * k; // [n_embd_head_k, n_rows]
        ggml_tensor * v; // [n_embd_head_v, n_rows]

        std::vector<kv_head> heads;
    };

    // a row of a layer to be copied within K and V
    struct cell_move {
        int32_t src;
        int32_t dst;
    };

    using cell_moves = std::vector<std::vector<cell_move>>; // per layer

    struct kv_storage {
        std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;
        std::vector<kv_layer> layers;

        uint64_t size() const;
    };

    // what the device of a layer can do for all heads together
    struct layer_ops {
        bool attn   = false;
        bool score  = false;
        bool select = false;

        uint32_t n_tokens_attn = std::numeric_limits<uint32_t>::max(); // per ubatch, at most
    };

    class commit_graph;

    const llama_model & model;

    const llama_lukv_params params;

    const ggml_type type_k;
    const ggml_type type_v;

    const bool     offload;
    const uint32_t kv_size;
    const uint32_t n_recent_max;

    const uint32_t rot_k;
    const uint32_t rot_v;

    std::vector<layer_ops> ops;

    kv_storage kv;

    std::vector<llama_pos> pos_recent; // oldest first, -1 for a hole

    llama_pos pos_min = -1;
    llama_pos pos_max = -1;

    bool has_holes = false; // some of the positions above, or of the kept cells, are -1

    // policy prefill: the prompt has been evicted, from now on everything is kept
    bool prefill_done = false;

    int64_t  n_evictions = 0;
    uint64_t version     = 0;

    uint64_t version_alloc = 0;

    // the context that computes the commits, known from the first batch on
    llama_context * lctx = nullptr;

    ggml_backend_sched_ptr sched;
    size_t                 sched_max_nodes = 0;

    layer_ops get_ops(uint32_t il) const;

    kv_storage alloc(const std::vector<uint32_t> & n_owned) const;

    // replace the cells by such with n_owned cells per head, which has to suffice for those in use
    bool resize(const std::vector<uint32_t> & n_owned);

    // cells per head: at the start, and those owned now plus n
    std::vector<uint32_t> n_owned_init() const;
    std::vector<uint32_t> n_owned_plus(uint32_t n) const;

    // turn the recent cells into kept ones. afterwards head i keeps at most n_keep[i] cells
    bool evict(const std::vector<uint32_t> & n_keep);

    // close the holes that seq_rm left
    bool compact();

    // rows of the cells that are never evicted
    std::vector<int32_t> get_protected(const kv_head & head) const;

    // the rows of each head that have to go, ascending
    bool compute_evicted(const std::vector<uint32_t> & n_keep, std::vector<std::vector<int32_t>> & rows);
    bool compute_moves  (const cell_moves & moves);

    void remove_range(llama_pos p0, llama_pos p1);

    bool state_read_impl(llama_io_read_i & io);
};

class llama_kv_cache_lukv_context : public llama_memory_context_i {
public:
    // status only
    llama_kv_cache_lukv_context(llama_memory_status status);

    // used to create a full-cache context
    llama_kv_cache_lukv_context(llama_kv_cache_lukv * kv);

    // used to create a batch processing context from a batch
    llama_kv_cache_lukv_context(llama_kv_cache_lukv * kv, std::vector<llama_ubatch> ubatches);

    ~llama_kv_cache_lukv_context() = default;

    //
    // llama_memory_context_i
    //

    bool next()  override;
    bool apply() override;

    llama_memory_status  get_status() const override;
    const llama_ubatch & get_ubatch() const override;

    //
    // llama_kv_cache_lukv_context specific API
    //

    const llama_kv_cache_lukv * get_kv() const { return kv; }

    bool is_full() const { return full; }

    uint32_t get_n_recent_pad(uint32_t n_tokens) const;

private:
    const llama_memory_status status;

    llama_kv_cache_lukv * kv = nullptr;

    bool full = false; // all cells are in use

    size_t i_cur = 0;

    std::vector<llama_ubatch> ubatches;
};

//
// graph
//

class llm_graph_input_attn_kv_lukv : public llm_graph_input_attn_kv {
public:
    llm_graph_input_attn_kv_lukv(
            const llama_hparams & hparams,
            const llama_cparams & cparams,
            const llama_kv_cache_lukv_context * mctx);

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    // copy an input to the device of a layer as a whole, once for all layers there: views of an input would be copied one by one
    ggml_tensor * on_device(const llm_graph_context & gctx, ggml_tensor * input, int il) const;

    ggml_tensor * self_idxs     = nullptr; // I64 [n_head_kv*n_tokens, n_layer]
    ggml_tensor * self_segs     = nullptr; // I32 [2, n_head_kv, n_layer]
    ggml_tensor * self_n_hidden = nullptr; // I32 [n_tokens]

    uint32_t n_recent_pad  = 0;
    uint64_t version       = 0;
    uint64_t version_alloc = 0;

    bool ragged = false; // all layers, hence there is no mask

    const llama_kv_cache_lukv_context * mctx_lukv;

private:
    mutable std::map<std::pair<ggml_tensor *, ggml_backend_dev_t>, ggml_tensor *> copies;
};

std::unique_ptr<llm_graph_input_attn_kv_lukv> build_attn_inp_kv_lukv(
           ggml_context * ctx,
     const llama_ubatch & ubatch,
    const llama_hparams & hparams,
    const llama_cparams & cparams,
    const llama_kv_cache_lukv_context * mctx);

// stores k_cur and v_cur, then attends: with one op for all heads where there is one, else head by head
// returns [n_embd_head_v*n_head, n_tokens]
ggml_tensor * build_attn_lukv(
    const llm_graph_context & gctx,
    const llm_graph_input_attn_kv_lukv * inp,
    ggml_tensor * q_cur,
    ggml_tensor * k_cur,
    ggml_tensor * v_cur,
    ggml_tensor * sinks,
    float kq_scale,
    int   il);

// returns nullptr if the model has no budgets, or, with a warning, if they cannot be used
llama_memory_i * llama_lukv_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams);
