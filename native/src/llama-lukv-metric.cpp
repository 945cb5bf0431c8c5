#include "llama-lukv-metric.h"

#include "llama-impl.h"

#include "ggml-ragged.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

// above all scores of cells that compete
static constexpr float SCORE_CHOSEN = 1e30f;

//
// parts of graphs
//

static ggml_tensor * to_f32(ggml_context * ctx, ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 ? t : ggml_cast(ctx, t, GGML_TYPE_F32);
}

// rows as columns: [n0, n1] -> [n1, n0], f32
static ggml_tensor * transpose(ggml_context * ctx, ggml_tensor * t) {
    return ggml_cont(ctx, ggml_transpose(ctx, to_f32(ctx, t)));
}

// sum over the second dimension: [n0, n1, n2] -> [n0, 1, n2]
static ggml_tensor * sum_columns(const llama_lukv_scorer & s, ggml_tensor * t) {
    // saves the transposed copy
    if (s.use_out_prod) {
        ggml_tensor * ones = s.input_f32(std::vector<float>(t->ne[1]*t->ne[2], 1.0f), 1);

        return ggml_out_prod(s.ctx, t, ggml_reshape_3d(s.ctx, ones, 1, t->ne[1], t->ne[2]));
    }

    ggml_tensor * sum = ggml_sum_rows(s.ctx, ggml_cont(s.ctx, ggml_transpose(s.ctx, t)));

    return ggml_reshape_3d(s.ctx, sum, t->ne[0], 1, t->ne[2]);
}

// mean over the query heads and whatever else is behind the cells: [n_cells, ...] -> [n_cells]
static ggml_tensor * mean_columns(const llama_lukv_scorer & s, ggml_tensor * t) {
    const int64_t n = ggml_nelements(t)/t->ne[0];

    ggml_tensor * sum = sum_columns(s, ggml_reshape_2d(s.ctx, t, t->ne[0], n));

    return ggml_reshape_1d(s.ctx, ggml_scale(s.ctx, sum, 1.0f/n), t->ne[0]);
}

// ||x||^2 of each row: [n, n_rows] -> [1, n_rows]
static ggml_tensor * squared_norms(const llama_lukv_scorer & s, ggml_tensor * t) {
    return ggml_sum_rows(s.ctx, ggml_sqr(s.ctx, to_f32(s.ctx, t)));
}

// the cells in the order of their positions
static std::vector<int32_t> sorted_cells(const llama_lukv_scorer & s) {
    std::vector<int32_t> res(s.n_cells());
    std::iota(res.begin(), res.end(), 0);
    std::sort(res.begin(), res.end(), [&](int32_t a, int32_t b) { return s.pos[a] < s.pos[b]; });

    return res;
}

// 0 for cells that compete, -inf for the protected ones at the start, which take no part: [n_cells]
static ggml_tensor * sink_mask(const llama_lukv_scorer & s) {
    std::vector<float> res(s.n_cells());
    for (int64_t i = 0; i < s.n_cells(); ++i) {
        res[i] = s.is_sink(i) ? -INFINITY : 0.0f;
    }

    return s.input_f32(res, s.n_cells());
}

//
// metrics that look at K or at positions only
//

static ggml_tensor * build_keydiff(const llama_lukv_scorer & s) {
    // only the order of the scores matters: neither the length of the normalised keys nor that of their sum does
    ggml_tensor * k_norm = ggml_rms_norm(s.ctx, to_f32(s.ctx, s.k), 1e-12f);

    return ggml_scale(s.ctx, ggml_mul_mat(s.ctx, k_norm, s.k_sum), -1.0f/s.k->ne[0]);
}

static ggml_tensor * build_knorm(const llama_lukv_scorer & s) {
    return ggml_scale(s.ctx, ggml_sqrt(s.ctx, squared_norms(s, s.k)), -1.0f);
}

static ggml_tensor * build_streamingllm(const llama_lukv_scorer & s) {
    return s.input_f32(std::vector<float>(s.pos.begin(), s.pos.end()), s.n_cells());
}

// the finalizer of MurmurHash3
static uint32_t hash_mix(uint32_t x) {
    x = (x ^ (x >> 16))*0x85ebca6bu;
    x = (x ^ (x >> 13))*0xc2b2ae35u;

    return x ^ (x >> 16);
}

static float random_score(const llama_lukv_metric_params & params, uint32_t il, uint32_t ih, llama_pos pos) {
    uint32_t x = params.at("seed");
    for (uint32_t number : { il, ih, (uint32_t) pos }) {
        x = hash_mix(hash_mix(x) + number);
    }
    return (x >> 8)*0x1p-24f;
}

