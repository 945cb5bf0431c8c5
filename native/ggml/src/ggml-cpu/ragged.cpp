#include "ragged.h"

#include "ggml-cpu.h"
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "simd-gemm.h"
#include "simd-mappings.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstring>

// cells that are converted to F32 and attended to together
static constexpr int TILE = 64;

static constexpr int PAD_F32 = 16; // keeps the threads' buffers on cache lines of their own

// the queries of one KV head: n_gqa heads times n_tokens
static int n_queries(const ggml_tensor * dst) {
    return dst->src[0]->ne[1]/dst->src[3]->ne[1]*dst->src[0]->ne[2];
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

// work: scratch [n_tasks], then partial results [n_tasks][n_head_kv][n_queries]
size_t ggml_flash_attn_ragged_work_size(const ggml_tensor * dst, int n_tasks) {
    return sizeof(float)*n_tasks*(scratch_size(dst) + dst->src[3]->ne[1]*n_queries(dst)*partial_size(dst)) + PAD_F32*sizeof(float);
}

// rows [row, row + n) as F32: as they are, or converted to buf
static const float * rows_f32(const ggml_tensor * t, int64_t row, int n, float * buf) {
    const char  * src = (const char *) t->data + row*t->nb[1];
    const int64_t ne  = n*t->ne[0];

    switch (t->type) {
        case GGML_TYPE_F32:  return (const float *) src;
        case GGML_TYPE_F16:  ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) src, buf, ne); break;
        case GGML_TYPE_BF16: ggml_cpu_bf16_to_fp32((const ggml_bf16_t *) src, buf, ne); break;
        default:             ggml_get_type_traits(t->type)->to_float(src, buf, ne);     break;
    }

    return buf;
}

// res[i] = scale*<k[i], q> for n rows of k
static void dot_rows(int n, int d, const float * k, const float * q, float scale, float * res) {
    int i = 0;
#if defined(__AVX512F__)
    // four rows at a time hide the latency of the sums
    if (d % 16 == 0) {
        for (; i + 4 <= n; i += 4) {
            __m512 s[4] = { _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps() };
            for (int j = 0; j < d; j += 16) {
                const __m512 qv = _mm512_loadu_ps(q + j);
                for (int r = 0; r < 4; ++r) {
                    s[r] = _mm512_fmadd_ps(_mm512_loadu_ps(k + (i + r)*d + j), qv, s[r]);
                }
            }
            for (int r = 0; r < 4; ++r) {
                res[i + r] = scale*_mm512_reduce_add_ps(s[r]);
            }
        }
    }
#endif
    for (; i < n; ++i) {
        float s;
        ggml_vec_dot_f32(d, &s, 0, k + i*d, 0, q, 0, 1);
        res[i] = scale*s;
    }
}

void ggml_compute_forward_flash_attn_ragged(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * v    = dst->src[2];
    const ggml_tensor * segs = dst->src[3];
    const ggml_tensor * mask = dst->src[4];

    const int64_t DK        = k->ne[0];
    const int64_t DV        = v->ne[0];
    const int     n_head_kv = segs->ne[1];
    const int     n_gqa     = q->ne[1]/n_head_kv;
    const int     n_tokens  = q->ne[2];
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

    float * work     = (float *) GGML_PAD((uintptr_t) params->wdata, PAD_F32*sizeof(float));
    float * scratch  = work + ith*scratch_size(dst);
    float * partials = work + nth*scratch_size(dst);

    float * Q  = scratch;        // [n_q][DK]
    float * P  = Q  + n_q*DK;    // [n_q][TILE]
    float * KT = P  + n_q*TILE;  // [TILE][DK]
    float * VT = KT + TILE*DK;   // [TILE][DV]

    const auto partial = [&](int t, int h, int i) {
        return partials + ((int64_t(t)*n_head_kv + h)*n_q + i)*partial_size(dst);
    };

    const int32_t * seg = (const int32_t *) segs->data;

    const auto mask_row = [&](int t) { return (const ggml_fp16_t *) ((const char *) mask->data + t*mask->nb[1]); };

    // the masked columns from n_mask on are hidden from all tokens
    int n_mask = 0;
    for (int t = 0; t < n_tokens; ++t) {
        const ggml_fp16_t * row = mask_row(t);
        for (int i = mask->ne[0] - 1; i >= n_mask; --i) {
            if (GGML_CPU_FP16_TO_FP32(row[i]) != -INFINITY) {
                n_mask = i + 1;
                break;
            }
        }
    }
    const int n_hidden = mask->ne[0] - n_mask;

    // equal shares of all cells, whatever head they belong to
    int64_t n_cells = 0;
    for (int h = 0; h < n_head_kv; ++h) {
        n_cells += seg[2*h + 1] - n_hidden;
    }
    const int64_t c0 = n_cells* ith     /nth;
    const int64_t c1 = n_cells*(ith + 1)/nth;

    int64_t offs = 0;
    for (int h = 0; h < n_head_kv; ++h) {
        const int64_t row  = seg[2*h];
        const int     size = seg[2*h + 1] - n_hidden;

        const int first = std::clamp<int64_t>(c0 - offs, 0, size);
        const int last  = std::clamp<int64_t>(c1 - offs, 0, size);

        offs += size;

        for (int i = 0; i < n_q; ++i) {
            float * res = partial(ith, h, i);
            res[0] = -INFINITY;
            std::fill(res + 1, res + partial_size(dst), 0.0f);
        }
        if (first == last) {
            continue;
        }

        // the queries of the head: token by token, and within a token head by head
        for (int i = 0; i < n_q; ++i) {
            memcpy(Q + i*DK, (const char *) q->data + (i/n_gqa)*q->nb[2] + (h*n_gqa + i%n_gqa)*q->nb[1], DK*sizeof(float));
        }

        for (int c = first; c < last; c += TILE) {
            const int n = std::min(TILE, last - c);

            const float * K = rows_f32(k, row + c, n, KT);
            const float * V = rows_f32(v, row + c, n, VT);

            for (int i = 0; i < n_q; ++i) {
                float * p   = P + i*n;
                float * res = partial(ith, h, i);

                dot_rows(n, DK, K, Q + i*DK, scale, p);

                if (logit_softcap != 0.0f) {
                    for (int j = 0; j < n; ++j) {
                        p[j] = logit_softcap*tanhf(p[j]);
                    }
                }

                const int j0 = std::max(0, size - n_mask - c); // first masked cell of the tile
                for (int j = j0; j < n; ++j) {
                    p[j] += GGML_CPU_FP16_TO_FP32(mask_row(i/n_gqa)[c + j - (size - n_mask)]);
                }

                float max;
                ggml_vec_max_f32(n, &max, p);
                if (max == -INFINITY) {
                    std::fill(p, p + n, 0.0f);
                    continue;
                }

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
    }

    ggml_barrier(params->threadpool);

    // combine the shares
    for (int j = ith; j < n_head_kv*n_q; j += nth) {
        const int h = j/n_q;
        const int i = j%n_q;

        float max = -INFINITY;
        for (int t = 0; t < nth; ++t) {
            max = std::max(max, partial(t, h, i)[0]);
        }

        float * out = (float *) ((char *) dst->data + (i/n_gqa)*dst->nb[2] + (h*n_gqa + i%n_gqa)*dst->nb[1]);
        std::fill(out, out + DV, 0.0f);

        float sum = 0.0f;
        for (int t = 0; t < nth; ++t) {
            const float * res = partial(t, h, i);
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
    }
}
