#pragma once

// LU-KV: per-head KV cache budgets (https://arxiv.org/abs/2602.08585)
//
// The budgets come from the model's metadata (keys lukv.*) and are changed at load time with
// llama_model_params.kv_overrides. This header reports what the cache of a live context holds.
//
// A head is a pair (il, ih): the il-th layer and the ih-th KV head of that layer. A cell holds the K and V of one head
// for one position.

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

    // true if the cells of ctx are budgeted per head; false if ctx uses an ordinary KV cache
    LLAMA_API bool llama_lukv_enabled(const struct llama_context * ctx);

    // bytes of the memory (K and V) of ctx, for every kind of memory: allocated, and what it would be without budgets
    LLAMA_API uint64_t llama_lukv_memory_size     (const struct llama_context * ctx);
    LLAMA_API uint64_t llama_lukv_memory_size_full(const struct llama_context * ctx);

    // the functions below return 0 if ctx is not budgeted

    LLAMA_API int32_t llama_lukv_n_layer  (const struct llama_context * ctx);
    LLAMA_API int32_t llama_lukv_n_head_kv(const struct llama_context * ctx);

    // kept fraction that the budgets are for
    LLAMA_API float llama_lukv_ratio(const struct llama_context * ctx);

    // true if the cells do not become more when the sequences become longer than the context (policy "capacity")
    LLAMA_API bool llama_lukv_is_bounded(const struct llama_context * ctx);

    // cells that each head has beyond its budget for the tokens in flight. for more than one sequence there are a few others
    LLAMA_API int32_t llama_lukv_n_cells_recent(const struct llama_context * ctx);

    // times that cells were evicted, and how many cells that were
    LLAMA_API int64_t llama_lukv_n_evictions(const struct llama_context * ctx);
    LLAMA_API int64_t llama_lukv_n_evicted  (const struct llama_context * ctx);

    // time that commits (scores, selection, moves) took so far, without that of what a device still computes afterwards
    LLAMA_API int64_t llama_lukv_t_commit_us(const struct llama_context * ctx);

    // cells of a head for all sequences: owned (its budget) and used
    // -1 if there is no such head, or if its layer is not budgeted (sliding window)
    LLAMA_API int32_t llama_lukv_n_cells_owned(const struct llama_context * ctx, int32_t il, int32_t ih);
    LLAMA_API int32_t llama_lukv_n_cells_used (const struct llama_context * ctx, int32_t il, int32_t ih);

    // the same for one sequence. what it owns is its share, which depends on the other sequences
    // sequences whose tokens were all read for them together have the same cells, until their tokens differ
    LLAMA_API int32_t llama_lukv_seq_n_cells_owned(const struct llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t ih);
    LLAMA_API int32_t llama_lukv_seq_n_cells_used (const struct llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t ih);

    // positions of a sequence that a head can attend to, ascending. at most n_max are written to res (may be NULL)
    // returns their number, -1 if there is no such head
    LLAMA_API int32_t llama_lukv_seq_get_positions(const struct llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t ih, llama_pos * res, int32_t n_max);

    // bring every head of every sequence down to its budget now. under the policy "prefill" this ends the prefill
    // returns false if the computation failed; the cache is then unchanged
    LLAMA_API bool llama_lukv_commit(struct llama_context * ctx);

    // KVzip (https://arxiv.org/abs/2505.23416), for models with the metric "kvzip" and the policy "prefill"
    //
    // Reads n_tokens tokens behind a cached context, e.g. a request to repeat its positions [p0, p1) and these tokens again, and
    // records the largest attention that each of these cells receives: its score. Afterwards the tokens are removed, the sequence
    // is what it was. Call it for one part of the context after the other, then llama_lukv_commit(), which evicts by the scores;
    // cells outside of all parts have 0. The context (n_ctx) needs room for the tokens meanwhile. Logits are lost.
    // returns 0, or with a line in the log
    //   -1 - another metric, or an ordinary cache
    //   -2 - no such positions, or the sequence was evicted already
    //   -3 - no room, or the computation failed
    LLAMA_API int32_t llama_lukv_seq_kvzip(struct llama_context * ctx, llama_seq_id seq_id, const llama_token * tokens, int32_t n_tokens, llama_pos p0, llama_pos p1);

#ifdef __cplusplus
}
#endif