static ggml_tensor * build_random(const llama_lukv_scorer & s) {
    std::vector<float> res;
    for (llama_pos pos : s.pos) {
        res.push_back(random_score(s.params, s.il, s.ih, pos));
    }

    return s.input_f32(res, s.n_cells());
}

static ggml_tensor * build_curdkv(const llama_lukv_scorer & s) {
    const int64_t n     = s.n_cells();
    const int64_t block = s.params.at("block") > 0 ? s.params.at("block") : n;
    const int64_t n_pad = (n + block - 1)/block*block;

    // neighbours share a block
    const auto order = sorted_cells(s);

    std::vector<int32_t> places(n);
    for (int64_t i = 0; i < n; ++i) {
        places[order[i]] = i;
    }
    ggml_tensor * sorted   = s.input_i32(order,  n);
    ggml_tensor * original = s.input_i32(places, n);

    const auto shares = [&](ggml_tensor * t) {
        ggml_tensor * cur = ggml_get_rows(s.ctx, squared_norms(s, t), sorted);

        cur = ggml_reshape_1d(s.ctx, cur, n);
        if (n_pad > n) {
            cur = ggml_pad(s.ctx, cur, n_pad - n, 0, 0, 0);
        }
        cur = ggml_reshape_2d(s.ctx, cur, block, n_pad/block);
        cur = ggml_div(s.ctx, cur, ggml_sum_rows(s.ctx, cur));

        return ggml_get_rows(s.ctx, ggml_reshape_2d(s.ctx, cur, 1, n_pad), original);
    };

    return ggml_mul(s.ctx, shares(s.k), shares(s.v));
}

//
// metrics on the attention of the last queries
//

// [n_cells, n_queries, n_gqa]
static ggml_tensor * build_window_attention(const llama_lukv_scorer & s) {
    const int64_t n   = s.n_cells();
    const int64_t n_q = s.pos_q.size();

    ggml_tensor * q  = ggml_cont(s.ctx, ggml_permute(s.ctx, s.q, 0, 2, 1, 3));
    ggml_tensor * kq = ggml_mul_mat(s.ctx, s.k, ggml_reshape_2d(s.ctx, q, q->ne[0], n_q*s.n_gqa));

    float scale = s.kq_scale;
    if (s.soft_cap > 0.0f) {
        kq    = ggml_scale(s.ctx, ggml_tanh(s.ctx, ggml_scale(s.ctx, kq, scale/s.soft_cap)), s.soft_cap);
        scale = 1.0f;
    }

    std::vector<float> mask(n*n_q);
    for (int64_t i = 0; i < n_q; ++i) {
        const auto first = mask.begin() + i*n;

        std::transform(s.pos.begin(), s.pos.end(), first, [&](llama_pos pos) { return pos > s.pos_q[i] ? -INFINITY : 0.0f; });

        // sees all where it can see none
        if (std::all_of(first, first + n, [](float x) { return x < 0.0f; })) {
            std::fill(first, first + n, 0.0f);
        }
    }

    return ggml_soft_max_ext(s.ctx, ggml_reshape_3d(s.ctx, kq, n, n_q, s.n_gqa), s.input_f32(mask, n), scale, 0.0f);
}

// mean of each of the first n_out cells, in the order of their positions, and its neighbours among them: [n_cells]
static ggml_tensor * pool_neighbours(const llama_lukv_scorer & s, ggml_tensor * cur, const std::vector<int32_t> & order, int64_t n_out) {
    const int64_t n      = s.n_cells();
    const int64_t kernel = s.params.at("kernel");

    // n is a zero that stands for those that a cell does not have
    std::vector<int32_t> neighbours(kernel*n, n);
    for (int64_t i = 0; i < n_out; ++i) {
        for (int64_t j = std::max<int64_t>(i - kernel/2, 0); j <= std::min(i + kernel/2, n_out - 1); ++j) {
            neighbours[kernel*order[i] + j - i + kernel/2] = order[j];
        }
    }

    cur = ggml_reshape_2d(s.ctx, ggml_pad(s.ctx, cur, 1, 0, 0, 0), 1, n + 1);
    cur = ggml_get_rows(s.ctx, cur, s.input_i32(neighbours, kernel*n));
    cur = ggml_sum_rows(s.ctx, ggml_reshape_2d(s.ctx, cur, kernel, n));

    return ggml_scale(s.ctx, ggml_reshape_1d(s.ctx, cur, n), 1.0f/kernel);
}

