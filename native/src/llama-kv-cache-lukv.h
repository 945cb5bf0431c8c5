#pragma once

#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-lukv-params.h"
#include "llama-lukv-queries.h"
#include "llama-memory.h"

#include <limits>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

class llm_graph_input_attn_kv_lukv;

struct llama_model;
struct llama_cparams;
struct llama_context;

//
// llama_kv_cache_lukv
//
// KV cache in which every KV head owns a number of cells of its own
// ref: https://arxiv.org/abs/2602.08585
//
// K (and likewise V) of a layer is one flat tensor of cells. Each head has a pool of its rows, and each sequence that holds
// tokens has a segment of that pool:
//
//     row:   offs                          offs + n_kept                     offs + n_rows
//            | k0 k1 k2 ...                | r0 r1 r2 ...           |  free  |
//            '------------ kept -----------'-------- recent --------'
//
//   - kept: at most n_owned. Every token of the sequence can see them. Their order does not matter: it is that of the tokens
//     until the first eviction
//   - recent: the tokens since the last commit, at most n_room, oldest first. Their number is the same for all heads,
//     hence one mask serves all heads and layers: each head reads as many of its last columns as it has cells
//
// A commit turns the recent cells into kept ones. Where they do not fit, the metric decides which cells stay, and the
// recent cells that stay move to the places of those that go: the cost is in the number of new tokens.
// It runs between two graphs: every query of the last ubatch has seen the cells that are evicted.
//
// The sequences share the kv_size tokens that the budgets are for, in proportion to their lengths: each has a quota of them,
// and its heads own what the budgets give them of the quota. As long as all sequences together are no longer than kv_size,
// none keeps less than its budget. A sequence that is alone has everything.
//
// Tokens that belong to several sequences at once are read for one of them. The others are its twins, without cells of their
// own, until their tokens differ: then the cells are copied.
//
class llama_kv_cache_lukv : public llama_memory_i {
public:
    llama_kv_cache_lukv(
            const llama_model       & model,
            const llama_cparams     & cparams,
            const llama_lukv_params & params,
            ggml_type type_k,
            ggml_type type_v,
             uint32_t kv_size,
      const layer_filter_cb & filter);

    ~llama_kv_cache_lukv();

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

    // layers of the model that have cells here
    bool     has_layer  (int32_t il) const { return map_layer_ids.count(il) > 0; }
    uint32_t get_n_layer()           const { return kv.layers.size(); }

    // cells of a head for the tokens in flight
    uint32_t get_n_room() const { return n_room_all; }
    int64_t  get_n_evictions()  const { return n_evictions; }
    int64_t  get_n_evicted()    const { return n_evicted; } // cells
    int64_t  get_t_commit_us()  const { return t_commit_us; }

    // bytes: allocated, for K, V and the metric, and those of a cache that keeps everything
    uint64_t size() const;
    uint64_t size_stock() const;

    // of all sequences together. il is a layer of the model
    uint32_t get_n_owned(int32_t il, uint32_t ih) const;
    uint32_t get_n_used (int32_t il, uint32_t ih) const;

    // of one sequence
    uint32_t get_n_owned(llama_seq_id seq_id, int32_t il, uint32_t ih) const;
    uint32_t get_n_used (llama_seq_id seq_id, int32_t il, uint32_t ih) const;

    // positions that a head of a sequence can attend to, ascending
    std::vector<llama_pos> get_positions(llama_seq_id seq_id, int32_t il, uint32_t ih) const;

    // policy prefill: true if the prompt has been evicted
    bool is_evicted(llama_seq_id seq_id) const;

    // the sequence whose cells it has: itself, or the one that it is a twin of
    llama_seq_id get_source(llama_seq_id seq_id) const;

    // bring every head of every sequence down to its budget. nothing changes if it fails
    bool commit(llama_context * lctx);

    // for a metric on a repetition of the context: the tokens from pos_first on, of the last batch, repeat the positions [p0, p1)
    // what they attend to there is recorded
    bool record(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos pos_first, llama_pos pos_end);

    // while it lasts, the sequence evicts nothing
    bool begin_repetition(llama_context * lctx, llama_seq_id seq_id);
    void end_repetition  (llama_seq_id seq_id, bool recorded);

