#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

    // attention over a cache in which every KV head has cells of its own
    //
    // q:    [n_embd_k, n_head, n_tokens] F32, rows contiguous
    // k:    [n_embd_k, n_rows]           the cells of all heads
    // v:    [n_embd_v, n_rows]
    // segs: [2, n_head_kv]               I32: first row and number of cells of each KV head
    // mask: [n_mask, n_tokens]           F16: for the last n_mask cells of each head. all tokens see the cells before them
    // res:  [n_embd_v, n_head, n_tokens] F32
    GGML_API struct ggml_tensor * ggml_flash_attn_ragged(
            struct ggml_context * ctx,
            struct ggml_tensor  * q,
            struct ggml_tensor  * k,
            struct ggml_tensor  * v,
            struct ggml_tensor  * segs,
            struct ggml_tensor  * mask,
            float                 scale,
            float                 logit_softcap);

#ifdef __cplusplus
}
#endif