// seen    - what the window says about each cell, nullptr for nothing [n_cells]
// ceiling - what no element of it exceeds
static ggml_tensor * build_window_scores(const llama_lukv_scorer & s, ggml_tensor * seen, float ceiling) {
    const int64_t n      = s.n_cells();
    const int64_t window = s.params.at("window");

    const auto order = sorted_cells(s);

    // the window itself stays, the latest first
    std::vector<float> newness(n);

    int64_t n_out = 0;
    for (int64_t i = 0; i < n; ++i) {
        const llama_pos age = s.pos_max - s.pos[i];
        if (age < window) {
            newness[i] = ceiling + (1.0f - float(age)/window);
        } else {
            n_out++;
        }
    }
    ggml_tensor * res = s.input_f32(newness, n);

    if (!seen || n_out == 0) {
        return s.past ? ggml_add(s.ctx, s.past, res) : res;
    }

    ggml_tensor * cur = pool_neighbours(s, seen, order, n_out);

    // the larger of both
    if (s.past) {
        cur = ggml_add(s.ctx, s.past, ggml_relu(s.ctx, ggml_sub(s.ctx, cur, s.past)));
        s.set_past(cur);
    }

    return ggml_add(s.ctx, cur, res);
}

static ggml_tensor * build_snapkv(const llama_lukv_scorer & s) {
    return build_window_scores(s, s.q ? mean_columns(s, build_window_attention(s)) : nullptr, 1.0f);
}

static ggml_tensor * build_cake(const llama_lukv_scorer & s) {
    const float   gamma = s.params.at("gamma");
    const int64_t n_q   = s.pos_q.size();

    ggml_tensor * seen = nullptr;
    if (s.q) {
        ggml_tensor * attention = build_window_attention(s);
        ggml_tensor * mean      = ggml_scale(s.ctx, sum_columns(s, attention), 1.0f/n_q); // [n_cells, 1, n_gqa]

        seen = mean;
        if (n_q > 1) {
            ggml_tensor * diff = ggml_sub(s.ctx, attention, mean);
            ggml_tensor * var  = ggml_scale(s.ctx, sum_columns(s, ggml_sqr(s.ctx, diff)), gamma/(n_q - 1));

            seen = ggml_add(s.ctx, mean, var);
        }
        seen = mean_columns(s, seen);
    }

    return build_window_scores(s, seen, 1.0f + 0.5f*gamma);
}

//
// metrics on the statistics of all queries
//

static ggml_tensor * build_expectedattention(const llama_lukv_scorer & s) {
    const int64_t n = s.n_cells();
    const int64_t d = s.k->ne[0];

    ggml_tensor * k = to_f32(s.ctx, s.k);

    ggml_tensor * logits = ggml_scale(s.ctx, ggml_mul_mat(s.ctx, k, s.q_mean), s.kq_scale); // [n_cells, n_gqa]

    if (s.q_cov) {
        // k C k, the sum over its last factor at the end
        ggml_tensor * cur = ggml_mul_mat(s.ctx, k, ggml_reshape_2d(s.ctx, s.q_cov, d, d*s.n_gqa));

        cur = ggml_mul(s.ctx, ggml_reshape_3d(s.ctx, cur, n, d, s.n_gqa), transpose(s.ctx, k));
        cur = ggml_reshape_2d(s.ctx, sum_columns(s, cur), n, s.n_gqa);

        logits = ggml_add(s.ctx, logits, ggml_scale(s.ctx, cur, 0.5f*s.kq_scale*s.kq_scale));
    }

    ggml_tensor * res = mean_columns(s, ggml_soft_max(s.ctx, ggml_add(s.ctx, logits, sink_mask(s))));

    if (s.params.at("vnorm") > 0) {
        ggml_tensor * norms = ggml_reshape_1d(s.ctx, ggml_sqrt(s.ctx, squared_norms(s, s.v)), n);

        res = ggml_mul(s.ctx, ggml_scale_bias(s.ctx, res, 1.0f, s.params.at("epsilon")), norms);
    }

    return res;
}

