#include "ragged.h"

#include "ragged-impl.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "ggml-ragged.h"
#include "simd-gemm.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

// attention scores are computed as K Q^T: a row has the queries of one cell, a multiple of this number of them
static constexpr int PAD_COLUMNS = 16;

// memory of the attention scores of a block of queries, per thread
static constexpr int64_t MAX_BLOCK_F32 = 1 << 20;

//
// shared by the kinds
//

// memory for a number of floats at a time, on cache lines of their own
struct work_area {
    float * next;

    float * take(int64_t n) {
        float * res = next;
        next += GGML_PAD(n, PAD_F32);
        return res;
    }
};

// what threads share and what is a thread's own
struct work_sizes {
    int64_t n_shared = 0;
    int64_t n_own    = 0;

    void shared(int64_t n) { n_shared += GGML_PAD(n, PAD_F32); }
    void own   (int64_t n) { n_own    += GGML_PAD(n, PAD_F32); }
};

static std::pair<work_area, work_area> get_work(const ggml_compute_params * params, const work_sizes & sizes) {
    float * work = (float *) GGML_PAD((uintptr_t) params->wdata, PAD_F32*sizeof(float));

    return { { work }, { work + sizes.n_shared + params->ith*sizes.n_own } };
}

// the cells of a segment that a thread has
struct share {
    int first;
    int last;

    share(int n, const ggml_compute_params * params) :
        first(int64_t(n)* params->ith     /params->nth),
        last (int64_t(n)*(params->ith + 1)/params->nth) {
    }

    int size() const { return last - first; }

    static int max_size(int n_max, int nth) { return (n_max + nth - 1)/nth; }
};

// res[j*stride + i] = scale*x[i*d + j] for n rows of x
static void transpose(int n, int d, const float * x, float scale, float * res, int64_t stride) {
    for (int j0 = 0; j0 < d; j0 += 16) {
        for (int i = 0; i < n; ++i) {
            for (int j = j0; j < std::min(j0 + 16, d); ++j) {
                res[j*stride + i] = scale*x[i*d + j];
            }
        }
    }
}

static float dot(int n, const float * x, const float * y) {
    float res;
    ggml_vec_dot_f32(n, &res, 0, x, 0, y, 0, 1);
    return res;
}

static void vec_max(int n, float * res, const float * x) {
    for (int i = 0; i < n; ++i) {
        res[i] = x[i] > res[i] ? x[i] : res[i];
    }
}

// x = exp(x - max), added to sum. n is a multiple of PAD_COLUMNS
static void vec_exp(int n, float * x, const float * max, float * sum) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    for (int i = 0; i < n; i += 16) {
        const __m512 e = ggml_v_expf(_mm512_sub_ps(_mm512_loadu_ps(x + i), _mm512_loadu_ps(max + i)));

        _mm512_storeu_ps(x + i, e);
        _mm512_storeu_ps(sum + i, _mm512_add_ps(_mm512_loadu_ps(sum + i), e));
    }
#else
    ggml_vec_sub_f32(n, x, x, max);
    ggml_vec_soft_max_f32(n, x, x, 0.0f);
    ggml_vec_acc_f32(n, sum, x);
#endif
}

static void vec_softcap(int n, float * x, float softcap) {
    for (int i = 0; i < n; ++i) {
        x[i] = softcap*tanhf(x[i]);
    }
}

// -inf is the maximum of nothing: exp(-inf - 0) is 0
static void finite_or_zero(int n, float * max) {
    for (int i = 0; i < n; ++i) {
        max[i] = max[i] == -INFINITY ? 0.0f : max[i];
    }
}

//
// accumulated attention
//

struct attn_sums {
    const ggml_tensor * q;
    const ggml_tensor * k;

    int n_head_kv;
    int n_gqa;
    int n_tokens; // of a sequence
    int n_segs;
    int n_q;      // queries of a segment: token by token, and within a token head by head
    int n_block;  // of which are worked on together

    int64_t d;
    int64_t n_rows;

    explicit attn_sums(const ggml_tensor * dst) : q(dst->src[0]), k(dst->src[1]) {
        const ggml_tensor * segs = dst->src[2];

        n_head_kv = segs->ne[1];
        n_segs    = segs->ne[1]*segs->ne[2];
        n_gqa     = q->ne[1]/n_head_kv;
        n_tokens  = q->ne[2]/segs->ne[2];
        n_q       = n_gqa*n_tokens;
        d         = k->ne[0];
        n_rows    = k->ne[1];

        n_block = std::min<int64_t>(64, GGML_PAD(n_q, PAD_COLUMNS));
        while (n_block > PAD_COLUMNS && n_block*n_rows > MAX_BLOCK_F32) {
            n_block /= 2;
        }
        n_block = GGML_PAD(n_block, PAD_COLUMNS);
    }

    work_sizes sizes(int nth) const {
        work_sizes res;
        res.shared(int64_t(nth)*n_rows); // sums of each thread
        res.own(n_block*(n_rows + TILE));  // scores
        res.own(n_block*d);              // queries, transposed
        res.own(TILE*d);
        for (int i = 0; i < 3; ++i) {
            res.own(n_block);
        }
        return res;
    }
};

