#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

    // ops on a KV cache in which every KV head has cells of its own: a segment of the rows of K and V

    // attention. the tokens are n_seqs runs of the same length, and those of run s attend to the cells of sequence s
    //
    // q:        [n_embd, n_head, n_tokens] F32, rows contiguous
    // k:        [n_embd, n_rows]           the cells of all heads and sequences
    // v:        [n_embd, n_rows]
    // segs:     [2, n_head_kv, n_seqs]     I32: first row and number of cells of each KV head, which may be 0
    // n_hidden: [n_tokens]                 I32: how many of the last cells of each head the token does not see
    // sinks:    [n_head]                   F32, optional
    // n_rot_k:  if K was multiplied with orthonormal Walsh-Hadamard matrices of this size, block by block of each row: so is q. 0 - none
    // n_rot_v:  the same of V: the result is multiplied with them, which undoes that
    // res:      [n_embd, n_head, n_tokens] F32, 0 for a token that sees no cell
    GGML_API struct ggml_tensor * ggml_flash_attn_ragged(
            struct ggml_context * ctx,
            struct ggml_tensor  * q,
            struct ggml_tensor  * k,
            struct ggml_tensor  * v,
            struct ggml_tensor  * segs,
            struct ggml_tensor  * n_hidden,
            struct ggml_tensor  * sinks,
            float                 scale,
            float                 logit_softcap,
            int32_t               n_rot_k,
            int32_t               n_rot_v);

    // stores rows of K and V. as ggml_set_rows for both, with the rotation that ggml_flash_attn_ragged expects
    //
    // k_cur: [n_embd, n_head_kv, n_tokens] F32, rows contiguous
    // v_cur: the same
    // k, v:  [n_embd, n_rows]
    // idxs:  [n_head_kv*n_tokens]          I32: the row of each, none twice
    // res:   a view of k
    GGML_API struct ggml_tensor * ggml_store_ragged(
            struct ggml_context * ctx,
            struct ggml_tensor  * k_cur,
            struct ggml_tensor  * v_cur,
            struct ggml_tensor  * k,
            struct ggml_tensor  * v,
            struct ggml_tensor  * idxs,
            int32_t               n_rot_k,
            int32_t               n_rot_v);

    // KeyDiff scores: -<k/|k|, anchor>, where the anchors are sums of normalised keys. their length does not change the order
    // ref: https://arxiv.org/abs/2504.15364
    //
    // k:       [n_embd, n_rows]
    // segs:    [2, n_head_kv]      I32: first row and number of cells of each KV head
    // anchors: [n_embd, n_head_kv] F32: one for each segment
    // res:     [n_rows]            F32, rows outside the segments are left as they are
    GGML_API struct ggml_tensor * ggml_keydiff_ragged(
            struct ggml_context * ctx,
            struct ggml_tensor  * k,
            struct ggml_tensor  * segs,
            struct ggml_tensor  * anchors);

    // the smallest numbers of each segment. of equal ones the first, NaN is smaller than any number
    //
    // x:    n_rows numbers, F32
    // segs: [3, n_segs]     I32: first row, number of rows, and how many to find, k_max at most
    // res:  [k_max, n_segs] I32: rows, counted from the first one of the segment, ascending. the rest is -1
    GGML_API struct ggml_tensor * ggml_bottom_k_ragged(
            struct ggml_context * ctx,
            struct ggml_tensor  * x,
            struct ggml_tensor  * segs,
            int64_t               k_max);

    // numbers that scores are made of: one op of several kinds

    enum ggml_scores_ragged {
        GGML_SCORES_RAGGED_ATTN_SUMS,
        GGML_SCORES_RAGGED_QUERY_SUMS,
        GGML_SCORES_RAGGED_VALUE_NORMS,
        GGML_SCORES_RAGGED_NORM,
        GGML_SCORES_RAGGED_WINDOW,
        GGML_SCORES_RAGGED_EXPECTED,
        GGML_SCORES_RAGGED_LEVERAGE,
        GGML_SCORES_RAGGED_CRITICAL,
    };

    GGML_API enum ggml_scores_ragged ggml_get_scores_ragged(const struct ggml_tensor * tensor);

    // accumulated attention: adds what each cell receives from the tokens, their sum, and the mean over the query heads of the KV head
    // ref: https://arxiv.org/abs/2306.14048
    //
    // q ... n_hidden as for ggml_flash_attn_ragged
    // sums: [1, n_rows] F32. those of the tokens themselves, the last cells of each segment, begin at 0
    // res:  a view of sums
    GGML_API struct ggml_tensor * ggml_attn_sums_ragged(
            struct ggml_context * ctx,
            struct ggml_tensor  * q,
            struct ggml_tensor  * k,
            struct ggml_tensor  * segs,
            struct ggml_tensor  * n_hidden,
            struct ggml_tensor  * sums,
            float                 scale,
            float                 logit_softcap);

    // statistics of queries: adds up the counted ones, and their outer products
    //
    // q:       [n_embd, n_head, n_tokens] F32, contiguous. the tokens are n_seqs runs of the same length
    // counted: [n_tokens/n_seqs, n_seqs]  F32: 0 for queries that are left out
    // slots:   [n_seqs]                   I32: the row that each sequence has in what follows
    // sum:     [n_embd*n_head, n_slots]   F32
    // outer:   [n_embd*n_embd*n_head, n_slots] F32, optional
    // res:     a view of sum
    GGML_API struct ggml_tensor * ggml_query_sums_ragged(
            struct ggml_context * ctx,
            struct ggml_tensor  * q,
            struct ggml_tensor  * counted,
            struct ggml_tensor  * slots,
            struct ggml_tensor  * sum,
            struct ggml_tensor  * outer);

    // ||v W_O||_1 of cells, the mean over the query heads of the KV head
    //
    // v:     [n_embd_v, n_rows]
    // wo:    [n_embd_v*n_head, n_embd] F32 or F16
    // rot:   [n, n] F32, optional: what n values of v each were multiplied with, symmetric and its own inverse
    // segs:  [2, n_head_kv]            I32: first row and number of cells of each KV head
    // norms: [1, n_rows] F32, rows outside the segments are left as they are
    // res:   a view of norms
    GGML_API struct ggml_tensor * ggml_value_norms_ragged(
            struct ggml_context * ctx,
            struct ggml_tensor  * v,
            struct ggml_tensor  * wo,
            struct ggml_tensor  * rot,
            struct ggml_tensor  * segs,
            struct ggml_tensor  * norms);

    // scores of the cells of some heads of a sequence. in what follows
    //
    // k, v:      [n_embd, n_rows]
    // segs:      [3, n_segs] I32: KV head, first row, and number of cells, n_max at most
    // pos:       [n_cells]   I32: positions of these cells, segment by segment, in any order
    // pos_first: cells at earlier positions are sinks: they do not compete
    // res:       [n_cells]   F32, segment by segment

    // -||k||. with v: ||k||^2 ||v||^2, each as a share of its block of cells, in the order of their positions
    // ref: https://arxiv.org/abs/2406.11430, https://arxiv.org/abs/2509.15038
    //
    // v:     optional
    // block: cells of a block, 0 for all
    GGML_API struct ggml_tensor * ggml_norm_scores_ragged(
            struct ggml_context * ctx,
            struct ggml_tensor  * k,
            struct ggml_tensor  * v,
            struct ggml_tensor  * segs,
            struct ggml_tensor  * pos,
            int32_t               n_max,
            int32_t               block);

    // the cells of the window first, the latest before the others. then mean + gamma*variance of the attention of the last queries,
    // pooled over neighbours, the mean over the query heads
    // ref: https://arxiv.org/abs/2404.14469, https://arxiv.org/abs/2503.12491
    //
    // q:     [n_embd, n_head, n_queries] F32
    // pos_q: [n_queries] I32, ascending
    // past:  [1, n_rows] F32, optional: becomes the larger of itself and the pooled attention, and is what counts
    GGML_API struct ggml_tensor * ggml_window_scores_ragged(
            struct ggml_context * ctx,
            struct ggml_tensor  * q,
            struct ggml_tensor  * pos_q,
            struct ggml_tensor  * k,
            struct ggml_tensor  * past,
            struct ggml_tensor  * segs,
            struct ggml_tensor  * pos,
            int32_t               n_head_kv,
            int32_t               n_max,
            int32_t               pos_last, // of the sequence
            int32_t               window,
            int32_t               kernel,
            float                 gamma,
            float                 scale,
            float                 logit_softcap);

    // softmax over the cells of log E[exp(scale q k)] for a Gaussian q, the mean over the query heads. with v: (that + epsilon)*||v||
    // ref: https://arxiv.org/abs/2510.00636
    //
    // mean: [n_embd, n_head] F32
    // cov:  [n_embd, n_embd, n_head] F32, optional
    // v:    optional
    GGML_API struct ggml_tensor * ggml_expected_scores_ragged(
            struct ggml_context * ctx,
            struct ggml_tensor  * mean,
            struct ggml_tensor  * cov,
            struct ggml_tensor  * k,
            struct ggml_tensor  * v,
            struct ggml_tensor  * segs,
            struct ggml_tensor  * pos,
            int32_t               n_head_kv,
            int32_t               n_max,
            int32_t               pos_first,
            float                 epsilon,
            float                 scale);

    // leverage w v A^-1 v with A = 1 + sum (w + epsilon) v v^T and w = exp(tau cos(k, mean)), relative to the largest w of the head.
    // the mean over the query heads
    // ref: https://arxiv.org/abs/2604.25975
    //
    // mean: [n_embd, n_head] F32
    GGML_API struct ggml_tensor * ggml_leverage_scores_ragged(
            struct ggml_context * ctx,
            struct ggml_tensor  * mean,
            struct ggml_tensor  * k,
            struct ggml_tensor  * v,
            struct ggml_tensor  * segs,
            struct ggml_tensor  * pos,
            int32_t               n_head_kv,
            int32_t               n_max,
            int32_t               pos_first,
            float                 tau,
            float                 epsilon);

    // choice in two stages: the n_first best cells of each segment get `chosen`, the others (score + epsilon)*norm
    // ref: https://arxiv.org/abs/2502.03805
    //
    // scores:  [n_cells] F32. of equal ones the last are better
    // norms:   [1, n_rows] F32, optional: without, the others get 0
    // n_first: [n_segs] I32
    GGML_API struct ggml_tensor * ggml_critical_scores_ragged(
            struct ggml_context * ctx,
            struct ggml_tensor  * scores,
            struct ggml_tensor  * norms,
            struct ggml_tensor  * segs,
            struct ggml_tensor  * n_first,
            int32_t               n_max,
            float                 epsilon,
            float                 chosen);

#ifdef __cplusplus
}
#endif