// inverses of symmetric positive definite matrices, by Cholesky's decomposition in double precision
static void op_invert(ggml_tensor * dst, const ggml_tensor * a, int ith, int nth, void * userdata) {
    GGML_UNUSED(userdata);

    const int64_t n = a->ne[0];

    std::vector<double> l(n*n);
    std::vector<double> x(n);

    for (int64_t m = ith; m < a->ne[2]; m += nth) {
        const float * src = (const float *) a->data + m*n*n;
        float       * res = (float *) dst->data + m*n*n;

        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j <= i; ++j) {
                double sum = src[i*n + j];
                for (int64_t k = 0; k < j; ++k) {
                    sum -= l[i*n + k]*l[j*n + k];
                }
                l[i*n + j] = i == j ? std::sqrt(std::max(sum, 1e-12)) : sum/l[j*n + j];
            }
        }
        for (int64_t c = 0; c < n; ++c) {
            for (int64_t i = 0; i < n; ++i) {
                double sum = i == c ? 1.0 : 0.0;
                for (int64_t k = 0; k < i; ++k) {
                    sum -= l[i*n + k]*x[k];
                }
                x[i] = sum/l[i*n + i];
            }
            for (int64_t i = n - 1; i >= 0; --i) {
                double sum = x[i];
                for (int64_t k = i + 1; k < n; ++k) {
                    sum -= l[k*n + i]*x[k];
                }
                x[i] = sum/l[i*n + i];

                res[c*n + i] = x[i];
            }
        }
    }
}

static ggml_tensor * build_capkv(const llama_lukv_scorer & s) {
    const int64_t n     = s.n_cells();
    const int64_t n_gqa = s.n_gqa;
    const int64_t d     = s.v->ne[0];

    // weights, relative to the largest one of each query head: [n_cells, 1, n_gqa]
    ggml_tensor * cosines = ggml_mul_mat(s.ctx, ggml_l2_norm(s.ctx, to_f32(s.ctx, s.k), 1e-12f), ggml_l2_norm(s.ctx, s.q_mean, 1e-12f));
    cosines = ggml_add(s.ctx, cosines, sink_mask(s));

    ggml_tensor * largest = ggml_get_rows(s.ctx, ggml_reshape_3d(s.ctx, cosines, 1, n, n_gqa),
            ggml_reshape_2d(s.ctx, ggml_argmax(s.ctx, cosines), 1, n_gqa));

    ggml_tensor * w = ggml_sub(s.ctx, ggml_reshape_3d(s.ctx, cosines, n, 1, n_gqa), largest);
    w = ggml_exp(s.ctx, ggml_scale(s.ctx, w, s.params.at("tau")));

    std::vector<float> epsilon(n);
    for (int64_t i = 0; i < n; ++i) {
        epsilon[i] = s.is_sink(i) ? 0.0f : s.params.at("epsilon");
    }

    // capacity: 1 + sum of w v v
    ggml_tensor * v  = to_f32(s.ctx, s.v);
    ggml_tensor * vt = transpose(s.ctx, v);

    ggml_tensor * vw = ggml_mul(s.ctx, ggml_repeat_4d(s.ctx, vt, n, d, n_gqa, 1), ggml_add(s.ctx, w, s.input_f32(epsilon, n)));

    std::vector<float> identity(d*d);
    for (int64_t i = 0; i < d; ++i) {
        identity[i*d + i] = 1.0f;
    }
    ggml_tensor * capacity = ggml_add(s.ctx, ggml_mul_mat(s.ctx, vt, vw), s.input_f32(identity, d));

    // leverage: w v A^-1 v
    ggml_tensor * inverse = ggml_map_custom1(s.ctx, capacity, op_invert, GGML_N_TASKS_MAX, nullptr);
    s.on_cpu(inverse);

    ggml_tensor * cur = ggml_mul_mat(s.ctx, v, ggml_reshape_2d(s.ctx, inverse, d, d*n_gqa));
    cur = sum_columns(s, ggml_mul(s.ctx, ggml_reshape_3d(s.ctx, cur, n, d, n_gqa), vt));

    return mean_columns(s, ggml_mul(s.ctx, cur, w));
}

//
// trained
//