    // ubatches that this cache can take: tokens of one sequence, or as many of several ones. twins count as one.
    // empty if the batch does not fit
    std::vector<llama_ubatch> split(llama_batch_allocr & balloc, uint32_t n_ubatch) const;

    // sequences whose tokens differ in the batch get cells of their own. comes before its first ubatch
    bool apply_batch(const std::vector<llama_ubatch> & ubatches);

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

    // seq_id < 0: as if all cells that the head has were in use. the recent ones are padded, so that a graph can be reused
    uint32_t get_n_cells     (llama_seq_id seq_id, int32_t il, uint32_t ih) const;
    uint32_t get_n_cells_max (llama_seq_id seq_id) const;
    uint32_t get_n_recent_pad(llama_seq_id seq_id) const;

    // the first n_cells cells of a head of a sequence: [n_embd_head, 1, n_cells]
    ggml_tensor * get_k(ggml_context * ctx, llama_seq_id seq_id, int32_t il, uint32_t ih, uint32_t n_cells) const;
    ggml_tensor * get_v(ggml_context * ctx, llama_seq_id seq_id, int32_t il, uint32_t ih, uint32_t n_cells) const;

    // what the metric asks for
    const llama_lukv_needs & get_needs() const { return needs; }

    // add to the attention that the cells have received: q_cur [n_embd_head_k, n_head, n_tokens]
    void build_attn_sums(const llm_graph_context & gctx, const llm_graph_input_attn_kv_lukv * inp, ggml_tensor * q_cur, float kq_scale, int32_t il) const;

    // the cells of all heads: [n_embd_head, n_rows]
    ggml_tensor * get_k(int32_t il) const { return get_layer(il).k; }
    ggml_tensor * get_v(int32_t il) const { return get_layer(il).v; }

    // where the cells of a layer of the model are
    ggml_backend_dev_t get_dev(int32_t il) const;

    // true if the attention of a layer is computed by one op for all heads
    bool use_ragged(int32_t il, uint32_t n_tokens) const;

    // true if one op does that for all heads of a layer
    bool has_scores_op    (int32_t il) const { return ops[map_layer_ids.at(il)].scores; }
    bool has_query_sums_op(int32_t il) const { return ops[map_layer_ids.at(il)].query_sums; }
    bool has_rotating_op  (int32_t il) const { return ops[map_layer_ids.at(il)].rotate; }

    // tokens of a ubatch for which the attention is one op for all layers, at most
    uint32_t n_tokens_ragged() const;

    // store k_cur, v_cur [n_embd_head, n_head_kv, n_tokens] in the rows that inp names, quantised ones rotated
    void build_store(const llm_graph_context & gctx, const llm_graph_input_attn_kv_lukv * inp, ggml_tensor * k_cur, ggml_tensor * v_cur, int32_t il) const;

    // the part of an input that belongs to a layer
    ggml_tensor * view_idxs(ggml_context * ctx, ggml_tensor * idxs, int32_t il) const;
    ggml_tensor * view_segs(ggml_context * ctx, ggml_tensor * segs, int32_t il) const;

    // rows of the tokens of the ubatch, which are the last recent ones: I32 [n_head_kv*n_tokens, n_layer]
    void set_input_idxs(ggml_tensor * dst, const llama_ubatch & ubatch) const;

    // what the metric keeps of the queries
    const llama_lukv_queries & get_queries() const { return *queries; }

    void set_input_queries(const llama_lukv_queries::graph_inputs & inp, const llama_ubatch & ubatch) const;

    // first row and number of cells of each head: I32 [2, n_head_kv, n_seqs, n_layer]
    void set_input_segs(ggml_tensor * dst, const llama_ubatch & ubatch) const;

    // recent cells that each token does not see: I32 [n_tokens]
    void set_input_n_hidden(ggml_tensor * dst, const llama_ubatch & ubatch) const;

    // of a ubatch with one sequence: F16/F32 [n_cells_max, n_tokens]
    void set_input_kq_mask(ggml_tensor * dst, const llama_ubatch & ubatch) const;