static void compute_attn_sums(const ggml_compute_params * params, ggml_tensor * dst) {
    const attn_sums op(dst);

    const int ith = params->ith;
    const int nth = params->nth;

    const auto    d  = op.d;
    const int     NB = op.n_block;

    float       scale   = ggml_get_op_params_f32(dst, 6);
    const float softcap = ggml_get_op_params_f32(dst, 7);
    if (softcap != 0.0f) {
        scale /= softcap;
    }

    auto [shared, own] = get_work(params, op.sizes(nth));

    float * all  = shared.take(int64_t(nth)*op.n_rows);
    float * S    = own.take(NB*(op.n_rows + TILE)); // [n_cells][NB]
    float * QT   = own.take(NB*d);                // [d][NB]
    float * KT   = own.take(TILE*d);              // [TILE][d]
    float * max  = own.take(NB);
    float * sum  = own.take(NB);
    float * w    = own.take(NB);
    float * mine = all + ith*op.n_rows;

    const int32_t * seg      = (const int32_t *) dst->src[2]->data;
    const int32_t * n_hidden = (const int32_t *) dst->src[3]->data;

    const auto n_seen = [&](int is, int i) {
        return std::max(seg[2*is + 1] - n_hidden[is/op.n_head_kv*op.n_tokens + i/op.n_gqa], 0);
    };

    for (int is = 0; is < op.n_segs; ++is) {
        std::fill_n(mine + seg[2*is], seg[2*is + 1], 0.0f);
    }

    // blocks of queries, which cost as much as they see cells: each thread has those in the middle of which its share is
    const int n_blocks = (op.n_q + NB - 1)/NB;

    const auto cost = [&](int is) { return int64_t(seg[2*is + 1]) + TILE; };

    int64_t cost_all = 0;
    for (int is = 0; is < op.n_segs; ++is) {
        cost_all += cost(is)*n_blocks;
    }

    int64_t cost_cur = 0;
    for (int j = 0; j < op.n_segs*n_blocks; ++j) {
        const int is = j/n_blocks;
        const int i0 = j%n_blocks*NB;
        const int nb = std::min(NB, op.n_q - i0);

        const bool is_mine = (cost_cur + cost(is)/2)*nth/cost_all == ith;
        cost_cur += cost(is);
        if (!is_mine) {
            continue;
        }

        const int np = GGML_PAD(nb, PAD_COLUMNS);

        int n_min = seg[2*is + 1];
        int n_max = 0;
        for (int i = 0; i < nb; ++i) {
            n_min = std::min(n_min, n_seen(is, i0 + i));
            n_max = std::max(n_max, n_seen(is, i0 + i));
        }

        const auto query = [&](int i) {
            const int t = is/op.n_head_kv*op.n_tokens + (i0 + i)/op.n_gqa;
            const int h = is%op.n_head_kv*op.n_gqa    + (i0 + i)%op.n_gqa;

            return (const float *) ((const char *) op.q->data + t*op.q->nb[2] + h*op.q->nb[1]);
        };

        // few queries, as while tokens are generated: a row has the cells of one query
        if (nb <= PAD_COLUMNS/2) {
            for (int c = 0; c < n_max; c += TILE) {
                const int n = std::min(TILE, n_max - c);

                const float * K = rows_f32(op.k, seg[2*is] + c, n, KT);
                for (int i = 0; i < nb; ++i) {
                    dot_rows(n, d, K, query(i), scale, S + int64_t(i)*n_max + c);
                }
            }
            for (int i = 0; i < nb; ++i) {
                float   * s = S + int64_t(i)*n_max;
                const int n = n_seen(is, i0 + i);
                if (n == 0) {
                    continue;
                }
                if (softcap != 0.0f) {
                    vec_softcap(n, s, softcap);
                }
                ggml_vec_max_f32(n, max, s);

                const float sum = ggml_vec_soft_max_f32(n, s, s, *max);
                ggml_vec_mad_f32(n, mine + seg[2*is], s, 1.0f/(sum*op.n_gqa));
            }
            continue;
        }

        std::fill_n(QT, d*np, 0.0f);
        for (int i = 0; i < nb; ++i) {
            transpose(1, d, query(i), scale, QT + i, np);
        }

        std::fill_n(max, np, -INFINITY);
        for (int c = 0; c < n_max; c += TILE) {
            const int n = std::min(TILE, n_max - c);

            const float * K = rows_f32(op.k, seg[2*is] + c, n, KT);

            float * s = S + int64_t(c)*np;
            std::fill_n(s, n*np, 0.0f);
            simd_gemm(s, K, QT, n, d, np);

            if (softcap != 0.0f) {
                vec_softcap(n*np, s, softcap);
            }
            for (int r = 0; r < n; ++r) {
                for (int i = 0; c + r >= n_min && i < nb; ++i) {
                    if (c + r >= n_seen(is, i0 + i)) {
                        s[r*np + i] = -INFINITY;
                    }
                }
                vec_max(np, max, s + r*np);
            }
        }
        finite_or_zero(np, max);

        std::fill_n(sum, np, 0.0f);
        for (int c = 0; c < n_max; ++c) {
            vec_exp(np, S + int64_t(c)*np, max, sum);
        }

        for (int i = 0; i < np; ++i) {
            w[i] = i < nb && sum[i] > 0.0f ? 1.0f/(sum[i]*op.n_gqa) : 0.0f;
        }
        for (int c = 0; c < n_max; ++c) {
            mine[seg[2*is] + c] += dot(np, S + int64_t(c)*np, w);
        }
    }

    ggml_barrier(params->threadpool);

    float * res = (float *) dst->data;

    for_each_share(op.n_segs, ith, nth, [&](int is) { return seg[2*is + 1]; }, [&](int is, int first, int last) {
        for (int c = first; c < last; ++c) {
            const int64_t row = seg[2*is] + c;

            float x = c < seg[2*is + 1] - op.n_tokens ? res[row] : 0.0f;
            for (int t = 0; t < nth; ++t) {
                x += all[t*op.n_rows + row];
            }
            res[row] = x;
        }
    });
}