static ggml_tensor * build_foresight(const llama_lukv_scorer & s) {
    constexpr float LEAST_ATTENTION = 1e-7f;
    constexpr float LEAST_SQUARE    = 1e-12f;

    const int64_t n = s.n_cells();

    const auto log_of = [&](ggml_tensor * t, float least) {
        return ggml_reshape_2d(s.ctx, ggml_log(s.ctx, ggml_scale_bias(s.ctx, t, 1.0f, least)), 1, n);
    };
    const auto log_norm = [&](ggml_tensor * t) {
        return ggml_scale(s.ctx, log_of(squared_norms(s, t), LEAST_SQUARE), 0.5f);
    };

    // [n_cells]
    ggml_tensor * mean = nullptr;
    ggml_tensor * rms  = nullptr;
    if (s.q) {
        ggml_tensor * attention = build_window_attention(s);

        mean = mean_columns(s, attention);
        rms  = ggml_sqrt(s.ctx, mean_columns(s, ggml_sqr(s.ctx, attention)));
    } else {
        mean = rms = s.input_f32(std::vector<float>(n), n);
    }

    std::vector<float> age(n);
    for (int64_t i = 0; i < n; ++i) {
        age[i] = std::log(float(s.pos_max - s.pos[i] + 1));
    }

    ggml_tensor * k = ggml_l2_norm(s.ctx, to_f32(s.ctx, s.k), 1e-12f);

    ggml_tensor * features = ggml_reshape_2d(s.ctx, ggml_mul_mat(s.ctx, k, ggml_l2_norm(s.ctx, sum_columns(s, k), 1e-12f)), 1, n);
    for (ggml_tensor * t : {
            log_norm(s.k),
            log_norm(s.v),
            log_of(mean, LEAST_ATTENTION),
            log_of(pool_neighbours(s, mean, sorted_cells(s), n), LEAST_ATTENTION),
            log_of(rms, LEAST_ATTENTION),
            s.input_f32(age, 1) }) {
        features = ggml_concat(s.ctx, features, t, 0);
    }

    ggml_tensor * x = features;
    for (ggml_tensor * t : { s.k_plain, s.v_plain }) {
        x = ggml_concat(s.ctx, x, ggml_rms_norm(s.ctx, t, 1e-12f), 0);
    }

    // those of this head
    const auto weights = [&](const std::vector<float> & data, int64_t ne0, int64_t ne1) {
        const auto first = data.begin() + (s.il*s.n_head_kv + s.ih)*ne0*ne1;

        return s.input_f32(std::vector<float>(first, first + ne0*ne1), ne0);
    };
    const auto & w = *s.weights;

    ggml_tensor * hidden = ggml_mul_mat(s.ctx, weights(w.input, x->ne[0], w.n_hidden), x);
    hidden = ggml_silu(s.ctx, ggml_add(s.ctx, hidden, weights(w.bias, w.n_hidden, 1)));

    return ggml_add(s.ctx,
            ggml_mul_mat(s.ctx, hidden,   weights(w.output, w.n_hidden, 1)),
            ggml_mul_mat(s.ctx, features, weights(w.skip,   llama_lukv_weights::N_FEATURES, 1)));
}

//
// metrics on a second pass
//

static ggml_tensor * build_kvzip(const llama_lukv_scorer & s) {
    return ggml_dup(s.ctx, s.past);
}

//
// all attention so far
//

static ggml_tensor * build_h2o(const llama_lukv_scorer & s) {
    if (s.params.at("average") == 0) {
        return s.attn_sums;
    }

    std::vector<float> weights;
    for (llama_pos pos : s.pos) {
        weights.push_back(1.0f/(s.pos_max + 1 - pos));
    }
    return ggml_mul(s.ctx, s.attn_sums, s.input_f32(weights, s.n_cells()));
}

//
// wrappers
//

// a share of the budget for the best cells by the first scores, the rest for the best others by the second
static ggml_tensor * build_choice(const llama_lukv_scorer & s, ggml_tensor * first, ggml_tensor * second, double share) {
    const int64_t n       = s.n_cells();
    const int32_t n_first = share*s.n_keep;

    first  = ggml_reshape_2d(s.ctx, first,  1, n);
    second = ggml_reshape_2d(s.ctx, second, 1, n);

    if (n_first == 0) {
        return second;
    }
    if (!s.prot.empty()) {
        first = ggml_set_rows(s.ctx, ggml_dup(s.ctx, first), s.input_f32(std::vector<float>(s.prot.size(), INFINITY), 1),
                s.input_i32(s.prot, s.prot.size()));
    }

    const int32_t n_rest = n - n_first;

    ggml_tensor * rest = ggml_bottom_k_ragged(s.ctx, first, s.input_i32({ 0, (int32_t) n, n_rest }, 3), n_rest);
    rest = ggml_reshape_1d(s.ctx, rest, n_rest);

    ggml_tensor * res = ggml_dup(s.ctx, s.input_f32(std::vector<float>(n, SCORE_CHOSEN), 1));

    return ggml_set_rows(s.ctx, res, ggml_get_rows(s.ctx, second, rest), rest);
}

