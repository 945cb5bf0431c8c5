#pragma once

#include "llama-kv-cache-lukv.h"

#include "ggml-backend.h"

#include <cmath>

// shared by the files of llama_kv_cache_lukv

// the recent cells are read in multiples of this, so that the graph stays the same while tokens are generated
static constexpr uint32_t N_RECENT_PAD = 64;

// while tokens are generated, commit when there are this many recent ones:
// often enough for the cells read to stay close to the budget, rarely enough for the cost of a commit not to matter
static constexpr uint32_t N_RECENT_DECODE = 64;

// ubatches up to this size count as generation (one token, or a draft to verify)
static constexpr uint32_t N_UBATCH_DECODE = 32;

// graph nodes for each layer that keep what the metric needs of the queries, and for each sequence of a ubatch
static constexpr uint32_t N_NODES_QUERIES     = 24;
static constexpr uint32_t N_NODES_QUERIES_SEQ = 12;

// orthonormal Walsh-Hadamard matrix [n, n]
inline void fill_rot(float * data, int64_t n) {
    if (n == 0) {
        return;
    }

    // the matrix of twice the size consists of four of these, the last one negative
    data[0] = 1.0f/sqrtf(n);
    for (int64_t m = 1; m < n; m *= 2) {
        for (int64_t i = 0; i < m; ++i) {
            for (int64_t j = 0; j < m; ++j) {
                const float x = data[i*n + j];

                data[ i     *n + m + j] =  x;
                data[(m + i)*n     + j] =  x;
                data[(m + i)*n + m + j] = -x;
            }
        }
    }
}

// the CPU's if there is none of the device
inline ggml_backend_t find_backend(ggml_backend_sched_t sched, ggml_backend_dev_t dev) {
    const int n_backends = ggml_backend_sched_get_n_backends(sched);
    for (int i = 0; i < n_backends; ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_get_device(backend) == dev) {
            return backend;
        }
    }
    return ggml_backend_sched_get_backend(sched, n_backends - 1);
}

template <typename F>
void llama_kv_cache_lukv::for_each_head(const F & f) const {
    size_t i = 0;
    for (const auto & layer : kv.layers) {
        for (uint32_t ih = 0; ih < params.n_head_kv; ++ih) {
            f(layer, ih, i++);
        }
    }
}