//
// statistics of queries
//

static work_sizes query_sums_sizes(const ggml_tensor * dst) {
    const int64_t d = dst->src[0]->ne[0];

    work_sizes res;
    res.own(TILE*d);
    res.own(TILE*d);
    res.own(d);
    res.own(d*d);
    return res;
}

static void compute_query_sums(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * q     = dst->src[0];
    const ggml_tensor * outer = dst->src[4];

    const float   * counted = (const float   *) dst->src[1]->data;
    const int32_t * slots   = (const int32_t *) dst->src[2]->data;

    const int64_t d      = q->ne[0];
    const int64_t n_head = q->ne[1];
    const int     n      = dst->src[1]->ne[0]; // of a sequence
    const int     n_seqs = dst->src[2]->ne[0];

    auto own = get_work(params, query_sums_sizes(dst)).second;

    float * Q  = own.take(TILE*d); // [TILE][d]
    float * QT = own.take(TILE*d); // [d][TILE]
    float * S  = own.take(d);
    float * C  = own.take(d*d);    // [d][d]

    // a thread has some rows of the outer products, and the numbers of the sums that go with them
    for_each_share(n_seqs*n_head, params->ith, params->nth, [&](int) { return d; }, [&](int i, int first, int last) {
        const int n_rows = last - first;
        if (n_rows == 0) {
            return;
        }

        const int64_t s = i/n_head;
        const int64_t h = i%n_head;

        // these tokens by themselves: next to a long sum each alone would lose more
        std::fill_n(S, n_rows,   0.0f);
        std::fill_n(C, n_rows*d, 0.0f);

        for (int t0 = 0; t0 < n; t0 += TILE) {
            int m = 0;
            for (int64_t t = s*n + t0; t < s*n + std::min(t0 + TILE, n); ++t) {
                if (counted[t] != 0.0f) {
                    memcpy(Q + m++*d, (const float *) q->data + (t*n_head + h)*d, d*sizeof(float));
                }
            }
            for (int r = 0; r < m; ++r) {
                ggml_vec_acc_f32(n_rows, S, Q + r*d + first);
            }
            if (outer) {
                transpose(m, d, Q, 1.0f, QT, m);
                simd_gemm(C, QT + first*m, Q, n_rows, m, d);
            }
        }

        const int64_t row = (slots[s]*n_head + h)*d + first;

        ggml_vec_acc_f32(n_rows, (float *) dst->data + row, S);
        if (outer) {
            ggml_vec_acc_f32(n_rows*d, (float *) outer->data + row*d, C);
        }
    });
}

//
// norms of values
//

static work_sizes value_norms_sizes(const ggml_tensor * dst) {
    const int64_t d = dst->src[0]->ne[0];

    work_sizes res;
    for (int i = 0; i < 3; ++i) {
        res.own(TILE*d);
    }
    res.own(TILE*TILE);
    res.own(TILE);
    return res;
}

static void compute_value_norms(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * v   = dst->src[0];
    const ggml_tensor * wo  = dst->src[1];
    const ggml_tensor * rot = dst->src[3];

    const int64_t d         = v->ne[0];
    const int64_t n_embd    = wo->ne[1];
    const int     n_head_kv = dst->src[2]->ne[1];
    const int     n_gqa     = wo->ne[0]/d/n_head_kv;

    auto own = get_work(params, value_norms_sizes(dst)).second;

    float * V   = own.take(TILE*d);    // [TILE][d]
    float * VT  = own.take(TILE*d);    // [d][TILE]
    float * W   = own.take(TILE*d);    // [TILE][d]
    float * C   = own.take(TILE*TILE); // [TILE][TILE]
    float * sum = own.take(TILE);

    const int32_t * seg = (const int32_t *) dst->src[2]->data;

    int i_tile = 0;
    for (int h = 0; h < n_head_kv; ++h) {
        for (int c = 0; c < seg[2*h + 1]; c += TILE) {
            if (i_tile++ % params->nth != params->ith) {
                continue;
            }

            const int n = std::min(TILE, seg[2*h + 1] - c);

            const float * x = rows_f32(v, seg[2*h] + c, n, V);

            std::fill_n(VT, TILE*d, 0.0f);
            if (rot) {
                const int64_t m = rot->ne[0];

                // rows of m values each
                std::fill_n(W, n*d, 0.0f);
                simd_gemm(W, x, (const float *) rot->data, n*d/m, m, m);
                transpose(n, d, W, 1.0f, VT, TILE);
            } else {
                transpose(n, d, x, 1.0f, VT, TILE);
            }

            std::fill_n(sum, TILE, 0.0f);
            for (int64_t j = 0; j < n_gqa*n_embd; j += TILE) {
                const int m = std::min<int64_t>(TILE, n_gqa*n_embd - j);

                // the weights of the query heads, one head after the other
                for (int r = 0; r < m; ++r) {
                    const int64_t ig  = h*n_gqa + (j + r)/n_embd;
                    const char  * row = (const char *) wo->data + (j + r)%n_embd*wo->nb[1] + ig*d*wo->nb[0];

                    if (wo->type == GGML_TYPE_F32) {
                        memcpy(W + r*d, row, d*sizeof(float));
                    } else {
                        ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) row, W + r*d, d);
                    }
                }

                std::fill_n(C, m*TILE, 0.0f);
                simd_gemm(C, W, VT, m, d, TILE);

                for (int r = 0; r < m; ++r) {
                    for (int i = 0; i < TILE; ++i) {
                        sum[i] += fabsf(C[r*TILE + i]);
                    }
                }
            }

            for (int i = 0; i < n; ++i) {
                ((float *) dst->data)[seg[2*h] + c + i] = sum[i]/n_gqa;
            }
        }
    }
}