// the second half by the score of the first times ||v W_O||_1
static ggml_tensor * build_criticalkv(const llama_lukv_scorer & s, ggml_tensor * scores) {
    scores = ggml_reshape_2d(s.ctx, scores, 1, s.n_cells());

    return build_choice(s, scores, ggml_mul(s.ctx, ggml_scale_bias(s.ctx, scores, 1.0f, s.params.at("epsilon")), s.out_norms), 0.5);
}

//
// for all heads of a layer
//

int32_t llama_lukv_layer_scorer::n_max() const {
    int32_t res = 0;
    for (const auto & seg : segs) {
        res = std::max(res, seg.n);
    }
    return res;
}

ggml_tensor * llama_lukv_layer_scorer::input_segs() const {
    std::vector<int32_t> res;
    for (const auto & seg : segs) {
        res.insert(res.end(), { seg.ih, seg.row, seg.n });
    }
    return input_i32(res, 3);
}

ggml_tensor * llama_lukv_layer_scorer::input_pos() const {
    return input_i32(pos, pos.size());
}

static ggml_tensor * build_layer_norms(const llama_lukv_layer_scorer & s) {
    const auto block = s.params.find("block");
    const bool shares = block != s.params.end();

    return ggml_norm_scores_ragged(s.ctx, s.k, shares ? s.v : nullptr, s.input_segs(), s.input_pos(), s.n_max(), shares ? block->second : 0);
}

static ggml_tensor * build_layer_streamingllm(const llama_lukv_layer_scorer & s) {
    return s.input_f32(std::vector<float>(s.pos.begin(), s.pos.end()), s.pos.size());
}

static ggml_tensor * build_layer_random(const llama_lukv_layer_scorer & s) {
    std::vector<float> res;
    for (const auto & seg : s.segs) {
        for (int32_t i = 0; i < seg.n; ++i) {
            res.push_back(random_score(s.params, s.il, seg.ih, s.pos[res.size()]));
        }
    }

    return s.input_f32(res, res.size());
}

static ggml_tensor * build_layer_window(const llama_lukv_layer_scorer & s) {
    if (!s.q) {
        return nullptr;
    }

    const auto gamma = s.params.find("gamma");

    return ggml_window_scores_ragged(s.ctx, s.q, s.input_i32(s.pos_q, s.pos_q.size()), s.k, s.past, s.input_segs(), s.input_pos(),
            s.n_head_kv, s.n_max(), s.pos_max, s.params.at("window"), s.params.at("kernel"), gamma != s.params.end() ? gamma->second : 0.0,
            s.kq_scale, s.soft_cap);
}

static ggml_tensor * build_layer_expectedattention(const llama_lukv_layer_scorer & s) {
    return ggml_expected_scores_ragged(s.ctx, s.q_mean, s.q_cov, s.k, s.params.at("vnorm") > 0 ? s.v : nullptr, s.input_segs(), s.input_pos(),
            s.n_head_kv, s.n_max(), s.pos_min + s.sink, s.params.at("epsilon"), s.kq_scale);
}

static ggml_tensor * build_layer_capkv(const llama_lukv_layer_scorer & s) {
    return ggml_leverage_scores_ragged(s.ctx, s.q_mean, s.k, s.v, s.input_segs(), s.input_pos(),
            s.n_head_kv, s.n_max(), s.pos_min + s.sink, s.params.at("tau"), s.params.at("epsilon"));
}

// [1, n_rows] -> [n_cells], segment by segment
static ggml_tensor * join_segments(const llama_lukv_layer_scorer & s, ggml_tensor * rows) {
    ggml_tensor * res = nullptr;
    for (const auto & seg : s.segs) {
        ggml_tensor * cur = ggml_view_1d(s.ctx, rows, seg.n, seg.row*ggml_element_size(rows));

        res = res ? ggml_concat(s.ctx, res, cur, 0) : cur;
    }
    return res;
}

static ggml_tensor * build_layer_h2o(const llama_lukv_layer_scorer & s) {
    ggml_tensor * res = join_segments(s, s.attn_sums);
    if (s.params.at("average") == 0) {
        return res;
    }

    std::vector<float> weights;
    for (llama_pos pos : s.pos) {
        weights.push_back(1.0f/(s.pos_max + 1 - pos));
    }
    return ggml_mul(s.ctx, res, s.input_f32(weights, weights.size()));
}

