#include "ggml-ragged.h"

#include "ggml-impl.h"

static bool is_rot_size(int32_t n_rot, int64_t n_embd) {
    return n_rot == 0 || (n_rot > 0 && (n_rot & (n_rot - 1)) == 0 && n_embd % n_rot == 0);
}

struct ggml_tensor * ggml_flash_attn_ragged(
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
        int32_t               n_rot_v) {
    GGML_ASSERT(q->type        == GGML_TYPE_F32);
    GGML_ASSERT(segs->type     == GGML_TYPE_I32);
    GGML_ASSERT(n_hidden->type == GGML_TYPE_I32);

    GGML_ASSERT(q->ne[0] == k->ne[0]);
    GGML_ASSERT(k->ne[1] == v->ne[1]);
    GGML_ASSERT(is_rot_size(n_rot_k, k->ne[0]));
    GGML_ASSERT(is_rot_size(n_rot_v, v->ne[0]));
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

    ggml_set_op_params_f32(result, 0, scale);
    ggml_set_op_params_f32(result, 1, logit_softcap);
    ggml_set_op_params_i32(result, 2, n_rot_k);
    ggml_set_op_params_i32(result, 3, n_rot_v);

    result->op     = GGML_OP_FLASH_ATTN_RAGGED;
    result->src[0] = q;
    result->src[1] = k;
    result->src[2] = v;
    result->src[3] = segs;
    result->src[4] = n_hidden;
    result->src[5] = sinks;

    return result;
}

struct ggml_tensor * ggml_store_ragged(
        struct ggml_context * ctx,
        struct ggml_tensor  * k_cur,
        struct ggml_tensor  * v_cur,
        struct ggml_tensor  * k,
        struct ggml_tensor  * v,
        struct ggml_tensor  * idxs,
        int32_t               n_rot_k,
        int32_t               n_rot_v) {
    GGML_ASSERT(k_cur->type == GGML_TYPE_F32);
    GGML_ASSERT(v_cur->type == GGML_TYPE_F32);
    GGML_ASSERT(idxs->type  == GGML_TYPE_I32);

    GGML_ASSERT(k_cur->ne[0] == k->ne[0]);
    GGML_ASSERT(v_cur->ne[0] == v->ne[0]);
    GGML_ASSERT(k_cur->ne[1] == v_cur->ne[1]);
    GGML_ASSERT(k_cur->ne[2] == v_cur->ne[2]);
    GGML_ASSERT(k_cur->ne[3] == 1 && v_cur->ne[3] == 1);
    GGML_ASSERT(k_cur->ne[1]*k_cur->ne[2] == ggml_nelements(idxs));
    GGML_ASSERT(is_rot_size(n_rot_k, k->ne[0]));
    GGML_ASSERT(is_rot_size(n_rot_v, v->ne[0]));

    GGML_ASSERT(ggml_is_contiguous_rows(k_cur));
    GGML_ASSERT(ggml_is_contiguous_rows(v_cur));
    GGML_ASSERT(ggml_is_contiguous(k));
    GGML_ASSERT(ggml_is_contiguous(v));
    GGML_ASSERT(ggml_is_contiguous(idxs));

    struct ggml_tensor * result = ggml_view_tensor(ctx, k);

    ggml_set_op_params_i32(result, 0, n_rot_k);
    ggml_set_op_params_i32(result, 1, n_rot_v);

    result->op     = GGML_OP_STORE_RAGGED;
    result->src[0] = k_cur;
    result->src[1] = v_cur;
    result->src[2] = k;
    result->src[3] = v;
    result->src[4] = idxs;

    return result;
}

