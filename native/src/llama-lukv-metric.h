#pragma once

#include "llama.h"

#include <functional>
#include <map>
#include <string>
#include <vector>

struct ggml_context;
struct ggml_tensor;

//
// intra-head metrics: scores that rank the cells of a head, the higher the longer they stay
//
// each is one function that builds a graph of stock ops for one head, so that it runs on every backend. most have another one
// for devices with ops for the heads of a layer together
// lukv_gguf/metrics/ has the same ones in Python, with their sources
//

// what a metric asks for beside K, V and positions. it is kept only for a metric that does
struct llama_lukv_needs {
    uint32_t n_window = 0; // the last queries of a sequence
    uint32_t n_future = 0; // mean of all queries before RoPE, at this many next positions

    bool q_cov     = false; // and their covariance
    bool out_norms = false; // ||v W_O||_1 of each cell
    bool past      = false; // what earlier commits said about each cell
    bool plain     = false; // K and V as the model computed them
    bool weights   = false; // it was trained
    bool repeated  = false; // past is what a repetition of the context showed: nothing is evicted without
    bool attn_sums = false; // attention that each cell has received from all queries so far
    bool k_sum     = false; // sum of all keys so far, those of evicted cells too
};

// by name, as in lukv.metric.<name>
using llama_lukv_metric_params = std::map<std::string, double>;

// of a trained metric, for each head of the model, layer-major
struct llama_lukv_weights {
    uint32_t n_hidden = 0;

    std::vector<float> input;  // [n_features + n_embd_head_k + n_embd_head_v, n_hidden] for each
    std::vector<float> bias;   // [n_hidden]
    std::vector<float> output; // [n_hidden]
    std::vector<float> skip;   // [n_features]

    static constexpr uint32_t N_FEATURES = 7;
};

// the cells of one head, and what was asked for
struct llama_lukv_scorer {
    ggml_context * ctx;

    // a tensor [ne0, ne1] with these data
    std::function<ggml_tensor * (const std::vector<float>   & data, int64_t ne0)> input_f32;
    std::function<ggml_tensor * (const std::vector<int32_t> & data, int64_t ne0)> input_i32;

    llama_lukv_metric_params params;

    uint32_t il = 0; // layer of the model
    uint32_t ih = 0; // KV head

    uint32_t n_head_kv = 1; // of a layer

    ggml_tensor * k = nullptr; // [n_embd_head_k, n_cells], any type
    ggml_tensor * v = nullptr; // [n_embd_head_v, n_cells]

    std::vector<llama_pos> pos;  // of the cells, in any order
    std::vector<int32_t>   prot; // cells that are never evicted

    llama_pos pos_min = 0;
    llama_pos pos_max = 0;

    uint32_t sink   = 0; // protected positions from pos_min on
    uint32_t n_keep = 0; // cells that stay

    float kq_scale = 1.0f;
    float soft_cap = 0.0f; // 0 for none

    std::vector<llama_pos> pos_q;    // of the last queries, ascending
    ggml_tensor * q      = nullptr;  // [n_embd_head_k, n_gqa, n_queries], nullptr if there are none
    ggml_tensor * q_mean = nullptr;  // [n_embd_head_k, n_gqa]
    ggml_tensor * q_cov  = nullptr;  // [n_embd_head_k, n_embd_head_k, n_gqa]

    ggml_tensor * k_sum = nullptr; // of keys of equal length [n_embd_head_k]

    ggml_tensor * out_norms = nullptr; // [1, n_cells]
    ggml_tensor * attn_sums = nullptr; // [n_cells]

    ggml_tensor * k_plain = nullptr; // before RoPE, F32 [n_embd_head_k, n_cells]
    ggml_tensor * v_plain = nullptr; // F32 [n_embd_head_v, n_cells]

    const llama_lukv_weights * weights = nullptr;

    ggml_tensor * past = nullptr; // 0 for new cells [n_cells]
    std::function<void (ggml_tensor * cur)> set_past;
    std::function<void (ggml_tensor * cur)> on_cpu; // not on the device of the cells

    uint32_t n_gqa = 1;

    bool use_out_prod = false; // the device has it

    int64_t n_cells() const { return pos.size(); }
    bool    is_sink(int64_t i) const { return pos[i] - pos_min < (llama_pos) sink; }
};

// the same of some heads of a layer, one after the other
struct llama_lukv_layer_scorer {
    ggml_context * ctx;

    std::function<ggml_tensor * (const std::vector<float>   & data, int64_t ne0)> input_f32;
    std::function<ggml_tensor * (const std::vector<int32_t> & data, int64_t ne0)> input_i32;

    llama_lukv_metric_params params;

    uint32_t il = 0;

    // all cells of the layer
    ggml_tensor * k = nullptr; // [n_embd_head_k, n_rows]
    ggml_tensor * v = nullptr; // [n_embd_head_v, n_rows]

    ggml_tensor * out_norms = nullptr; // [1, n_rows]
    ggml_tensor * attn_sums = nullptr; // [1, n_rows]
    ggml_tensor * past      = nullptr; // [1, n_rows]

    ggml_tensor * k_sum = nullptr; // of keys of equal length [n_embd_head_k, n_head_kv]

    struct segment {
        int32_t ih;     // KV head
        int32_t row;    // first one
        int32_t n;      // cells
        int32_t n_keep; // of which stay
    };
    std::vector<segment> segs;

    std::vector<llama_pos> pos;  // of the cells of all segments
    std::vector<int32_t>   prot; // cells that are never evicted

    llama_pos pos_min = 0;
    llama_pos pos_max = 0;

    uint32_t sink = 0;

    float kq_scale = 1.0f;
    float soft_cap = 0.0f;

    std::vector<llama_pos> pos_q;
    ggml_tensor * q      = nullptr; // [n_embd_head_k, n_head, n_queries]
    ggml_tensor * q_mean = nullptr; // [n_embd_head_k, n_head]
    ggml_tensor * q_cov  = nullptr; // [n_embd_head_k, n_embd_head_k, n_head]

    uint32_t n_head_kv = 1;

    int32_t n_max() const; // cells of a segment

    ggml_tensor * input_segs() const; // I32 [3, n_segs]: KV head, first row, cells
    ggml_tensor * input_pos () const; // I32 [n_cells]
};

class llama_lukv_metric {
public:
    struct param {
        const char * name;
        bool         integer;
        double       value; // default
        double       least;
    };

    std::string        name;
    std::vector<param> params;

    // throws if a value makes no sense: the message names the key
    void check(const llama_lukv_metric_params & values) const;

    llama_lukv_needs needs(const llama_lukv_metric_params & values) const { return needs_of(values); }

    // [n_cells]
    ggml_tensor * build(const llama_lukv_scorer & s) const { return build_scores(s); }

    // for devices that have the op. nullptr if it is to be done head by head, nevertheless: [n_cells]
    ggml_tensor * build(const llama_lukv_layer_scorer & s) const { return build_layer_scores ? build_layer_scores(s) : nullptr; }

    // tensors that build() makes, at most
    static constexpr uint32_t N_NODES = 128;

    // nullptr if there is none of that name
    static const llama_lukv_metric * find(const std::string & name);

    // names of all, separated by commas
    static std::string names();

    std::function<llama_lukv_needs (const llama_lukv_metric_params &)> needs_of;
    std::function<ggml_tensor    * (const llama_lukv_scorer        &)> build_scores;
    std::function<ggml_tensor    * (const llama_lukv_layer_scorer  &)> build_layer_scores; // may be empty

    bool expected_only = false; // the latter needs no more than the scores of expectedattention, those of keydiff, and choices
};