static ggml_tensor * build_layer_keydiff(const llama_lukv_layer_scorer & s) {
    std::vector<int32_t> rows;
    std::vector<int32_t> heads;
    for (const auto & seg : s.segs) {
        rows .insert(rows.end(), { seg.row, seg.n });
        heads.push_back(seg.ih);
    }
    ggml_tensor * anchors = ggml_get_rows(s.ctx, s.k_sum, s.input_i32(heads, heads.size()));

    return join_segments(s, ggml_keydiff_ragged(s.ctx, s.k, s.input_i32(rows, 2), anchors));
}

// norms - nullptr for 0 in place of the product
static ggml_tensor * build_layer_choice(const llama_lukv_layer_scorer & s, ggml_tensor * scores, ggml_tensor * norms, float epsilon, double share) {
    if (!s.prot.empty()) {
        scores = ggml_set_rows(s.ctx, ggml_dup(s.ctx, ggml_reshape_2d(s.ctx, scores, 1, s.pos.size())),
                s.input_f32(std::vector<float>(s.prot.size(), INFINITY), 1), s.input_i32(s.prot, s.prot.size()));
    }

    std::vector<int32_t> n_first;
    for (const auto & seg : s.segs) {
        n_first.push_back(share*seg.n_keep);
    }

    return ggml_critical_scores_ragged(s.ctx, scores, norms, s.input_segs(), s.input_i32(n_first, n_first.size()), s.n_max(),
            epsilon, SCORE_CHOSEN);
}

//
// registry
//

using metric_params = llama_lukv_metric_params;

static llama_lukv_needs needs_nothing(const metric_params &) {
    return {};
}

static llama_lukv_needs needs_window(const metric_params & values) {
    llama_lukv_needs res;
    res.n_window = values.at("window");
    res.past     = values.at("carry") > 0;
    return res;
}

static llama_lukv_needs needs_queries(const metric_params & values) {
    const auto covariance = values.find("covariance");

    llama_lukv_needs res;
    res.n_future = values.at("future");
    res.q_cov    = covariance != values.end() && covariance->second > 0;
    return res;
}

static llama_lukv_needs needs_repetition(const metric_params &) {
    llama_lukv_needs res;
    res.n_window = 128; // tokens that are repeated in one batch
    res.past     = true;
    res.repeated = true;
    return res;
}

static llama_lukv_needs needs_trained(const metric_params & values) {
    llama_lukv_needs res;
    res.n_window = values.at("window");
    res.plain    = true;
    res.weights  = true;
    return res;
}

static llama_lukv_needs needs_attention(const metric_params &) {
    llama_lukv_needs res;
    res.attn_sums = true;
    return res;
}

static llama_lukv_needs needs_keys(const metric_params &) {
    llama_lukv_needs res;
    res.k_sum = true;
    return res;
}

static llama_lukv_metric wrap_criticalkv(const llama_lukv_metric & base) {
    llama_lukv_metric res = base;

    res.name = "criticalkv-" + base.name;
    res.expected_only = false;
    res.params.clear();
    for (auto param : base.params) {
        const std::string name = param.name;
        if (name == "epsilon") {
            continue;
        }
        // the norm behind W_O takes the place of that of the value
        if (name == "vnorm") {
            param.value = 0;
        }
        res.params.push_back(param);
    }
    res.params.push_back({ "epsilon", false, 1e-4, 0 });

    res.needs_of = [base](const metric_params & values) {
        auto needs = base.needs(values);
        needs.out_norms = true;
        return needs;
    };

    // epsilon is that of the wrapper, the other metric has its default
    const auto inner_of = [base](auto s) {
        for (const auto & param : base.params) {
            if (std::string(param.name) == "epsilon") {
                s.params["epsilon"] = param.value;
            }
        }
        return s;
    };
    res.build_scores = [base, inner_of](const llama_lukv_scorer & s) {
        return build_criticalkv(s, base.build(inner_of(s)));
    };
    res.build_layer_scores = [base, inner_of](const llama_lukv_layer_scorer & s) -> ggml_tensor * {
        ggml_tensor * scores = base.build(inner_of(s));

        return scores ? build_layer_choice(s, scores, s.out_norms, s.params.at("epsilon"), 0.5) : nullptr;
    };

    return res;
}