//
// scores of some heads of a sequence
//

struct scores {
    const ggml_tensor * dst;
    const ggml_tensor * q;
    const ggml_tensor * k;
    const ggml_tensor * v;

    const int32_t * seg;
    const int32_t * pos;

    int n_segs;
    int n_head_kv;
    int n_gqa;
    int n_max;

    int64_t d;
    int64_t n_cells;

    explicit scores(const ggml_tensor * dst) : dst(dst), q(dst->src[0]), k(dst->src[1]), v(dst->src[4]) {
        seg = (const int32_t *) dst->src[2]->data;
        pos = (const int32_t *) dst->src[3]->data;

        n_segs    = dst->src[2]->ne[1];
        n_head_kv = ggml_get_op_params_i32(dst, 1);
        n_gqa     = q ? q->ne[1]/n_head_kv : 1;
        n_max     = ggml_get_op_params_i32(dst, 2);
        d         = k->ne[0];
        n_cells   = dst->ne[0];
    }

    int32_t param(int i) const { return ggml_get_op_params_i32(dst, 3 + i); }
    float float_param(int i) const { return ggml_get_op_params_f32(dst, 6 + i); }

    int     head(int s) const { return seg[3*s]; }
    int64_t row (int s) const { return seg[3*s + 1]; }
    int     size(int s) const { return seg[3*s + 2]; }

    // calls f(s, first cell) for each segment, by all threads
    template <typename F>
    void for_each_seg(const F & f) const {
        int64_t offs = 0;
        for (int s = 0; s < n_segs; ++s) {
            f(s, offs);
            offs += size(s);
        }
    }

    // calls f(first cell, n) for the tiles of a thread's share of a segment
    template <typename F>
    static void for_each_tile(const share & cells, const F & f) {
        for (int c = cells.first; c < cells.last; c += TILE) {
            f(c, std::min(TILE, cells.last - c));
        }
    }
};

// the maxima and the sums of the softmax of some rows or columns, from those of each thread [nth][2][n]
// res - what to multiply the exponentials of this thread with
static void combine_softmax(int n, const float * partials, const ggml_compute_params * params, float weight, float * res) {
    for (int i = 0; i < n; ++i) {
        float max = -INFINITY;
        for (int t = 0; t < params->nth; ++t) {
            if (partials[(2*t + 1)*n + i] > 0.0f) {
                max = std::max(max, partials[2*t*n + i]);
            }
        }
        float sum = 0.0f;
        for (int t = 0; t < params->nth; ++t) {
            const float x = partials[(2*t + 1)*n + i];
            sum += x > 0.0f ? x*expf(partials[2*t*n + i] - max) : 0.0f;
        }
        res[i] = sum > 0.0f ? weight*expf(partials[2*params->ith*n + i] - max)/sum : 0.0f;
    }
}

// K-norm, CurDKV

static work_sizes norm_sizes(const scores & op) {
    work_sizes res;
    res.shared(op.n_cells);
    res.shared(op.n_cells);
    res.own(TILE*std::max(op.d, op.v ? op.v->ne[0] : 0));
    return res;
}

static void compute_norm(const ggml_compute_params * params, ggml_tensor * dst) {
    const scores op(dst);

    auto [shared, own] = get_work(params, norm_sizes(op));

    float * res = (float *) dst->data;
    float * kk  = shared.take(op.n_cells);
    float * vv  = shared.take(op.n_cells);
    float * KT  = own.take(TILE*std::max(op.d, op.v ? op.v->ne[0] : 0));

    const auto squared_norms = [&](const ggml_tensor * t, int64_t row, int n, float * dst) {
        const float * x = rows_f32(t, row, n, KT);
        for (int r = 0; r < n; ++r) {
            dst[r] = dot(t->ne[0], x + r*t->ne[0], x + r*t->ne[0]);
        }
    };

    op.for_each_seg([&](int s, int64_t offs) {
        scores::for_each_tile(share(op.size(s), params), [&](int c, int n) {
            squared_norms(op.k, op.row(s) + c, n, kk + offs + c);
            if (op.v) {
                squared_norms(op.v, op.row(s) + c, n, vv + offs + c);
                return;
            }
            for (int r = 0; r < n; ++r) {
                res[offs + c + r] = -sqrtf(kk[offs + c + r]);
            }
        });
    });

    if (!op.v) {
        return;
    }
    ggml_barrier(params->threadpool);

    std::vector<uint64_t> order;

    op.for_each_seg([&](int s, int64_t offs) {
        if (s % params->nth != params->ith) {
            return;
        }

        const int n     = op.size(s);
        const int block = op.param(0) > 0 ? op.param(0) : n;

        order.clear();
        for (int c = 0; c < n; ++c) {
            order.push_back(uint64_t(op.pos[offs + c]) << 32 | c);
        }
        std::sort(order.begin(), order.end());

        for (int first = 0; first < n; first += block) {
            const int last = std::min(first + block, n);

            double sum_k = 0.0;
            double sum_v = 0.0;
            for (int i = first; i < last; ++i) {
                sum_k += kk[offs + uint32_t(order[i])];
                sum_v += vv[offs + uint32_t(order[i])];
            }
            for (int i = first; i < last; ++i) {
                const int64_t c = offs + uint32_t(order[i]);
                res[c] = kk[c]/sum_k*(vv[c]/sum_v);
            }
        }
    });
}

