#pragma once

#include "llama-lukv.h"

#include <algorithm>
#include <cstdint>

// cells of a KV cache that is budgeted per head
// note: not to be asked for while the context is decoding
struct server_lukv_usage {
    bool     enabled     = false;
    double   ratio       = 0.0; // kept fraction that the budgets are for
    uint64_t n_used      = 0;   // cells that hold a token, over all layers and heads
    uint64_t n_owned     = 0;   // cells in the budgets, likewise
    uint64_t n_evictions = 0;   // times that cells were evicted
    uint64_t n_evicted   = 0;   // cells that were
    uint64_t n_bytes     = 0;   // allocated for K and V
    uint64_t n_bytes_full = 0;  // what it would be without budgets

    static server_lukv_usage get(const llama_context * ctx) {
        server_lukv_usage res = sum(ctx, llama_lukv_n_cells_used, llama_lukv_n_cells_owned);
        if (res.enabled) {
            res.ratio        = llama_lukv_ratio(ctx);
            res.n_evictions  = llama_lukv_n_evictions(ctx);
            res.n_evicted    = llama_lukv_n_evicted(ctx);
            res.n_bytes      = llama_lukv_memory_size(ctx);
            res.n_bytes_full = llama_lukv_memory_size_full(ctx);
        }
        return res;
    }

    // the cells of one sequence
    static server_lukv_usage get(const llama_context * ctx, llama_seq_id seq_id) {
        return sum(ctx,
            [&](const llama_context * ctx, int32_t il, int32_t ih) { return llama_lukv_seq_n_cells_used (ctx, seq_id, il, ih); },
            [&](const llama_context * ctx, int32_t il, int32_t ih) { return llama_lukv_seq_n_cells_owned(ctx, seq_id, il, ih); });
    }

private:
    template <typename F, typename G>
    static server_lukv_usage sum(const llama_context * ctx, const F & n_used, const G & n_owned) {
        server_lukv_usage res;
        res.enabled = llama_lukv_enabled(ctx);
        for (int32_t il = 0; il < llama_lukv_n_layer(ctx); ++il) {
            for (int32_t ih = 0; ih < llama_lukv_n_head_kv(ctx); ++ih) {
                res.n_used  += std::max(0, n_used (ctx, il, ih)); // -1: the layer has no budgets
                res.n_owned += std::max(0, n_owned(ctx, il, ih));
            }
        }
        return res;
    }
};