// a share of the budget by keydiff, the rest by another metric
static llama_lukv_metric join_keydiff(const llama_lukv_metric & other, double share, const metric_params & defaults) {
    llama_lukv_metric res = other;

    res.name = "keydiff-" + other.name;
    res.params.push_back({ "share", false, share, 0 });

    for (auto & param : res.params) {
        const auto it = defaults.find(param.name);
        if (it != defaults.end()) {
            param.value = it->second;
        }
    }

    res.needs_of = [other](const metric_params & values) {
        auto needs = other.needs(values);
        needs.k_sum = true;
        return needs;
    };
    res.build_scores = [other](const llama_lukv_scorer & s) {
        return build_choice(s, build_keydiff(s), other.build(s), s.params.at("share"));
    };
    res.build_layer_scores = [other](const llama_lukv_layer_scorer & s) -> ggml_tensor * {
        ggml_tensor * scores = other.build(s);

        if (!scores) {
            return nullptr;
        }
        return ggml_add(s.ctx, scores, build_layer_choice(s, build_layer_keydiff(s), nullptr, 0.0f, s.params.at("share")));
    };

    return res;
}

static std::vector<llama_lukv_metric> make_metrics() {
    const llama_lukv_metric::param window = { "window", true, 32, 1 };
    const llama_lukv_metric::param kernel = { "kernel", true,  5, 1 };
    const llama_lukv_metric::param carry  = { "carry",  true,  0, 0 };
    const llama_lukv_metric::param future = { "future", true, 512, 1 };

    const llama_lukv_metric snapkv = { "snapkv", { window, kernel, carry }, needs_window, build_snapkv, build_layer_window };
    const llama_lukv_metric cake   = { "cake", { { "window", true, 32, 2 }, kernel, carry, { "gamma", false, 200.0, 0 } },
        needs_window, build_cake, build_layer_window };
    const llama_lukv_metric expected = { "expectedattention",
        { future, { "epsilon", false, 0.02, 0 }, { "covariance", true, 1, 0 }, { "vnorm", true, 1, 0 } },
        needs_queries, build_expectedattention, build_layer_expectedattention, /*.expected_only =*/ true };
    const llama_lukv_metric kvzip = { "kvzip", { { "chunk", true, 2048, 1 } }, needs_repetition, build_kvzip, nullptr };
    const llama_lukv_metric h2o = { "h2o", { { "average", true, 0, 0 } }, needs_attention, build_h2o, build_layer_h2o };

    return {
        cake,
        { "capkv", { { "tau", false, 5.0, 0 }, future, { "epsilon", false, 1e-6, 0 } }, needs_queries, build_capkv, build_layer_capkv },
        wrap_criticalkv(cake),
        wrap_criticalkv(expected),
        wrap_criticalkv(h2o),
        wrap_criticalkv(snapkv),
        { "curdkv", { { "block", true, 16, 0 } }, needs_nothing, build_curdkv, build_layer_norms },
        expected,
        { "foresight",    { window, kernel }, needs_trained, build_foresight, nullptr },
        h2o,
        { "keydiff",      {}, needs_keys, build_keydiff, nullptr },
        join_keydiff(expected, 0.75, { { "covariance", 0 }, { "vnorm", 0 } }), // the mean query alone ranks better there
        join_keydiff(kvzip,    0.5,  {}),
        { "knorm",        {}, needs_nothing, build_knorm,   build_layer_norms },
        kvzip,
        { "random",       { { "seed", true, 0, 0 } }, needs_nothing, build_random, build_layer_random },
        snapkv,
        { "streamingllm", {}, needs_nothing, build_streamingllm, build_layer_streamingllm },
    };
}

static const std::vector<llama_lukv_metric> & all_metrics() {
    static const std::vector<llama_lukv_metric> res = make_metrics();

    return res;
}

const llama_lukv_metric * llama_lukv_metric::find(const std::string & name) {
    for (const auto & metric : all_metrics()) {
        if (metric.name == name) {
            return &metric;
        }
    }
    return nullptr;
}

std::string llama_lukv_metric::names() {
    std::string res;
    for (const auto & metric : all_metrics()) {
        res += (res.empty() ? "" : ", ") + metric.name;
    }
    return res;
}

void llama_lukv_metric::check(const llama_lukv_metric_params & values) const {
    for (const auto & param : params) {
        const double value = values.at(param.name);

        if (!(value >= param.least && value < 2147483648.0)) {
            throw std::runtime_error(format("lukv.metric.%s is %g, but must be at least %g", param.name, value, param.least));
        }
        if (std::string(param.name) == "share" && value > 1.0) {
            throw std::runtime_error(format("lukv.metric.share is %g, but must be at most 1", value));
        }
        if (std::string(param.name) == "kernel" && int64_t(value) % 2 == 0) {
            throw std::runtime_error(format("lukv.metric.kernel is %g, but must be odd", value));
        }
    }
}