// window

static int window_columns(const scores & op) {
    return GGML_PAD(op.n_gqa*op.q->ne[2], PAD_COLUMNS);
}

static work_sizes window_sizes(const scores & op, int nth) {
    const int NC = window_columns(op);

    work_sizes res;
    res.shared(op.n_cells);
    res.shared(int64_t(op.n_segs)*nth*2*NC);
    res.own(int64_t(share::max_size(op.n_max, nth))*NC);
    res.own(op.d*NC);
    res.own(op.d*TILE);
    res.own(NC);
    res.own(NC);
    return res;
}

static void compute_window(const ggml_compute_params * params, ggml_tensor * dst) {
    const scores op(dst);

    const ggml_tensor * past = dst->src[6];

    const int32_t * pos_q = (const int32_t *) dst->src[5]->data;

    const int32_t pos_last = op.param(0);
    const int32_t window   = op.param(1);
    const int32_t kernel   = op.param(2);

    float       scale   = op.float_param(0);
    const float softcap = op.float_param(1);
    const float gamma   = op.float_param(2);
    if (softcap != 0.0f) {
        scale /= softcap;
    }

    const int64_t d   = op.d;
    const int     n_q = op.q->ne[2];
    const int     n_c = op.n_gqa*n_q;
    const int     NC  = window_columns(op);

    auto [shared, own] = get_work(params, window_sizes(op, params->nth));

    float * seen     = shared.take(op.n_cells);
    float * partials = shared.take(int64_t(op.n_segs)*params->nth*2*NC);
    float * S        = own.take(int64_t(share::max_size(op.n_max, params->nth))*NC); // [n_cells][NC]
    float * QT       = own.take(d*NC);   // [d][NC]: head by head, and within a head query by query
    float * KT       = own.take(d*TILE); // [TILE][d]
    float * w        = own.take(NC);
    float * p        = own.take(NC);

    op.for_each_seg([&](int s, int64_t offs) {
        const int32_t * pos = op.pos + offs;
        const int       n   = op.size(s);

        const share cells(n, params);

        std::fill_n(QT, d*NC, 0.0f);
        for (int g = 0; g < op.n_gqa; ++g) {
            for (int i = 0; i < n_q; ++i) {
                const char * row = (const char *) op.q->data + (op.head(s)*op.n_gqa + g)*op.q->nb[1] + i*op.q->nb[2];
                transpose(1, d, (const float *) row, scale, QT + g*n_q + i, NC);
            }
        }

        // a query that can see no cell sees all of them
        const int32_t pos_min = *std::min_element(pos, pos + n);

        float * max = partials + (int64_t(s)*params->nth + params->ith)*2*NC;
        float * sum = max + NC;
        std::fill_n(max, NC, -INFINITY);
        std::fill_n(sum, NC, 0.0f);

        scores::for_each_tile(cells, [&](int c, int m) {
            float * x = S + int64_t(c - cells.first)*NC;

            std::fill_n(x, m*NC, 0.0f);
            simd_gemm(x, rows_f32(op.k, op.row(s) + c, m, KT), QT, m, d, NC);

            if (softcap != 0.0f) {
                vec_softcap(m*NC, x, softcap);
            }
            for (int r = 0; r < m; ++r) {
                for (int i = 0; i < n_q && pos[c + r] > pos_q[i]; ++i) {
                    for (int g = 0; g < op.n_gqa && pos_q[i] >= pos_min; ++g) {
                        x[r*NC + g*n_q + i] = -INFINITY;
                    }
                }
                vec_max(NC, max, x + r*NC);
            }
        });
        finite_or_zero(NC, max);

        for (int c = 0; c < cells.size(); ++c) {
            vec_exp(NC, S + int64_t(c)*NC, max, sum);
        }

        ggml_barrier(params->threadpool);

        combine_softmax(NC, partials + int64_t(s)*params->nth*2*NC, params, 1.0f/op.n_gqa, w);
        std::fill(w + n_c, w + NC, 0.0f);

        for (int c = 0; c < cells.size(); ++c) {
            float * x = S + int64_t(c)*NC;

            const float mean = dot(NC, x, w)/n_q;

            float var = 0.0f;
            if (gamma != 0.0f && n_q > 1) {
                ggml_vec_mul_f32(NC, p, x, w);
                for (int g = 0; g < op.n_gqa; ++g) {
                    float * pg = p + g*n_q;

                    const float m = dot(n_q, x + g*n_q, w + g*n_q)/n_q;
                    for (int i = 0; i < n_q; ++i) {
                        pg[i] -= m;
                    }
                    var += dot(n_q, pg, pg);
                }
                var *= float(op.n_gqa)/(n_q - 1); // w has one factor of 1/n_gqa too many
            }
            seen[offs + cells.first + c] = mean + gamma*var;
        }
    });

    ggml_barrier(params->threadpool);

    // what no element of seen exceeds
    const float ceiling = 1.0f + 0.5f*gamma;

    std::vector<uint64_t> order;

    op.for_each_seg([&](int s, int64_t offs) {
        if (s % params->nth != params->ith) {
            return;
        }

        const int32_t * pos = op.pos + offs;
        const int       n   = op.size(s);

        float * res  = (float *) dst->data + offs;
        float * last = past ? (float *) past->data + op.row(s) : nullptr;

        order.clear();
        for (int c = 0; c < n; ++c) {
            const int32_t age = pos_last - pos[c];
            if (age < window) {
                res[c] = ceiling + (1.0f - float(age)/window) + (last ? last[c] : 0.0f);
            } else {
                order.push_back(uint64_t(pos[c]) << 32 | c);
            }
        }
        std::sort(order.begin(), order.end());

        const int n_out = order.size();
        for (int i = 0; i < n_out; ++i) {
            float sum = 0.0f;
            for (int j = std::max(i - kernel/2, 0); j <= std::min(i + kernel/2, n_out - 1); ++j) {
                sum += seen[offs + uint32_t(order[j])];
            }

            const uint32_t c = order[i];
            res[c] = sum/kernel;
            if (last) {
                res[c] = last[c] = std::max(last[c], res[c]);
            }
        }
    });
}

