#pragma once

#include "llama-lukv-metric.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

struct llama_model_loader;
struct llama_hparams;

enum llama_lukv_policy {
    LLAMA_LUKV_POLICY_CAPACITY, // a head owns budget*n_ctx cells, nothing is evicted from it until they are full
    LLAMA_LUKV_POLICY_PREFILL,  // the prompt is cached in full, then every head keeps budget*n_tokens cells, once
};

// the lukv.* metadata of a model, with the overrides applied
struct llama_lukv_params {
    float    ratio  = 0.0f;      // kept fraction of the cache
    uint32_t sink   = 4;         // protected tokens at the start
    uint32_t recent = 16;        // protected tokens at the end

    llama_lukv_policy policy = LLAMA_LUKV_POLICY_CAPACITY;

    std::string              metric = "keydiff";
    llama_lukv_metric_params metric_params;

    std::shared_ptr<const llama_lukv_weights> weights; // of a trained metric

    uint32_t n_layer   = 0;
    uint32_t n_head_kv = 0;

    std::vector<float> budget;   // kept fraction per head at ratio, layer-major [n_layer*n_head_kv]

    // read and check the metadata
    // returns nullptr if the model has none or if it is overridden off
    // throws if a key is damaged: the message names the key
    static std::unique_ptr<llama_lukv_params> load(const llama_model_loader & ml, const llama_hparams & hparams);

    // cells per head for n_tokens tokens, layer-major. each head gets n_cells_min at the least (but no more than
    // n_tokens), the sum is round(ratio*n_tokens*n_heads) unless these minima exceed it
    std::vector<uint32_t> get_n_cells(uint32_t n_tokens) const;

    uint32_t n_cells_min() const { return sink + recent; }
};