    static void set_input_rot(ggml_tensor * dst);

private:
    // what a head has of the rows of its layer, for all sequences
    struct kv_pool {
        uint32_t offs    = 0; // first row
        uint32_t n_rows  = 0;
        uint32_t n_owned = 0; // kept cells of all sequences, by the budget
    };

    struct kv_layer {
        uint32_t il; // in the model

        ggml_tensor * k; // [n_embd_head_k, n_rows]
        ggml_tensor * v; // [n_embd_head_v, n_rows]

        // of kept cells, nullptr if the metric does not ask for it [1, n_rows]
        ggml_tensor * norms; // ||v W_O||_1
        ggml_tensor * past;  // scores of earlier commits

        ggml_tensor * attn_sums; // attention received, of all cells [1, n_rows]

        std::vector<kv_pool> pools; // per head

        // all that have a row for each cell
        std::vector<ggml_tensor *> tensors() const;
    };

    struct kv_segment {
        uint32_t offs    = 0; // first row
        uint32_t n_owned = 0; // kept cells at most

        std::vector<llama_pos> pos; // of the kept cells, -1 for a hole that is left to be filled
    };

    struct kv_seq {
        llama_pos pos_min = -1;
        llama_pos pos_max = -1;

        uint32_t quota  = 0; // tokens that the segments are for
        uint32_t n_room = 0; // recent cells at most

        std::vector<llama_pos>  pos_recent; // oldest first, -1 for a hole
        std::vector<kv_segment> segs;       // per head, layer-major

        llama_lukv_queries::seq_state queries;

        bool has_holes    = false; // some of the positions are -1
        bool prefill_done = false; // policy prefill: the prompt has been evicted, from now on everything is kept
        bool is_repeating = false; // for the metric: the prompt goes on although single tokens come
        bool is_recorded  = false; // the metric knows what a repetition attended to

        uint32_t n_tokens() const { return pos_max < 0 ? 0 : pos_max - pos_min + 1; }
    };

    // kept cells of a sequence that stay, at most, per head
    struct eviction {
        kv_seq * seq;

        std::vector<uint32_t> n_keep;
    };

    // a row of a layer to be copied within K and V
    struct cell_move {
        int32_t src;
        int32_t dst;
    };

    using cell_moves = std::vector<std::vector<cell_move>>; // per layer

    using seq_ids_t = std::vector<llama_seq_id>;
    using n_cells_t = std::map<llama_seq_id, std::vector<uint32_t>>; // per head
    using parts_t   = std::map<llama_seq_id, int32_t>;               // sequences that go on together have the same number
    using sources_t = std::map<llama_seq_id, llama_seq_id>;

    struct kv_storage {
        std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;
        std::vector<kv_layer> layers;

        uint64_t size() const;
    };

    // what the device of a layer can do for all heads together
    struct layer_ops {
        bool attn   = false;
        bool rotate = false; // with the rotation of quantised K and V
        bool store  = false;
        bool score  = false;
        bool select = false;

        bool scores     = false; // those of any metric, accumulated attention, and norms
        bool layer      = false; // those of this metric
        bool query_sums = false; // statistics of queries
        bool out_prod   = false; // of f32

        uint32_t n_tokens_attn = std::numeric_limits<uint32_t>::max(); // per ubatch, at most
    };

    class commit_graph;
    class row_copier;

    const llama_model   & model;
    const llama_cparams & cparams;

    llama_lukv_params params; // of the layers here

    const ggml_type type_k;
    const ggml_type type_v;

    const uint32_t kv_size;
    const uint32_t n_seq_max;
    const uint32_t n_recent_max;

    const uint32_t n_room_all; // rows of each pool for recent cells

    const uint32_t rot_k;
    const uint32_t rot_v;

    const llama_lukv_metric & metric;
    const llama_lukv_needs    needs; // of the metric

    std::vector<layer_ops> ops;

    kv_storage kv;

    std::unique_ptr<llama_lukv_queries> queries;

    // W_O of layers where it is stored in a way that only a product with it can read, for a metric that asks for norms
    // F16 [n_embd_head_v*n_head, n_embd]
    std::map<int32_t, ggml_tensor *> wo_copies;
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs_wo;

    bool wo_copied = false;