// logits of the query heads [n_gqa][stride] of a thread's share as exponentials, with their maxima and sums in partial [2][n_gqa]
static void exp_rows(int n_gqa, int n, float * x, int64_t stride, float * partial) {
    for (int g = 0; g < n_gqa; ++g) {
        float max = -INFINITY;
        for (int c = 0; c < n; ++c) {
            max = std::max(max, x[g*stride + c]);
        }
        partial[g] = max;

        if (max == -INFINITY) {
            std::fill_n(x + g*stride, n, 0.0f);
            partial[n_gqa + g] = 0.0f;
        } else {
            partial[n_gqa + g] = ggml_vec_soft_max_f32(n, x + g*stride, x + g*stride, max);
        }
    }
}

// ExpectedAttention

static work_sizes expected_sizes(const scores & op, int nth) {
    work_sizes res;
    res.shared(int64_t(op.n_segs)*nth*2*op.n_gqa);
    res.own(int64_t(op.n_gqa)*share::max_size(op.n_max, nth));
    res.own(TILE*std::max(op.d, op.v ? op.v->ne[0] : 0));
    res.own(TILE*op.d);
    res.own(op.d);
    res.own(op.n_gqa);
    return res;
}

static void compute_expected(const ggml_compute_params * params, ggml_tensor * dst) {
    const scores op(dst);

    const ggml_tensor * cov = dst->src[5];

    const int32_t pos_first = op.param(0);
    const float   scale     = op.float_param(0);
    const float   epsilon   = op.float_param(1);

    const int64_t d      = op.d;
    const int64_t stride = share::max_size(op.n_max, params->nth);

    auto [shared, own] = get_work(params, expected_sizes(op, params->nth));

    float * partials = shared.take(int64_t(op.n_segs)*params->nth*2*op.n_gqa);
    float * X        = own.take(op.n_gqa*stride); // [n_gqa][n_cells]
    float * KT       = own.take(TILE*std::max(d, op.v ? op.v->ne[0] : 0));
    float * C        = own.take(TILE*d);          // [TILE][d]
    float * mean     = own.take(d);
    float * w        = own.take(op.n_gqa);

    op.for_each_seg([&](int s, int64_t offs) {
        const int32_t * pos = op.pos + offs;

        const share cells(op.size(s), params);

        scores::for_each_tile(cells, [&](int c, int n) {
            const float * K = rows_f32(op.k, op.row(s) + c, n, KT);

            for (int g = 0; g < op.n_gqa; ++g) {
                const int64_t h = op.head(s)*op.n_gqa + g;

                // scale mean k + scale^2/2 k C k
                const float * q = (const float *) op.q->data + h*d;
                for (int64_t j = 0; j < d; ++j) {
                    mean[j] = scale*q[j];
                }
                if (cov) {
                    ggml_vec_scale_f32(d, mean, 2.0f/(scale*scale));
                    for (int r = 0; r < n; ++r) {
                        memcpy(C + r*d, mean, d*sizeof(float));
                    }
                    simd_gemm(C, K, (const float *) cov->data + h*d*d, n, d, d);
                }
                for (int r = 0; r < n; ++r) {
                    const float x = cov ? 0.5f*scale*scale*dot(d, C + r*d, K + r*d) : dot(d, mean, K + r*d);

                    X[g*stride + c - cells.first + r] = pos[c + r] < pos_first ? -INFINITY : x;
                }
            }
        });

        exp_rows(op.n_gqa, cells.size(), X, stride, partials + (int64_t(s)*params->nth + params->ith)*2*op.n_gqa);

        ggml_barrier(params->threadpool);

        combine_softmax(op.n_gqa, partials + int64_t(s)*params->nth*2*op.n_gqa, params, 1.0f/op.n_gqa, w);

        scores::for_each_tile(cells, [&](int c, int n) {
            const float * V = op.v ? rows_f32(op.v, op.row(s) + c, n, KT) : nullptr;

            for (int r = 0; r < n; ++r) {
                float x = 0.0f;
                for (int g = 0; g < op.n_gqa; ++g) {
                    x += w[g]*X[g*stride + c - cells.first + r];
                }
                if (V) {
                    const float * vr = V + r*op.v->ne[0];
                    x = (x + epsilon)*sqrtf(dot(op.v->ne[0], vr, vr));
                }
                ((float *) dst->data)[offs + c + r] = x;
            }
        });
    });
}

