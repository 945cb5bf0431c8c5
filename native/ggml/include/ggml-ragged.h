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
            float                 logit_softcap);

    // KeyDiff scores: -cos(k, mean of the normalised keys of the segment)
    // ref: https://arxiv.org/abs/2504.15364
    //
    // k:    [n_embd, n_rows]
    // segs: [2, n_head_kv] I32: first row and number of cells of each KV head
    // res:  [n_rows]       F32, rows outside the segments are left as they are
    GGML_API struct ggml_tensor * ggml_keydiff_ragged(
            struct ggml_context * ctx,
            struct ggml_tensor  * k,
            struct ggml_tensor  * segs);

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

#ifdef __cplusplus
}
#endif
