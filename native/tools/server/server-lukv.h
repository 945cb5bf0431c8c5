#pragma once

#include "llama-lukv.h"

#include <algorithm>
#include <cstdint>

// cells of a KV cache that is budgeted per head
struct server_lukv_usage {
    bool     enabled     = false;
    double   ratio       = 0.0; // kept fraction that the budgets are for
    uint64_t n_used      = 0;   // cells that hold a token, over all layers and heads
    uint64_t n_owned     = 0;   // cells in the budgets, likewise
    uint64_t n_evictions = 0;   // times that cells were evicted
    uint64_t n_bytes     = 0;   // allocated for K and V

    // note: not while the context is decoding
    static server_lukv_usage get(const llama_context * ctx) {
        server_lukv_usage res;

        res.enabled = llama_lukv_enabled(ctx);
        if (!res.enabled) {
            return res;
        }

        res.ratio       = llama_lukv_ratio(ctx);
        res.n_evictions = llama_lukv_n_evictions(ctx);
        res.n_bytes     = llama_lukv_memory_size(ctx);

        for (int32_t il = 0; il < llama_lukv_n_layer(ctx); ++il) {
            for (int32_t ih = 0; ih < llama_lukv_n_head_kv(ctx); ++ih) {
                res.n_used  += std::max(0, llama_lukv_n_cells_used (ctx, il, ih)); // -1: the layer has no budgets
                res.n_owned += std::max(0, llama_lukv_n_cells_owned(ctx, il, ih));
            }
        }

        return res;
    }
};