// CapKV

static work_sizes leverage_sizes(const scores & op, int nth) {
    const int64_t dv = op.v->ne[0];

    work_sizes res;
    res.shared(int64_t(op.n_segs)*nth*2*op.n_gqa);
    res.shared(int64_t(nth)*op.n_gqa*dv*dv);
    res.shared(op.n_gqa*dv*dv);
    res.own(int64_t(op.n_gqa)*share::max_size(op.n_max, nth));
    res.own(TILE*std::max(op.d, dv));
    res.own(TILE*dv);
    res.own(TILE*dv);
    res.own(op.n_gqa*op.d);
    return res;
}

// the inverse of L in a = L L^T as a matrix that a row vector is multiplied with
static void invert_cholesky(int64_t n, const float * a, float * res) {
    std::vector<double> l(a, a + n*n);
    std::vector<double> x(n*n);

    const auto dot_f64 = [](int64_t n, const double * a, const double * b) {
        double sum[4] = {};
        int64_t i = 0;
        for (; i + 4 <= n; i += 4) {
            for (int j = 0; j < 4; ++j) {
                sum[j] += a[i + j]*b[i + j];
            }
        }
        for (; i < n; ++i) {
            sum[0] += a[i]*b[i];
        }
        return sum[0] + sum[1] + sum[2] + sum[3];
    };

    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < i; ++j) {
            l[i*n + j] = (l[i*n + j] - dot_f64(j, &l[i*n], &l[j*n]))/l[j*n + j];
        }
        l[i*n + i] = std::sqrt(std::max(l[i*n + i] - dot_f64(i, &l[i*n], &l[i*n]), 1e-12));
    }

    // row c of x has column c of the inverse
    for (int64_t c = 0; c < n; ++c) {
        x[c*n + c] = 1.0/l[c*n + c];
        for (int64_t i = c + 1; i < n; ++i) {
            x[c*n + i] = -dot_f64(i - c, &l[i*n + c], &x[c*n + c])/l[i*n + i];
        }
    }
    std::copy(x.begin(), x.end(), res);
}

static void compute_leverage(const ggml_compute_params * params, ggml_tensor * dst) {
    const scores op(dst);

    const int32_t pos_first = op.param(0);
    const float   tau       = op.float_param(0);
    const float   epsilon   = op.float_param(1);

    const int64_t d      = op.d;
    const int64_t dv     = op.v->ne[0];
    const int64_t stride = share::max_size(op.n_max, params->nth);

    auto [shared, own] = get_work(params, leverage_sizes(op, params->nth));

    float * partials = shared.take(int64_t(op.n_segs)*params->nth*2*op.n_gqa);
    float * all      = shared.take(int64_t(params->nth)*op.n_gqa*dv*dv); // capacities: the sum of each thread
    float * inverses = shared.take(op.n_gqa*dv*dv);
    float * X        = own.take(op.n_gqa*stride); // [n_gqa][n_cells]
    float * KT       = own.take(TILE*std::max(d, dv));
    float * VT       = own.take(TILE*dv);
    float * VW       = own.take(TILE*dv);
    float * anchor   = own.take(op.n_gqa*d);

    const auto unit = [&](int64_t n, const float * x) {
        const float sum = dot(n, x, x);
        return sum > 0.0f ? 1.0f/sqrtf(sum) : 0.0f;
    };

    op.for_each_seg([&](int s, int64_t offs) {
        const int32_t * pos = op.pos + offs;

        const share cells(op.size(s), params);

        for (int g = 0; g < op.n_gqa; ++g) {
            const float * q = (const float *) op.q->data + (op.head(s)*op.n_gqa + g)*d;

            memcpy(anchor + g*d, q, d*sizeof(float));
            ggml_vec_scale_f32(d, anchor + g*d, tau*unit(d, q));
        }

        scores::for_each_tile(cells, [&](int c, int n) {
            const float * K = rows_f32(op.k, op.row(s) + c, n, KT);

            for (int r = 0; r < n; ++r) {
                const float length = unit(d, K + r*d);
                for (int g = 0; g < op.n_gqa; ++g) {
                    X[g*stride + c - cells.first + r] = pos[c + r] < pos_first ? -INFINITY : length*dot(d, K + r*d, anchor + g*d);
                }
            }
        });

        float * partial = partials + (int64_t(s)*params->nth + params->ith)*2*op.n_gqa;
        exp_rows(op.n_gqa, cells.size(), X, stride, partial);

        ggml_barrier(params->threadpool);

        // relative to the largest of all threads
        for (int g = 0; g < op.n_gqa; ++g) {
            float max = -INFINITY;
            for (int t = 0; t < params->nth; ++t) {
                max = std::max(max, partials[(int64_t(s)*params->nth + t)*2*op.n_gqa + g]);
            }
            ggml_vec_scale_f32(cells.size(), X + g*stride, partial[g] == -INFINITY ? 0.0f : expf(partial[g] - max));
        }

        float * mine = all + params->ith*op.n_gqa*dv*dv;
        std::fill_n(mine, op.n_gqa*dv*dv, 0.0f);

        scores::for_each_tile(cells, [&](int c, int n) {
            const float * V = rows_f32(op.v, op.row(s) + c, n, KT);

            transpose(n, dv, V, 1.0f, VT, n);
            for (int g = 0; g < op.n_gqa; ++g) {
                for (int r = 0; r < n; ++r) {
                    const float x = pos[c + r] < pos_first ? 0.0f : X[g*stride + c - cells.first + r] + epsilon;
                    for (int64_t j = 0; j < dv; ++j) {
                        VW[r*dv + j] = x*V[r*dv + j];
                    }
                }
                simd_gemm(mine + g*dv*dv, VT, VW, dv, n, dv);
            }
        });

        ggml_barrier(params->threadpool);

        for (int g = params->ith; g < op.n_gqa; g += params->nth) {
            float * a = all + g*dv*dv;
            for (int t = 1; t < params->nth; ++t) {
                ggml_vec_acc_f32(dv*dv, a, all + (t*op.n_gqa + g)*dv*dv);
            }
            for (int64_t i = 0; i < dv; ++i) {
                a[i*dv + i] += 1.0f;
            }
            invert_cholesky(dv, a, inverses + g*dv*dv);
        }

        ggml_barrier(params->threadpool);

        // v A^-1 v = |L^-1 v|^2
        scores::for_each_tile(cells, [&](int c, int n) {
            const float * V = rows_f32(op.v, op.row(s) + c, n, KT);

            float * res = (float *) dst->data + offs + c;
            std::fill_n(res, n, 0.0f);

            for (int g = 0; g < op.n_gqa; ++g) {
                std::fill_n(VW, n*dv, 0.0f);
                simd_gemm(VW, V, inverses + g*dv*dv, n, dv, dv);
                for (int r = 0; r < n; ++r) {
                    res[r] += X[g*stride + c - cells.first + r]*dot(dv, VW + r*dv, VW + r*dv)/op.n_gqa;
                }
            }
        });
    });
}

