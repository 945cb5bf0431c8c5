#include "ragged.h"

#include "ragged-impl.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "simd-gemm.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstring>

//
// attention
//

// segments: the KV heads of all sequences
static int n_segments(const ggml_tensor * dst) {
    return dst->src[3]->ne[1]*dst->src[3]->ne[2];
}

// the queries of a segment: n_gqa heads times the tokens of a sequence
static int n_queries(const ggml_tensor * dst) {
    return dst->src[0]->ne[1]*dst->src[0]->ne[2]/n_segments(dst);
}

// maximum, sum and values of a query
static int64_t partial_size(const ggml_tensor * dst) {
    return 2 + dst->src[2]->ne[0];
}

static int64_t scratch_size(const ggml_tensor * dst) {
    const int64_t DK = dst->src[1]->ne[0];
    const int64_t DV = dst->src[2]->ne[0];

    return GGML_PAD(n_queries(dst)*(DK + TILE) + TILE*(DK + DV), PAD_F32);
}

void ggml_compute_forward_flash_attn_ragged(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * q     = dst->src[0];
    const ggml_tensor * k     = dst->src[1];
    const ggml_tensor * v     = dst->src[2];
    const ggml_tensor * segs  = dst->src[3];
    const ggml_tensor * sinks = dst->src[5];

    const int64_t DK        = k->ne[0];
    const int64_t DV        = v->ne[0];
    const int     n_head_kv = segs->ne[1];
    const int     n_gqa     = q->ne[1]/n_head_kv;
    const int     n_tokens  = q->ne[2]/segs->ne[2]; // of a sequence
    const int     n_segs    = n_segments(dst);
    const int     n_q       = n_queries(dst);

    const int ith = params->ith;
    const int nth = params->nth;

    float scale;
    float logit_softcap;
    memcpy(&scale,         (const float *) dst->op_params + 0, sizeof(float));
    memcpy(&logit_softcap, (const float *) dst->op_params + 1, sizeof(float));
    if (logit_softcap != 0.0f) {
        scale /= logit_softcap;
    }
    const int n_rot_k = ggml_get_op_params_i32(dst, 2);
    const int n_rot_v = ggml_get_op_params_i32(dst, 3);

    float * work     = (float *) GGML_PAD((uintptr_t) params->wdata, PAD_F32*sizeof(float));
    float * scratch  = work + ith*scratch_size(dst);
    float * partials = work + nth*scratch_size(dst);

    float * Q  = scratch;        // [n_q][DK]
    float * P  = Q  + n_q*DK;    // [n_q][TILE]
    float * KT = P  + n_q*TILE;  // [TILE][DK]
    float * VT = KT + TILE*DK;   // [TILE][DV]

    const auto partial = [&](int t, int is, int i) {
        return partials + ((int64_t(t)*n_segs + is)*n_q + i)*partial_size(dst);
    };

    // the queries of a segment: token by token, and within a token head by head
    const auto token = [&](int is, int i) { return is/n_head_kv*n_tokens + i/n_gqa; };
    const auto head  = [&](int is, int i) { return is%n_head_kv*n_gqa    + i%n_gqa; };

    const int32_t * seg      = (const int32_t *) segs->data;
    const int32_t * n_hidden = (const int32_t *) dst->src[4]->data;

    const auto n_seen = [&](int is, int i) { return seg[2*is + 1] - n_hidden[token(is, i)]; };

    // the cells that no token of the sequence sees are left out
    const auto size = [&](int is) {
        const int32_t * first = n_hidden + is/n_head_kv*n_tokens;
        return std::max(seg[2*is + 1] - *std::min_element(first, first + n_tokens), 0);
    };

    for_each_share(n_segs, ith, nth, size, [&](int is, int first, int last) {
        for (int i = 0; i < n_q; ++i) {
            float * res = partial(ith, is, i);
            res[0] = -INFINITY;
            std::fill(res + 1, first == last ? res + 2 : res + partial_size(dst), 0.0f);
        }
        if (first == last) {
            return;
        }

        for (int i = 0; i < n_q; ++i) {
            memcpy(Q + i*DK, (const char *) q->data + token(is, i)*q->nb[2] + head(is, i)*q->nb[1], DK*sizeof(float));
            hadamard(DK, n_rot_k, Q + i*DK);
        }

        for (int c = first; c < last; c += TILE) {
            const int n = std::min(TILE, last - c);

            const float * K = rows_f32(k, seg[2*is] + c, n, KT);
            const float * V = rows_f32(v, seg[2*is] + c, n, VT);

            for (int i = 0; i < n_q; ++i) {
                const int n_tile = std::clamp(n_seen(is, i) - c, 0, n);
                if (n_tile == 0) {
                    continue;
                }

                float * p   = P + i*n;
                float * res = partial(ith, is, i);

                dot_rows(n, DK, K, Q + i*DK, scale, p);

                if (logit_softcap != 0.0f) {
                    for (int j = 0; j < n; ++j) {
                        p[j] = logit_softcap*tanhf(p[j]);
                    }
                }
                std::fill(p + n_tile, p + n, -INFINITY);

                float max;
                ggml_vec_max_f32(n, &max, p);
                if (max > res[0]) {
                    const float old = expf(res[0] - max);

                    res[1] *= old;
                    ggml_vec_scale_f32(DV, res + 2, old);
                    res[0] = max;
                }
                res[1] += ggml_vec_soft_max_f32(n, p, p, res[0]);

                simd_gemm(res + 2, p, V, 1, n, DV);
            }
        }
    });

    ggml_barrier(params->threadpool);

    // combine the shares
    for (int j = ith; j < n_segs*n_q; j += nth) {
        const int is = j/n_q;
        const int i  = j%n_q;

        const float sink = sinks ? ((const float *) sinks->data)[head(is, i)] : -INFINITY;

        float max = sink;
        for (int t = 0; t < nth; ++t) {
            max = std::max(max, partial(t, is, i)[0]);
        }

        float * out = (float *) ((char *) dst->data + token(is, i)*dst->nb[2] + head(is, i)*dst->nb[1]);
        std::fill(out, out + DV, 0.0f);

        float sum = sinks ? expf(sink - max) : 0.0f;
        for (int t = 0; t < nth; ++t) {
            const float * res = partial(t, is, i);
            if (res[1] == 0.0f) {
                continue;
            }
            const float w = expf(res[0] - max);

            sum += w*res[1];
            ggml_vec_mad_f32(DV, out, res + 2, w);
        }
        if (sum > 0.0f) {
            ggml_vec_scale_f32(DV, out, 1.0f/sum);
        }
        hadamard(DV, n_rot_v, out);
    }
}