    // mean rotation of the first n_future positions: what follows them differs by one rotation
    std::map<llama_lukv_queries::rope_op, std::vector<float>> rotations;

    std::unordered_map<int32_t, int32_t> map_layer_ids; // layers of the model to those here

    std::map<llama_seq_id, kv_seq> seqs; // those that hold tokens

    sources_t twins; // and those that have the same tokens as one of seqs, and its cells

    // the segments have other sizes than the quotas give them: put right with the next ubatch
    bool is_provisional = false;

    int64_t n_tokens_all = 0;
    int64_t n_evictions  = 0;
    int64_t n_evicted    = 0;
    int64_t t_commit_us  = 0;

    uint64_t version       = 0;
    uint64_t version_alloc = 0;

    // the context that computes the commits, known from the first batch on
    llama_context * lctx = nullptr;

    ggml_backend_sched_ptr sched;
    size_t                 sched_max_nodes = 0;

    const kv_layer   & get_layer(int32_t il) const { return kv.layers[map_layer_ids.at(il)]; }
    const kv_segment & get_seg(llama_seq_id seq_id, int32_t il, uint32_t ih) const;

    size_t n_heads() const { return kv.layers.size()*params.n_head_kv; }

    layer_ops get_ops(int32_t il) const;

    // the sequences of a ubatch, each has as many tokens
    seq_ids_t seq_ids_of(const llama_ubatch & ubatch) const;

    // of a batch or a ubatch
    template <typename T> static parts_t parts_of(const T & batch);

    // whose cells each of the twins has if the parts go their own ways: itself if it needs a copy
    sources_t get_owners(const parts_t & parts) const;

    // policy prefill: true if the tokens fit with n_tokens more, once the parts have cells of their own
    bool has_room(const parts_t & parts, uint32_t n_tokens) const;

    // twins in different parts have cells of their own from now on. nothing changes if it fails
    bool separate(const parts_t & parts);

    // the cells become those of a twin, and the sequence is empty
    void hand_over(llama_seq_id seq_id, llama_seq_id twin);

    // sources - of the copies, which are empty
    bool copy(const sources_t & sources, llama_pos p0, llama_pos p1);

    // calls f(layer, head, index of the head)
    template <typename F> void for_each_head(const F & f) const;

    // n_rows, n_owned - per head
    kv_storage alloc(const std::vector<uint32_t> & n_rows, const std::vector<uint32_t> & n_owned) const;

    // the tokens of kv_size that each sequence may have the budget of, with n more tokens for some of them
    std::map<llama_seq_id, uint32_t> get_quotas(const seq_ids_t & ids, uint32_t n) const;

    // true if the sequence is to get a larger quota rather than to evict within the one that it has
    bool wants_quota(const kv_seq & seq, uint32_t quota_new) const;

    // kept and recent cells of a sequence, per head, holes included
    std::vector<uint32_t> n_cells_of(const kv_seq & seq) const;

    // kept cells that each sequence may have
    n_cells_t n_owned_of(const std::map<llama_seq_id, uint32_t> & quotas) const;

    // the same for a sequence that is alone, and with what several ones need at the least
    std::vector<uint32_t> n_owned_all() const;
    std::vector<uint32_t> n_kept_all () const;

    // rows of the pools: what the budgets give, and more where the sequences need more
    std::vector<uint32_t> n_rows_of(const n_cells_t & n_owned, const std::map<llama_seq_id, uint32_t> & n_room) const;

    // share the rows out among the sequences, for a ubatch with n tokens for each of the sequences ids
    bool rebalance(const seq_ids_t & ids, uint32_t n);

    // recent cells that each sequence has room for, if the next ubatch is one of the sequences ids
    std::map<llama_seq_id, uint32_t> get_rooms(const seq_ids_t & ids) const;

    // lay out new sequences, the data of whose cells comes afterwards. nothing is evicted: the pools grow if they have to
    // is_whole - they are all there are, and had the same quotas before
    bool add_seqs(std::map<llama_seq_id, kv_seq> added, bool is_whole);

    // give the segments n_owned + n_room rows each and move the cells there
    bool set_layout(const n_cells_t & n_owned, const std::map<llama_seq_id, uint32_t> & n_room);

