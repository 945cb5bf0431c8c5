#pragma once

#include "llama-lukv-metric.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <array>
#include <map>
#include <vector>

struct llama_model;
struct llama_ubatch;
struct llm_graph_context;

class llama_io_read_i;
class llama_io_write_i;

//
// llama_lukv_queries
//
// what a metric keeps of the queries: for each sequence the last ones after RoPE, and sums over all of them before it.
// and a sum over the keys as they are cached, to which each commit adds those that came since the one before it
//
// sequences have slots. the last queries of a slot are a ring: that of the position p is at p % n_window
//
class llama_lukv_queries {
public:
    // of one sequence
    struct seq_state {
        int32_t slot = -1; // none yet

        std::vector<llama_pos> pos; // of the last queries, -1 for none [n_window]

        int64_t n_sum = 0; // queries in the sums
    };

    // inputs of a graph
    struct graph_inputs {
        ggml_tensor * rows    = nullptr; // I64 [n_last*n_seqs]: where the last queries of each sequence go
        ggml_tensor * slots   = nullptr; // I32 [n_seqs]
        ggml_tensor * counted = nullptr; // F32 [n_seq_tokens, n_seqs]: 1 for queries that are summed
    };

    // how queries are rotated: the RoPE op of the model's graph
    struct rope_op {
        bool          none    = true;
        ggml_tensor * factors = nullptr;

        std::array<int32_t, 16> params = {};

        bool operator<(const rope_op & other) const;
    };

    // what the model's graph does to the queries of a layer
    struct attn_info {
        float   scale   = 1.0f; // of the attention scores
        float   q_scale = 1.0f; // of the queries after RoPE
        rope_op rope;
    };

    // of one sequence and all heads of a layer
    struct seq_view {
        ggml_tensor * q    = nullptr; // [n_embd_head, n_head, n_queries]
        ggml_tensor * mean = nullptr; // [n_embd_head, n_head]
        ggml_tensor * cov  = nullptr; // [n_embd_head, n_embd_head, n_head]

        std::vector<llama_pos> pos; // of q, ascending
    };

    // devs - of the layers of the model that have cells
    llama_lukv_queries(
            const llama_model & model,
            const llama_lukv_needs & needs,
            const std::map<int32_t, ggml_backend_dev_t> & devs,
            uint32_t sink,
            uint32_t n_seq_max);

    // false if the metric does not ask for queries
    bool active() const { return needs.n_window > 0 || needs.n_future > 0; }

    // false if there is nothing of a sequence
    bool has_state() const { return active() || needs.k_sum; }

    size_t size() const;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const;

    // a slot for a sequence, whose sums are empty. used - the slots of the others
    void init_seq(seq_state & seq, const std::vector<int32_t> & used) const;

    // account for queries of these positions
    void add   (seq_state & seq, const llama_pos * pos, uint32_t n, llama_pos pos_min) const;
    void remove(seq_state & seq, llama_pos p0, llama_pos p1) const;

    // everything of a sequence, but not the last queries outside of [p0, p1)
    void copy(const seq_state & src, seq_state & dst, llama_pos p0, llama_pos p1) const;

    void state_write(llama_io_write_i & io, const seq_state & seq) const;
    void state_read (llama_io_read_i  & io, seq_state & seq) const;

    //
    // graph_build API
    //

    graph_inputs build_inputs(ggml_context * ctx, const llama_ubatch & ubatch) const;

    // seqs - of the ubatch
    void set_inputs(const graph_inputs & inp, const llama_ubatch & ubatch, const std::vector<const seq_state *> & seqs,
            const std::vector<llama_pos> & pos_min) const;

    // keep q_cur [n_embd_head, n_head, n_tokens]. rot - the matrix that it was multiplied with after RoPE, or nullptr
    // fused - with one op for the sums
    void build_store(const llm_graph_context & gctx, const graph_inputs & inp, ggml_tensor * q_cur, ggml_tensor * rot, float scale, int32_t il, bool fused) const;

    // rows - makes an input of indices
    // rotation - of the next positions, as the rows of a matrix [n_embd_head, n_embd_head]
    seq_view build_view(ggml_context * ctx, const std::function<ggml_tensor * (const std::vector<int32_t> & data, int64_t ne0)> & input_i32,
            const seq_state & seq, int32_t il, ggml_tensor * rotation) const;

    // add keys to the sum of a sequence, each made as long as the others: F32 [n_embd_head, n_keys*n_head_kv], head by head, nullptr for none
    // ones - [1, n_keys, n_head_kv], for a sum by an outer product, or nullptr
    // returns the sum [n_embd_head, n_head_kv]
    ggml_tensor * build_k_sum(ggml_context * ctx, const seq_state & seq, ggml_tensor * keys, ggml_tensor * ones, int32_t il) const;

    const attn_info & get_attn(int32_t il) const { return layers.at(il).attn; }

    const llama_lukv_needs needs;

private:
    struct layer {
        ggml_tensor * last  = nullptr; // [n_embd_head*n_head, n_window*n_seq_max]
        ggml_tensor * sum   = nullptr; // [n_embd_head*n_head, n_seq_max]
        ggml_tensor * outer = nullptr; // [n_embd_head*n_embd_head*n_head, n_seq_max]
        ggml_tensor * k_sum = nullptr; // [n_embd_head*n_head_kv, n_seq_max]

        mutable attn_info attn;

        // with the number of rows of each sequence
        std::vector<std::pair<ggml_tensor *, uint32_t>> tensors(uint32_t n_window) const;
    };

    const llama_model & model;

    const uint32_t sink;

    std::map<int32_t, layer> layers;

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;

    // last queries of a ubatch that are kept, of each sequence
    uint32_t n_last(const llama_ubatch & ubatch) const;
};