//
// rows of K and V
//

static int64_t store_scratch_size(const ggml_tensor * dst) {
    return GGML_PAD(std::max(dst->src[0]->ne[0], dst->src[1]->ne[0]), PAD_F32);
}

void ggml_compute_forward_store_ragged(const ggml_compute_params * params, ggml_tensor * dst) {
    float * row = (float *) GGML_PAD((uintptr_t) params->wdata, PAD_F32*sizeof(float)) + params->ith*store_scratch_size(dst);

    const int32_t * idxs = (const int32_t *) dst->src[4]->data;

    for (int i = 0; i < 2; ++i) {
        const ggml_tensor * cur   = dst->src[i];
        const ggml_tensor * cells = dst->src[2 + i];

        const int64_t D     = cur->ne[0];
        const int     n_rot = ggml_get_op_params_i32(dst, i);

        const ggml_from_float_t from_float = ggml_get_type_traits_cpu(cells->type)->from_float;

        for (int64_t r = params->ith; r < cur->ne[1]*cur->ne[2]; r += params->nth) {
            memcpy(row, (const char *) cur->data + r/cur->ne[1]*cur->nb[2] + r%cur->ne[1]*cur->nb[1], D*sizeof(float));
            hadamard(D, n_rot, row);
            from_float(row, (char *) cells->data + idxs[r]*cells->nb[1], D);
        }
    }
}