    // turn the recent cells into kept ones. afterwards each head keeps at most n_keep cells
    bool evict(const std::vector<eviction> & evictions);

    // close the holes that seq_rm left
    bool compact();

    // rows of the cells that are never evicted
    std::vector<int32_t> get_protected(const kv_seq & seq, const kv_segment & seg) const;

    // the rows of each head that have to go, ascending: [eviction*n_heads + head]
    bool compute_evicted(const std::vector<eviction> & evictions, std::vector<std::vector<int32_t>> & rows);
    bool compute_moves  (const cell_moves & moves, bool async = false);

    // let the keys of the recent cells enter the sums of their sequences, in a graph of a commit
    // returns the sums [n_embd_head, n_head_kv]: [layer*n_evictions + eviction], none for a sequence without a token
    std::vector<ggml_tensor *> build_k_sums(commit_graph & graph, const std::vector<eviction> & evictions) const;

    // for the recent cells
    bool compute_norms(const std::vector<eviction> & evictions);

    void alloc_wo_copies();
    bool compute_wo_copies();

    // sum of the rotations of n positions from pos on: [n_embd_head, n_embd_head], columns are rotated unit vectors
    bool compute_rotation(const llama_lukv_queries::rope_op & rope, llama_pos pos, uint32_t n, std::vector<float> & res);

    // mean rotation of the next positions for the queries of a layer, as the rows of a matrix
    bool compute_future_rotation(int32_t il, llama_pos pos, std::vector<float> & res);

    // head i of a sequence as the metric sees it
    llama_lukv_scorer get_scorer(ggml_context * ctx, const kv_seq & seq, size_t i, const llama_lukv_queries::seq_view & view) const;

    // K and V of the cells as the model computed them. rot_k, rot_v - the rotations of quantised ones, or nullptr
    void build_plain(llama_lukv_scorer & s, ggml_tensor * rot_k, ggml_tensor * rot_v) const;

    // the same of some heads of layer l, without tensors of its own
    llama_lukv_layer_scorer get_layer_scorer(const kv_seq & seq, size_t l, const llama_lukv_queries::seq_view & view,
            const std::vector<llama_lukv_layer_scorer::segment> & segs) const;

    // a slot for what the metric keeps of its queries
    void init_queries(kv_seq & seq);

    bool end_prefill(kv_seq & seq);

    void remove(kv_seq & seq, llama_pos p0, llama_pos p1);

    ggml_tensor * view_cells(ggml_context * ctx, ggml_tensor * t, llama_seq_id seq_id, int32_t il, uint32_t ih, uint32_t n_cells) const;

    // of what a saved state has to have in common with the cache
    uint64_t hash_metric() const;
    uint64_t hash_budget() const;

    kv_seq state_read_seq(llama_io_read_i & io) const;
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

    // the sequence of the ubatch, of the first token if there are several. -1 for a full-cache context
    llama_seq_id get_seq_id() const;

private:
    const llama_memory_status status;

    llama_kv_cache_lukv * kv = nullptr;

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
    bool can_reuse(const llama_kv_cache_lukv_context * mctx, const llama_ubatch & ubatch);

    // copy an input to the device of a layer as a whole, once for all layers there: views of an input would be copied one by one
    ggml_tensor * on_device(const llm_graph_context & gctx, ggml_tensor * input, int il) const;

    ggml_tensor * self_idxs     = nullptr; // I32 [n_head_kv*n_tokens, n_layer]
    ggml_tensor * self_segs     = nullptr; // I32 [2, n_head_kv, n_seqs, n_layer]
    ggml_tensor * self_n_hidden = nullptr; // I32 [n_tokens]

    ggml_tensor * self_zeros = nullptr; // F32 [1, n_head_kv*n_tokens], where the accumulated attention is computed head by head

    // F32 [n, n], the rotations of quantised K and V. not where stock has them: who stores and attends also rotates
    ggml_tensor * rot_k = nullptr;
    ggml_tensor * rot_v = nullptr;

    llama_lukv_queries::graph_inputs self_queries;

    // where the attention is computed head by head
    llama_seq_id seq_id       = -1;
    uint32_t     n_recent_pad = 0;
    uint64_t     version      = 0;

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