struct ggml_tensor * ggml_keydiff_ragged(
        struct ggml_context * ctx,
        struct ggml_tensor  * k,
        struct ggml_tensor  * segs,
        struct ggml_tensor  * anchors) {
    GGML_ASSERT(segs->type  == GGML_TYPE_I32);
    GGML_ASSERT(segs->ne[0] == 2);
    GGML_ASSERT(ggml_is_matrix(segs));

    GGML_ASSERT(ggml_is_contiguous(k));
    GGML_ASSERT(ggml_is_contiguous(segs));

    GGML_ASSERT(anchors->type == GGML_TYPE_F32);
    GGML_ASSERT(anchors->ne[0] == k->ne[0] && anchors->ne[1] == segs->ne[1]);
    GGML_ASSERT(ggml_is_matrix(anchors));
    GGML_ASSERT(ggml_is_contiguous(anchors));

    struct ggml_tensor * result = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, k->ne[1]);

    result->op     = GGML_OP_KEYDIFF_RAGGED;
    result->src[0] = k;
    result->src[1] = segs;
    result->src[2] = anchors;

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

//
// scores
//

enum ggml_scores_ragged ggml_get_scores_ragged(const struct ggml_tensor * tensor) {
    GGML_ASSERT(tensor->op == GGML_OP_SCORES_RAGGED);

    return (enum ggml_scores_ragged) ggml_get_op_params_i32(tensor, 0);
}

static void set_scores_params(struct ggml_tensor * result, enum ggml_scores_ragged kind, const int32_t ints[5], const float floats[4]) {
    result->op = GGML_OP_SCORES_RAGGED;

    ggml_set_op_params_i32(result, 0, kind);
    for (int i = 0; i < 5; ++i) {
        ggml_set_op_params_i32(result, 1 + i, ints[i]);
    }
    for (int i = 0; i < 4; ++i) {
        ggml_set_op_params_f32(result, 6 + i, floats[i]);
    }
}

static void check_segs(const struct ggml_tensor * segs, int64_t ne0) {
    GGML_ASSERT(segs->type  == GGML_TYPE_I32);
    GGML_ASSERT(segs->ne[0] == ne0);
    GGML_ASSERT(ggml_is_contiguous(segs));
}

struct ggml_tensor * ggml_attn_sums_ragged(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * k,
        struct ggml_tensor  * segs,
        struct ggml_tensor  * n_hidden,
        struct ggml_tensor  * sums,
        float                 scale,
        float                 logit_softcap) {
    GGML_ASSERT(q->type        == GGML_TYPE_F32);
    GGML_ASSERT(n_hidden->type == GGML_TYPE_I32);
    GGML_ASSERT(sums->type     == GGML_TYPE_F32);

    check_segs(segs, 2);

    GGML_ASSERT(q->ne[0] == k->ne[0]);
    GGML_ASSERT(q->ne[1] % segs->ne[1] == 0);
    GGML_ASSERT(q->ne[2] % segs->ne[2] == 0);
    GGML_ASSERT(q->ne[2] == n_hidden->ne[0]);
    GGML_ASSERT(ggml_nelements(sums) == k->ne[1]);

    GGML_ASSERT(ggml_is_contiguous_rows(q));
    GGML_ASSERT(ggml_is_contiguous(k));
    GGML_ASSERT(ggml_is_contiguous(sums));
    GGML_ASSERT(ggml_is_contiguous(n_hidden));

    struct ggml_tensor * result = ggml_view_tensor(ctx, sums);

    set_scores_params(result, GGML_SCORES_RAGGED_ATTN_SUMS, (const int32_t[5]) { 0 }, (const float[4]) { scale, logit_softcap });

    result->src[0] = q;
    result->src[1] = k;
    result->src[2] = segs;
    result->src[3] = n_hidden;
    result->src[4] = sums;

    return result;
}