// CriticalKV

static void compute_critical(const ggml_compute_params * params, ggml_tensor * dst) {
    const float * scores = (const float *) dst->src[0]->data;
    const float * norms  = dst->src[1] ? (const float *) dst->src[1]->data : nullptr;

    const int32_t * seg     = (const int32_t *) dst->src[2]->data;
    const int32_t * n_first = (const int32_t *) dst->src[3]->data;

    const float epsilon = ggml_get_op_params_f32(dst, 6);
    const float chosen  = ggml_get_op_params_f32(dst, 7);

    std::vector<uint64_t> order;

    int64_t offs = 0;
    for (int s = 0; s < dst->src[2]->ne[1]; ++s) {
        const int n = seg[3*s + 2];

        if (s % params->nth == params->ith) {
            float * res = (float *) dst->data + offs;

            order.clear();
            for (int c = 0; c < n; ++c) {
                order.push_back(uint64_t(float_to_ordered(scores[offs + c])) << 32 | c);
                res[c] = norms ? (scores[offs + c] + epsilon)*norms[seg[3*s + 1] + c] : 0.0f;
            }
            const auto first = order.end() - std::min(n_first[s], n);
            if (first != order.end()) {
                std::nth_element(order.begin(), first, order.end());
            }
            for (auto it = first; it != order.end(); ++it) {
                res[uint32_t(*it)] = chosen;
            }
        }
        offs += n;
    }
}

//
// op
//

void ggml_compute_forward_scores_ragged(const ggml_compute_params * params, ggml_tensor * dst) {
    switch (ggml_get_scores_ragged(dst)) {
        case GGML_SCORES_RAGGED_ATTN_SUMS:   compute_attn_sums  (params, dst); break;
        case GGML_SCORES_RAGGED_QUERY_SUMS:  compute_query_sums (params, dst); break;
        case GGML_SCORES_RAGGED_VALUE_NORMS: compute_value_norms(params, dst); break;
        case GGML_SCORES_RAGGED_NORM:        compute_norm       (params, dst); break;
        case GGML_SCORES_RAGGED_WINDOW:      compute_window     (params, dst); break;
        case GGML_SCORES_RAGGED_EXPECTED:    compute_expected   (params, dst); break;
        case GGML_SCORES_RAGGED_LEVERAGE:    compute_leverage   (params, dst); break;
        case GGML_SCORES_RAGGED_CRITICAL:    compute_critical   (params, dst); break;
    }
}

size_t ggml_scores_ragged_work_size(const ggml_tensor * dst, int n_tasks) {
    work_sizes sizes;
    switch (ggml_get_scores_ragged(dst)) {
        case GGML_SCORES_RAGGED_ATTN_SUMS:   sizes = attn_sums(dst).sizes(n_tasks);        break;
        case GGML_SCORES_RAGGED_QUERY_SUMS:  sizes = query_sums_sizes(dst);                break;
        case GGML_SCORES_RAGGED_VALUE_NORMS: sizes = value_norms_sizes(dst);               break;
        case GGML_SCORES_RAGGED_NORM:        sizes = norm_sizes    (scores(dst));          break;
        case GGML_SCORES_RAGGED_WINDOW:      sizes = window_sizes  (scores(dst), n_tasks); break;
        case GGML_SCORES_RAGGED_EXPECTED:    sizes = expected_sizes(scores(dst), n_tasks); break;
        case GGML_SCORES_RAGGED_LEVERAGE:    sizes = leverage_sizes(scores(dst), n_tasks); break;
        case GGML_SCORES_RAGGED_CRITICAL:                                                  break;
    }

    return sizeof(float)*(sizes.n_shared + n_tasks*sizes.n_own + PAD_F32);
}