//
// KeyDiff
//

static int64_t keydiff_scratch_size(const ggml_tensor * dst) {
    return GGML_PAD(TILE*dst->src[0]->ne[0] + TILE, PAD_F32);
}

void ggml_compute_forward_keydiff_ragged(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * k       = dst->src[0];
    const ggml_tensor * segs    = dst->src[1];
    const ggml_tensor * anchors = dst->src[2];

    const int64_t D = k->ne[0];

    float * work = (float *) GGML_PAD((uintptr_t) params->wdata, PAD_F32*sizeof(float));
    float * KT   = work + params->ith*keydiff_scratch_size(dst); // [TILE][D]
    float * dots = KT + TILE*D;                                  // [TILE]

    const int32_t * seg = (const int32_t *) segs->data;

    for_each_share(segs->ne[1], params->ith, params->nth, [&](int h) { return seg[2*h + 1]; }, [&](int h, int first, int last) {
        for (int c = first; c < last; c += TILE) {
            const int n = std::min(TILE, last - c);

            const float * K   = rows_f32(k, seg[2*h] + c, n, KT);
            float       * res = (float *) dst->data + seg[2*h] + c;

            dot_rows(n, D, K, (const float *) anchors->data + h*D, -1.0f, dots);
            for (int i = 0; i < n; ++i) {
                float sqr;
                ggml_vec_dot_f32(D, &sqr, 0, K + i*D, 0, K + i*D, 0, 1);
                res[i] = sqr > 0.0f ? dots[i]/sqrtf(sqr) : 0.0f;
            }
        }
    });
}

//
// the smallest of each segment
//

void ggml_compute_forward_bottom_k_ragged(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * x    = dst->src[0];
    const ggml_tensor * segs = dst->src[1];

    uint64_t * work = (uint64_t *) GGML_PAD((uintptr_t) params->wdata, sizeof(uint64_t)) + params->ith*ggml_nelements(x);

    for (int64_t s = params->ith; s < segs->ne[1]; s += params->nth) {
        const int32_t * seg  = (const int32_t *) segs->data + 3*s;
        const float   * data = (const float *) x->data + seg[0];
        int32_t       * res  = (int32_t *) dst->data + s*dst->ne[0];

        const int n = seg[1];
        const int k = std::min(seg[2], n);

        for (int i = 0; i < n; ++i) {
            work[i] = uint64_t(float_to_ordered(data[i])) << 32 | i;
        }
        if (k < n) {
            std::nth_element(work, work + k, work + n);
        }
        for (int i = 0; i < dst->ne[0]; ++i) {
            res[i] = i < k ? int32_t(work[i]) : -1;
        }
        std::sort(res, res + k);
    }
}

size_t ggml_ragged_work_size(const ggml_tensor * dst, int n_tasks) {
    switch (dst->op) {
        case GGML_OP_FLASH_ATTN_RAGGED:
            // scratch [n_tasks], then partial results [n_tasks][n_segments][n_queries]
            return sizeof(float)*(n_tasks*(scratch_size(dst) + n_segments(dst)*n_queries(dst)*partial_size(dst)) + PAD_F32);
        case GGML_OP_STORE_RAGGED:
            return sizeof(float)*(n_tasks*store_scratch_size(dst) + PAD_F32);
        case GGML_OP_KEYDIFF_RAGGED:
            return sizeof(float)*(n_tasks*keydiff_scratch_size(dst) + PAD_F32);
        case GGML_OP_BOTTOM_K_RAGGED:
            return sizeof(uint64_t)*(n_tasks*ggml_nelements(dst->src[0]) + 1);
        case GGML_OP_SCORES_RAGGED:
            return ggml_scores_ragged_work_size(dst, n_tasks);
        default:
            GGML_ABORT("fatal error");
    }
}
