#include "ggml-ragged.h"

#include "ggml-impl.h"

struct ggml_tensor * ggml_flash_attn_ragged(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * k,
        struct ggml_tensor  * v,
        struct ggml_tensor  * segs,
        struct ggml_tensor  * n_hidden,
        struct ggml_tensor  * sinks,
        float                 scale,
        float                 logit_softcap) {
    GGML_ASSERT(q->type        == GGML_TYPE_F32);
    GGML_ASSERT(segs->type     == GGML_TYPE_I32);
    GGML_ASSERT(n_hidden->type == GGML_TYPE_I32);

    GGML_ASSERT(q->ne[0] == k->ne[0]);
    GGML_ASSERT(k->ne[1] == v->ne[1]);
    GGML_ASSERT(segs->ne[0] == 2);
    GGML_ASSERT(q->ne[1] % segs->ne[1] == 0);
    GGML_ASSERT(segs->ne[3] == 1);
    GGML_ASSERT(q->ne[2] % segs->ne[2] == 0);
    GGML_ASSERT(q->ne[2] == n_hidden->ne[0]);
    GGML_ASSERT(q->ne[3] == 1);

    GGML_ASSERT(ggml_is_contiguous_rows(q));
    GGML_ASSERT(ggml_is_contiguous(k));
    GGML_ASSERT(ggml_is_contiguous(v));
    GGML_ASSERT(ggml_is_contiguous(segs));
    GGML_ASSERT(ggml_is_contiguous(n_hidden));

    if (sinks) {
        GGML_ASSERT(sinks->type == GGML_TYPE_F32);
        GGML_ASSERT(sinks->ne[0] == q->ne[1]);
        GGML_ASSERT(ggml_is_contiguous(sinks));
    }

    struct ggml_tensor * result = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, v->ne[0], q->ne[1], q->ne[2]);

    float params[] = { scale, logit_softcap };
    ggml_set_op_params(result, params, sizeof(params));

    result->op     = GGML_OP_FLASH_ATTN_RAGGED;
    result->src[0] = q;
    result->src[1] = k;
    result->src[2] = v;
    result->src[3] = segs;
    result->src[4] = n_hidden;
    result->src[5] = sinks;

    return result;
}

struct ggml_tensor * ggml_keydiff_ragged(
        struct ggml_context * ctx,
        struct ggml_tensor  * k,
        struct ggml_tensor  * segs) {
    GGML_ASSERT(segs->type  == GGML_TYPE_I32);
    GGML_ASSERT(segs->ne[0] == 2);
    GGML_ASSERT(ggml_is_matrix(segs));

    GGML_ASSERT(ggml_is_contiguous(k));
    GGML_ASSERT(ggml_is_contiguous(segs));

    struct ggml_tensor * result = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, k->ne[1]);

    result->op     = GGML_OP_KEYDIFF_RAGGED;
    result->src[0] = k;
    result->src[1] = segs;

    return result;
}

struct ggml_tensor * ggml_bottom_k_ragged(
        struct ggml_context * ctx,
        struct ggml_tensor  * x,
        struct ggml_tensor  * segs,
        int64_t               k_max) {
    GGML_ASSERT(x->type     == GGML_TYPE_F32);
    GGML_ASSERT(segs->type  == GGML_TYPE_I32);
    GGML_ASSERT(segs->ne[0] == 3);

    GGML_ASSERT(ggml_is_contiguous(x));
    GGML_ASSERT(ggml_is_contiguous(segs));

    struct ggml_tensor * result = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, k_max, segs->ne[1]);

    result->op     = GGML_OP_BOTTOM_K_RAGGED;
    result->src[0] = x;
    result->src[1] = segs;

    return result;
}
