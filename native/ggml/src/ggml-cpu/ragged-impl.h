#pragma once

#include "ggml-cpu.h"
#include "simd-mappings.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

// shared by the ops on ragged heads

// cells that are converted to F32 and worked on together
static constexpr int TILE = 64;

static constexpr int PAD_F32 = 16; // keeps the threads' buffers on cache lines of their own

// rows [row, row + n) as F32: as they are, or converted to buf
static inline const float * rows_f32(const ggml_tensor * t, int64_t row, int n, float * buf) {
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

// calls f(i, first, last) for the cells [first, last) of the segments that thread ith has: equal shares of all cells,
// whatever segment they belong to. size(i) - cells of a segment
template <typename S, typename F>
static void for_each_share(int n_segs, int ith, int nth, const S & size, const F & f) {
    int64_t n_cells = 0;
    for (int i = 0; i < n_segs; ++i) {
        n_cells += size(i);
    }
    const int64_t c0 = n_cells* ith     /nth;
    const int64_t c1 = n_cells*(ith + 1)/nth;

    int64_t offs = 0;
    for (int i = 0; i < n_segs; ++i) {
        const int64_t n = size(i);

        f(i, (int) std::clamp<int64_t>(c0 - offs, 0, n), (int) std::clamp<int64_t>(c1 - offs, 0, n));

        offs += n;
    }
}

// the order of the numbers as that of unsigned integers, NaN first
static inline uint32_t float_to_ordered(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof(u));

    return x != x ? 0 : u & 0x80000000 ? ~u : u | 0x80000000;
}

// multiplies each n_rot of d numbers with the orthonormal Walsh-Hadamard matrix. n_rot = 0: leaves them as they are
static inline void hadamard(int d, int n_rot, float * x) {
    for (int m = 1; m < n_rot; m *= 2) {
        for (int i = 0; i < d; i += 2*m) {
            for (int j = i; j < i + m; ++j) {
                const float a = x[j];
                const float b = x[j + m];

                x[j]     = a + b;
                x[j + m] = a - b;
            }
        }
    }
    if (n_rot > 0) {
        ggml_vec_scale_f32(d, x, 1.0f/sqrtf(n_rot));
    }
}

// res[i] = scale*<k[i], q> for n rows of k
static inline void dot_rows(int n, int d, const float * k, const float * q, float scale, float * res) {
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