struct ggml_tensor * ggml_query_sums_ragged(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * counted,
        struct ggml_tensor  * slots,
        struct ggml_tensor  * sum,
        struct ggml_tensor  * outer) {
    GGML_ASSERT(q->type       == GGML_TYPE_F32);
    GGML_ASSERT(counted->type == GGML_TYPE_F32);
    GGML_ASSERT(slots->type   == GGML_TYPE_I32);
    GGML_ASSERT(sum->type     == GGML_TYPE_F32);

    GGML_ASSERT(q->ne[2] == ggml_nelements(counted));
    GGML_ASSERT(q->ne[2] == ggml_nelements(slots)*counted->ne[0]);
    GGML_ASSERT(q->ne[3] == 1);
    GGML_ASSERT(sum->ne[0] == q->ne[0]*q->ne[1]);

    GGML_ASSERT(ggml_is_contiguous(q));
    GGML_ASSERT(ggml_is_contiguous(counted));
    GGML_ASSERT(ggml_is_contiguous(slots));
    GGML_ASSERT(ggml_is_contiguous(sum));

    if (outer) {
        GGML_ASSERT(outer->type  == GGML_TYPE_F32);
        GGML_ASSERT(outer->ne[0] == q->ne[0]*sum->ne[0]);
        GGML_ASSERT(ggml_is_contiguous(outer));
    }

    struct ggml_tensor * result = ggml_view_tensor(ctx, sum);

    set_scores_params(result, GGML_SCORES_RAGGED_QUERY_SUMS, (const int32_t[5]) { 0 }, (const float[4]) { 0 });

    result->src[0] = q;
    result->src[1] = counted;
    result->src[2] = slots;
    result->src[3] = sum;
    result->src[4] = outer;

    return result;
}

struct ggml_tensor * ggml_value_norms_ragged(
        struct ggml_context * ctx,
        struct ggml_tensor  * v,
        struct ggml_tensor  * wo,
        struct ggml_tensor  * rot,
        struct ggml_tensor  * segs,
        struct ggml_tensor  * norms) {
    GGML_ASSERT(wo->type == GGML_TYPE_F32 || wo->type == GGML_TYPE_F16);
    GGML_ASSERT(norms->type == GGML_TYPE_F32);

    check_segs(segs, 2);

    GGML_ASSERT(wo->ne[0] % (v->ne[0]*segs->ne[1]) == 0);
    GGML_ASSERT(ggml_nelements(norms) == v->ne[1]);
    GGML_ASSERT(ggml_is_contiguous_rows(wo));
    GGML_ASSERT(ggml_is_contiguous(v));
    GGML_ASSERT(ggml_is_contiguous(norms));

    if (rot) {
        GGML_ASSERT(rot->type == GGML_TYPE_F32);
        GGML_ASSERT(rot->ne[0] == rot->ne[1] && v->ne[0] % rot->ne[0] == 0);
        GGML_ASSERT(ggml_is_contiguous(rot));
    }

    struct ggml_tensor * result = ggml_view_tensor(ctx, norms);

    set_scores_params(result, GGML_SCORES_RAGGED_VALUE_NORMS, (const int32_t[5]) { 0 }, (const float[4]) { 0 });

    result->src[0] = v;
    result->src[1] = wo;
    result->src[2] = segs;
    result->src[3] = rot;
    result->src[4] = norms;

    return result;
}

// q: what there is of the queries [n_embd, n_head, ...], optional
static struct ggml_tensor * new_scores(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * k,
        struct ggml_tensor  * v,
        struct ggml_tensor  * segs,
        struct ggml_tensor  * pos,
        int32_t               n_head_kv) {
    check_segs(segs, 3);

    GGML_ASSERT(pos->type == GGML_TYPE_I32);
    GGML_ASSERT(ggml_is_contiguous(k));
    GGML_ASSERT(ggml_is_contiguous(pos));

    if (q) {
        GGML_ASSERT(q->type  == GGML_TYPE_F32);
        GGML_ASSERT(q->ne[0] == k->ne[0]);
        GGML_ASSERT(q->ne[1] % n_head_kv == 0);
        GGML_ASSERT(ggml_is_contiguous(q));
    }
    if (v) {
        GGML_ASSERT(v->ne[1] == k->ne[1]);
        GGML_ASSERT(ggml_is_contiguous(v));
    }

    struct ggml_tensor * result = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, ggml_nelements(pos));

    result->src[0] = q;
    result->src[1] = k;
    result->src[2] = segs;
    result->src[3] = pos;
    result->src[4] = v;

    return result;
}

struct ggml_tensor * ggml_norm_scores_ragged(
        struct ggml_context * ctx,
        struct ggml_tensor  * k,
        struct ggml_tensor  * v,
        struct ggml_tensor  * segs,
        struct ggml_tensor  * pos,
        int32_t               n_max,
        int32_t               block) {
    GGML_ASSERT(block >= 0);

    struct ggml_tensor * result = new_scores(ctx, NULL, k, v, segs, pos, 1);

    set_scores_params(result, GGML_SCORES_RAGGED_NORM, (const int32_t[5]) { 1, n_max, block }, (const float[4]) { 0 });

    return result;
}

struct ggml_tensor * ggml_window_scores_ragged(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * pos_q,
        struct ggml_tensor  * k,
        struct ggml_tensor  * past,
        struct ggml_tensor  * segs,
        struct ggml_tensor  * pos,
        int32_t               n_head_kv,
        int32_t               n_max,
        int32_t               pos_last,
        int32_t               window,
        int32_t               kernel,
        float                 gamma,
        float                 scale,
        float                 logit_softcap) {
    GGML_ASSERT(pos_q->type == GGML_TYPE_I32 && ggml_nelements(pos_q) == q->ne[2]);
    GGML_ASSERT(kernel % 2 == 1);

    if (past) {
        GGML_ASSERT(past->type == GGML_TYPE_F32 && ggml_nelements(past) == k->ne[1]);
        GGML_ASSERT(ggml_is_contiguous(past));
    }

    struct ggml_tensor * result = new_scores(ctx, q, k, NULL, segs, pos, n_head_kv);

    set_scores_params(result, GGML_SCORES_RAGGED_WINDOW,
            (const int32_t[5]) { n_head_kv, n_max, pos_last, window, kernel }, (const float[4]) { scale, logit_softcap, gamma });

    result->src[5] = pos_q;
    result->src[6] = past;

    return result;
}

struct ggml_tensor * ggml_expected_scores_ragged(
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
        float                 scale) {
    if (cov) {
        GGML_ASSERT(cov->type == GGML_TYPE_F32 && ggml_is_contiguous(cov));
        GGML_ASSERT(cov->ne[0] == k->ne[0] && cov->ne[1] == k->ne[0] && cov->ne[2] == mean->ne[1]);
    }

    struct ggml_tensor * result = new_scores(ctx, mean, k, v, segs, pos, n_head_kv);

    set_scores_params(result, GGML_SCORES_RAGGED_EXPECTED,
            (const int32_t[5]) { n_head_kv, n_max, pos_first }, (const float[4]) { scale, epsilon });

    result->src[5] = cov;

    return result;
}

struct ggml_tensor * ggml_leverage_scores_ragged(
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
        float                 epsilon) {
    struct ggml_tensor * result = new_scores(ctx, mean, k, v, segs, pos, n_head_kv);

    set_scores_params(result, GGML_SCORES_RAGGED_LEVERAGE,
            (const int32_t[5]) { n_head_kv, n_max, pos_first }, (const float[4]) { tau, epsilon });

    return result;
}

struct ggml_tensor * ggml_critical_scores_ragged(
        struct ggml_context * ctx,
        struct ggml_tensor  * scores,
        struct ggml_tensor  * norms,
        struct ggml_tensor  * segs,
        struct ggml_tensor  * n_first,
        int32_t               n_max,
        float                 epsilon,
        float                 chosen) {
    GGML_ASSERT(scores->type  == GGML_TYPE_F32);
    GGML_ASSERT(n_first->type == GGML_TYPE_I32 && ggml_nelements(n_first) == segs->ne[1]);

    check_segs(segs, 3);

    GGML_ASSERT(ggml_is_contiguous(scores));

    if (norms) {
        GGML_ASSERT(norms->type == GGML_TYPE_F32 && ggml_is_contiguous(norms));
    }

    struct ggml_tensor * result = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, ggml_nelements(scores));

    set_scores_params(result, GGML_SCORES_RAGGED_CRITICAL, (const int32_t[5]) { 0, n_max }, (const float[4]) { epsilon, chosen });

    result->src[0] = scores;
    result->src[1] = norms;
    result->src[2] = segs;
    result->src[3] = n_first;

    return result;
}
