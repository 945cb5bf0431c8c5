// The ops of ggml-ragged.h on every backend that is there, against double precision.
//
//     test-ragged-ops [test]                             all cases
//     test-ragged-ops perf [cells] [layers] [tokens] [even]   time of the attention of one step and of the scores, 8 KV heads of size 128
//
// In perf, even = 1 gives all heads the same number of cells, and "uniform" is ggml_flash_attn_ext over as many cells as the ragged heads have on average.
// "rotated" is "ragged" with queries and results rotated as quantised K and V are.

#include "ggml-ragged.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <algorithm>
#include <array>
#include <bitset>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

static std::mt19937 rng(1);

static std::vector<float> random_floats(size_t n, float scale = 1.0f) {
    std::normal_distribution<float> dist(0.0f, scale);
    std::vector<float> res(n);
    for (auto & x : res) {
        x = dist(rng);
    }
    return res;
}

// rows of a type, and what they mean
struct rows {
    std::vector<char>  data;
    std::vector<float> values;

    rows(ggml_type type, int64_t d, int64_t n) : data(ggml_row_size(type, d)*n), values(random_floats(d*n)) {
        if (type == GGML_TYPE_F32) {
            memcpy(data.data(), values.data(), data.size());
        } else {
            ggml_quantize_chunk(type, values.data(), data.data(), 0, n, d, nullptr);
            ggml_get_type_traits(type)->to_float(data.data(), values.data(), d*n);
        }
    }
};

struct seg {
    int32_t first;
    int32_t n;
};

// segments with gaps between them, at any row. the last one ends with the rows
static std::vector<seg> make_segs(int n_head, int n_min, int n_max, int64_t & n_rows) {
    std::vector<seg> res;
    n_rows = 0;
    for (int h = 0; h < n_head; ++h) {
        // most heads are short, a few are long
        const double u = std::uniform_real_distribution<double>(0.0, 1.0)(rng);
        n_rows += rng() % 5;
        res.push_back({ (int32_t) n_rows, (int32_t) (n_min + u*u*u*(n_max - n_min)) });
        n_rows += res.back().n;
    }
    return res;
}

struct runner {
    ggml_backend_t   backend;
    ggml_context_ptr ctx { ggml_init({ 4096*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }) };

    std::vector<std::pair<ggml_tensor *, std::vector<char>>> inputs;

    ggml_backend_buffer_ptr buf;
    ggml_cgraph * gf = nullptr;

    explicit runner(ggml_backend_t backend) : backend(backend) {}

    template <typename T>
    ggml_tensor * input(ggml_type type, std::vector<int64_t> ne, const std::vector<T> & data) {
        ggml_tensor * t = ggml_new_tensor(ctx.get(), type, ne.size(), ne.data());
        inputs.emplace_back(t, std::vector<char>((const char *) data.data(), (const char *) (data.data() + data.size())));
        return t;
    }

    bool supports(ggml_tensor * t) {
        return ggml_backend_supports_op(backend, t);
    }

    void prepare(const std::vector<ggml_tensor *> & outs) {
        gf = ggml_new_graph(ctx.get());
        for (ggml_tensor * t : outs) {
            ggml_build_forward_expand(gf, t);
        }
        buf.reset(ggml_backend_alloc_ctx_tensors(ctx.get(), backend));
        for (const auto & [t, data] : inputs) {
            GGML_ASSERT(data.size() == ggml_nbytes(t));
            ggml_backend_tensor_set(t, data.data(), 0, data.size());
        }
    }

    // of a view of an input
    std::vector<float> compute_inplace(ggml_tensor * out) {
        prepare({ out });
        GGML_ASSERT(ggml_backend_graph_compute(backend, gf) == GGML_STATUS_SUCCESS);

        std::vector<float> res(ggml_nelements(out));
        ggml_backend_tensor_get(out, res.data(), 0, ggml_nbytes(out));
        return res;
    }

    template <typename T>
    std::vector<T> compute(ggml_tensor * out) {
        prepare({ out });
        ggml_backend_tensor_memset(out, 0xFF, 0, ggml_nbytes(out)); // NaN
        GGML_ASSERT(ggml_backend_graph_compute(backend, gf) == GGML_STATUS_SUCCESS);

        std::vector<T> res(ggml_nelements(out));
        ggml_backend_tensor_get(out, res.data(), 0, ggml_nbytes(out));
        return res;
    }
};

static double nmse(const std::vector<float> & a, const std::vector<double> & ref) {
    double err = 0.0;
    double sum = 0.0;
    for (size_t i = 0; i < ref.size(); ++i) {
        err += (a[i] - ref[i])*(a[i] - ref[i]);
        sum += ref[i]*ref[i];
    }
    return err == 0.0 ? 0.0 : err/sum; // the reference may be nothing but zeros
}

static double dot(int n, const float * x, const float * y) {
    double sum = 0.0;
    for (int i = 0; i < n; ++i) {
        sum += double(x[i])*y[i];
    }
    return sum;
}

// v A^-1 v for a symmetric positive definite A, by elimination
static double quadratic_form_of_inverse(int n, std::vector<double> a, const float * v) {
    std::vector<double> x(v, v + n);
    double sum = 0.0;
    for (int i = 0; i < n; ++i) {
        for (int j = i + 1; j < n; ++j) {
            const double f = a[j*n + i]/a[i*n + i];
            for (int l = i; l < n; ++l) {
                a[j*n + l] -= f*a[i*n + l];
            }
            x[j] -= f*x[i];
        }
        sum += x[i]*x[i]/a[i*n + i];
    }
    return sum;
}

// each n of the numbers times the orthonormal Walsh-Hadamard matrix, by its definition
template <typename T>
static void rotate(std::vector<T> & x, int n) {
    for (size_t first = 0; n > 0 && first < x.size(); first += n) {
        std::vector<double> y(n);
        for (int i = 0; i < n; ++i) {
            for (int j = 0; j < n; ++j) {
                y[i] += std::bitset<32>(i & j).count() % 2 ? -x[first + j] : x[first + j];
            }
        }
        for (int i = 0; i < n; ++i) {
            x[first + i] = y[i]/sqrt(n);
        }
    }
}

struct attn_case {
    ggml_type type;
    int  d;
    int  n_head_kv;
    int  n_gqa;
    int  n_tokens;
    int  n_max;         // cells of the longest head
    float softcap = 0.0f;
    bool  sinks   = false;
    int   n_recent = 64; // cells of which some are hidden
    int   n_seqs   = 1;  // with n_tokens each
    int   n_rot_k  = 0;
    int   n_rot_v  = 0;

    std::string name() const {
        char buf[256];
        snprintf(buf, sizeof(buf), "FLASH_ATTN_RAGGED(type=%s,d=%d,n_head_kv=%d,n_gqa=%d,n_tokens=%d,n_max=%d,n_recent=%d,n_seqs=%d,softcap=%g,sinks=%d,rot=%d/%d)",
                ggml_type_name(type), d, n_head_kv, n_gqa, n_tokens, n_max, n_recent, n_seqs, softcap, sinks, n_rot_k, n_rot_v);
        return buf;
    }
};

// returns < 0 where it is not supported
static double run_attn(ggml_backend_t backend, const attn_case & c) {
    int64_t n_rows;
    auto segs = make_segs(c.n_head_kv*c.n_seqs, c.n_recent, c.n_max, n_rows);

    // cells at the end that no token of a sequence sees
    const auto n_unused = [&](int s) { return (c.n_recent - std::min(c.n_tokens, c.n_recent))/(3 + s); };

    // of several sequences one is empty, and one has few cells, which not all of its tokens see
    if (c.n_seqs > 1) {
        for (int h = 0; h < c.n_head_kv; ++h) {
            segs[h].n               = 0;
            segs[c.n_head_kv + h].n = n_unused(1) + c.n_tokens/2 + h;
        }
    }

    const int n_head   = c.n_head_kv*c.n_gqa;
    const int n_tokens = c.n_tokens*c.n_seqs;

    const rows k(c.type, c.d, n_rows);
    const rows v(c.type, c.d, n_rows);

    auto q = random_floats(c.d*n_head*n_tokens);
    const auto sinks = random_floats(n_head);

    const float scale = 1.0f/sqrtf(c.d);

    // causal among the last cells, some of which are unused
    std::vector<int32_t> n_hidden;
    for (int s = 0; s < c.n_seqs; ++s) {
        for (int t = 0; t < c.n_tokens; ++t) {
            n_hidden.push_back(std::min(n_unused(s) + c.n_tokens - 1 - t, c.n_recent - 1));
        }
    }

    runner run(backend);

    ggml_tensor * out = ggml_flash_attn_ragged(run.ctx.get(),
            run.input(GGML_TYPE_F32, { c.d, n_head, n_tokens }, q),
            run.input(c.type, { c.d, n_rows }, k.data),
            run.input(c.type, { c.d, n_rows }, v.data),
            run.input(GGML_TYPE_I32, { 2, c.n_head_kv, c.n_seqs }, segs),
            run.input(GGML_TYPE_I32, { n_tokens }, n_hidden),
            c.sinks ? run.input(GGML_TYPE_F32, { n_head }, sinks) : nullptr, scale, c.softcap, c.n_rot_k, c.n_rot_v);

    if (!run.supports(out)) {
        return -1.0;
    }
    const auto res = run.compute<float>(out);

    rotate(q, c.n_rot_k);

    std::vector<double> ref(res.size(), 0.0);
    for (int t = 0; t < n_tokens; ++t) {
        for (int h = 0; h < n_head; ++h) {
            const seg & s = segs[t/c.n_tokens*c.n_head_kv + h/c.n_gqa];

            std::vector<double> p(std::max(s.n - n_hidden[t], 0));
            double max = c.sinks ? sinks[h] : -INFINITY;
            for (size_t i = 0; i < p.size(); ++i) {
                double dot = 0.0;
                for (int j = 0; j < c.d; ++j) {
                    dot += double(q[(t*n_head + h)*c.d + j])*k.values[int64_t(s.first + i)*c.d + j];
                }
                dot *= scale;
                if (c.softcap != 0.0f) {
                    dot = c.softcap*tanh(dot/c.softcap);
                }
                p[i] = dot;
                max  = std::max(max, dot);
            }
            double sum = c.sinks ? exp(sinks[h] - max) : 0.0;
            for (auto & x : p) {
                sum += x = exp(x - max);
            }
            for (size_t i = 0; i < p.size(); ++i) {
                for (int j = 0; j < c.d; ++j) {
                    ref[(t*n_head + h)*c.d + j] += p[i]/sum*v.values[int64_t(s.first + i)*c.d + j];
                }
            }
        }
    }
    rotate(ref, c.n_rot_v);

    return nmse(res, ref);
}

// rows of K and V in any order. the others stay
static double run_store(ggml_backend_t backend, ggml_type type, int d, int n_head_kv, int n_tokens, int n_rot_k, int n_rot_v) {
    const int n      = n_head_kv*n_tokens;
    const int n_rows = 2*n + 3;

    std::vector<int32_t> idxs(n_rows);
    std::iota(idxs.begin(), idxs.end(), 0);
    std::shuffle(idxs.begin(), idxs.end(), rng);
    idxs.resize(n);

    runner run(backend);

    // K and V of a token are parts of a larger row, as where one product gives both
    const auto      cur_data = random_floats(2*d*n, 3.0f);
    ggml_tensor   * cur      = run.input(GGML_TYPE_F32, { d, 2*n_head_kv, n_tokens }, cur_data);
    ggml_tensor   * cells[2];
    ggml_tensor   * parts[2];
    std::vector<double> ref;

    for (int i = 0; i < 2; ++i) {
        const rows old(type, d, n_rows);
        cells[i] = run.input(type, { d, n_rows }, old.data);
        parts[i] = ggml_view_3d(run.ctx.get(), cur, d, n_head_kv, n_tokens, cur->nb[1], cur->nb[2], i*n_head_kv*cur->nb[1]);

        auto values = old.values;
        for (int r = 0; r < n; ++r) {
            const auto first = cur_data.begin() + ((r/n_head_kv*2 + i)*n_head_kv + r%n_head_kv)*d;
            std::vector<float> row(first, first + d);
            rotate(row, i == 0 ? n_rot_k : n_rot_v);
            if (type != GGML_TYPE_F32) {
                std::vector<char> data(ggml_row_size(type, d));
                ggml_quantize_chunk(type, row.data(), data.data(), 0, 1, d, nullptr);
                ggml_get_type_traits(type)->to_float(data.data(), row.data(), d);
            }
            std::copy(row.begin(), row.end(), values.begin() + idxs[r]*d);
        }
        ref.insert(ref.end(), values.begin(), values.end());
    }

    ggml_tensor * out = ggml_store_ragged(run.ctx.get(), parts[0], parts[1], cells[0], cells[1],
            run.input(GGML_TYPE_I32, { n }, idxs), n_rot_k, n_rot_v);
    if (!run.supports(out)) {
        return -1.0;
    }
    run.prepare({ out });
    GGML_ASSERT(ggml_backend_graph_compute(backend, run.gf) == GGML_STATUS_SUCCESS);

    std::vector<float> res;
    for (ggml_tensor * t : cells) {
        std::vector<char> data(ggml_nbytes(t));
        ggml_backend_tensor_get(t, data.data(), 0, data.size());

        std::vector<float> values(d*n_rows);
        if (type == GGML_TYPE_F32) {
            memcpy(values.data(), data.data(), data.size());
        } else {
            ggml_get_type_traits(type)->to_float(data.data(), values.data(), values.size());
        }
        res.insert(res.end(), values.begin(), values.end());
    }
    return nmse(res, ref);
}

static double run_keydiff(ggml_backend_t backend, ggml_type type, int d, int n_head_kv, int n_max) {
    int64_t n_rows;
    auto segs = make_segs(n_head_kv, 1, n_max, n_rows);
    segs[rng() % segs.size()].n = 0;

    const rows k(type, d, n_rows);

    const auto anchors = random_floats(d*n_head_kv);

    runner run(backend);
    ggml_tensor * out = ggml_keydiff_ragged(run.ctx.get(), run.input(type, { d, n_rows }, k.data), run.input(GGML_TYPE_I32, { 2, n_head_kv }, segs),
            run.input(GGML_TYPE_F32, { d, n_head_kv }, anchors));
    if (!run.supports(out)) {
        return -1.0;
    }
    const auto all = run.compute<float>(out);

    std::vector<float>  res;
    std::vector<double> ref;
    for (int h = 0; h < n_head_kv; ++h) {
        for (int i = segs[h].first; i < segs[h].first + segs[h].n; ++i) {
            const float * x = &k.values[int64_t(i)*d];

            res.push_back(all[i]);
            ref.push_back(-dot(d, x, &anchors[h*d])/sqrt(dot(d, x, x)));
        }
    }
    return nmse(res, ref);
}

// accumulated attention. n_seqs runs of n_tokens tokens each, whose own cells are the last ones
static double run_attn_sums(ggml_backend_t backend, ggml_type type, int d, int n_head_kv, int n_gqa, int n_tokens, int n_max, int n_seqs, float softcap) {
    int64_t n_rows;
    auto segs = make_segs(n_head_kv*n_seqs, n_tokens, n_max, n_rows);
    if (n_seqs > 1) {
        segs[0].n = 0;
    }

    const int n_head = n_head_kv*n_gqa;

    const rows k(type, d, n_rows);
    const auto q     = random_floats(d*n_head*n_tokens*n_seqs);
    const auto old   = random_floats(n_rows);
    const float scale = 2.0f/sqrtf(d);

    std::vector<int32_t> n_hidden;
    for (int i = 0; i < n_seqs*n_tokens; ++i) {
        n_hidden.push_back(n_tokens - 1 - i%n_tokens);
    }

    runner run(backend);
    ggml_tensor * sums = run.input(GGML_TYPE_F32, { 1, n_rows }, old);
    ggml_tensor * out  = ggml_attn_sums_ragged(run.ctx.get(), run.input(GGML_TYPE_F32, { d, n_head, n_tokens*n_seqs }, q), run.input(type, { d, n_rows }, k.data),
            run.input(GGML_TYPE_I32, { 2, n_head_kv, n_seqs }, segs), run.input(GGML_TYPE_I32, { n_tokens*n_seqs }, n_hidden), sums, scale, softcap);
    if (!run.supports(out)) {
        return -1.0;
    }
    const auto res = run.compute_inplace(out);

    std::vector<double> ref(old.begin(), old.end());
    for (size_t is = 0; is < segs.size(); ++is) {
        const seg & s = segs[is];
        for (int i = std::max(s.n - n_tokens, 0); i < s.n; ++i) {
            ref[s.first + i] = 0.0;
        }
        for (int t = is/n_head_kv*n_tokens; t < int(is/n_head_kv + 1)*n_tokens; ++t) {
            for (int h = is%n_head_kv*n_gqa; h < int(is%n_head_kv + 1)*n_gqa; ++h) {
                std::vector<double> p(std::max(s.n - n_hidden[t], 0));
                double sum = 0.0;
                for (size_t i = 0; i < p.size(); ++i) {
                    double x = scale*dot(d, &q[(size_t(t)*n_head + h)*d], &k.values[(s.first + i)*d]);
                    if (softcap != 0.0f) {
                        x = softcap*tanh(x/softcap);
                    }
                    sum += p[i] = exp(x);
                }
                for (size_t i = 0; i < p.size(); ++i) {
                    ref[s.first + i] += p[i]/sum/n_gqa;
                }
            }
        }
    }
    return nmse(res, ref);
}

// statistics of queries. n_seqs runs of n_tokens tokens each, of which every fifth is not counted
static double run_query_sums(ggml_backend_t backend, int d, int n_head, int n_tokens, int n_seqs, bool is_outer) {
    const int n_slots = n_seqs + 2;

    const auto q     = random_floats(d*n_head*n_tokens*n_seqs);
    const auto sum   = random_floats(d*n_head*n_slots);
    const auto outer = random_floats(d*d*n_head*n_slots);

    std::vector<float> counted;
    for (int i = 0; i < n_tokens*n_seqs; ++i) {
        counted.push_back(i % 5 != 1);
    }
    std::vector<int32_t> slots(n_slots);
    std::iota(slots.begin(), slots.end(), 0);
    std::shuffle(slots.begin(), slots.end(), rng);
    slots.resize(n_seqs);

    runner run(backend);
    ggml_tensor * touter = is_outer ? run.input(GGML_TYPE_F32, { d*d*n_head, n_slots }, outer) : nullptr;
    ggml_tensor * out    = ggml_query_sums_ragged(run.ctx.get(), run.input(GGML_TYPE_F32, { d, n_head, n_tokens*n_seqs }, q),
            run.input(GGML_TYPE_F32, { n_tokens, n_seqs }, counted), run.input(GGML_TYPE_I32, { n_seqs }, slots),
            run.input(GGML_TYPE_F32, { d*n_head, n_slots }, sum), touter);
    if (!run.supports(out)) {
        return -1.0;
    }
    auto res = run.compute_inplace(out);

    std::vector<double> ref(sum.begin(), sum.end());
    std::vector<double> ref_outer(outer.begin(), outer.end());
    for (int t = 0; t < n_tokens*n_seqs; ++t) {
        for (int i = 0; i < d*n_head && counted[t] != 0.0f; ++i) {
            const int64_t row = int64_t(slots[t/n_tokens])*n_head*d + i;

            ref[row] += q[t*n_head*d + i];
            for (int j = 0; j < d; ++j) {
                ref_outer[row*d + j] += double(q[t*n_head*d + i])*q[(t*n_head + i/d)*d + j];
            }
        }
    }
    if (!is_outer) {
        return nmse(res, ref);
    }
    std::vector<float> res_outer(outer.size());
    ggml_backend_tensor_get(touter, res_outer.data(), 0, ggml_nbytes(touter));

    return std::max(nmse(res, ref), nmse(res_outer, ref_outer));
}

static double run_value_norms(ggml_backend_t backend, ggml_type type, ggml_type type_w, int d, int n_head_kv, int n_gqa, int n_embd, int n_max, int n_rot) {
    int64_t n_rows;
    const auto segs = make_segs(n_head_kv, 1, n_max, n_rows);

    const int n_head = n_head_kv*n_gqa;

    const rows v(type, d, n_rows);
    const rows w(type_w, d*n_head, n_embd);
    const auto old = random_floats(n_rows);

    // a reflection: symmetric, and its own inverse
    std::vector<float> axis = random_floats(std::max(n_rot, 1));
    std::vector<float> rot(n_rot*n_rot);
    for (int i = 0; i < n_rot; ++i) {
        for (int j = 0; j < n_rot; ++j) {
            rot[i*n_rot + j] = (i == j) - 2.0*axis[i]*axis[j]/dot(n_rot, axis.data(), axis.data());
        }
    }

    runner run(backend);
    ggml_tensor * out = ggml_value_norms_ragged(run.ctx.get(), run.input(type, { d, n_rows }, v.data), run.input(type_w, { d*n_head, n_embd }, w.data),
            n_rot > 0 ? run.input(GGML_TYPE_F32, { n_rot, n_rot }, rot) : nullptr, run.input(GGML_TYPE_I32, { 2, n_head_kv }, segs),
            run.input(GGML_TYPE_F32, { 1, n_rows }, old));
    if (!run.supports(out)) {
        return -1.0;
    }
    const auto res = run.compute_inplace(out);

    std::vector<double> ref(old.begin(), old.end());
    for (int h = 0; h < n_head_kv; ++h) {
        for (int i = segs[h].first; i < segs[h].first + segs[h].n; ++i) {
            std::vector<float> x(&v.values[i*d], &v.values[i*d] + d);
            for (int j = 0; n_rot > 0 && j < d; ++j) {
                x[j] = dot(n_rot, &rot[j%n_rot*n_rot], &v.values[i*d + j/n_rot*n_rot]);
            }
            double sum = 0.0;
            for (int e = 0; e < n_embd; ++e) {
                for (int g = 0; g < n_gqa; ++g) {
                    sum += fabs(dot(d, x.data(), &w.values[(size_t(e)*n_head + h*n_gqa + g)*d]));
                }
            }
            ref[i] = sum/n_gqa;
        }
    }
    return nmse(res, ref);
}

struct score_case {
    ggml_scores_ragged kind;

    ggml_type type;
    int d;
    int n_head_kv;
    int n_gqa;
    int n_max;
    int n_q     = 0;
    int variant = 0;

    std::string name() const {
        char buf[256];
        snprintf(buf, sizeof(buf), "SCORES_RAGGED(kind=%d,type=%s,d=%d,n_head_kv=%d,n_gqa=%d,n_max=%d,n_q=%d,variant=%d)",
                kind, ggml_type_name(type), d, n_head_kv, n_gqa, n_max, n_q, variant);
        return buf;
    }
};

// scores of all KV heads but one
static double run_scores(ggml_backend_t backend, const score_case & c) {
    int64_t n_rows;
    auto all = make_segs(c.n_head_kv, 1, c.n_max, n_rows);

    const int n_head   = c.n_head_kv*c.n_gqa;
    const int d        = c.d;
    const int pos_last = 2*c.n_max;
    const int window   = c.n_q + 3;

    const int sink = 5;

    std::vector<std::array<int32_t, 3>> segs;
    std::vector<int32_t> pos;
    int n_longest = 0;
    for (int h = 0; h < c.n_head_kv; ++h) {
        if (h == 1) {
            continue;
        }
        segs.push_back({ h, all[h].first, all[h].n });
        n_longest = std::max(n_longest, all[h].n);

        // the latest ones are there, in any order
        std::vector<int32_t> some(pos_last + 1);
        for (int i = 0; i <= pos_last; ++i) {
            some[i] = i;
        }
        std::shuffle(some.begin(), some.end() - std::min(2*c.n_q, all[h].n), rng);
        std::reverse(some.begin(), some.end());
        some.resize(all[h].n);
        std::shuffle(some.begin(), some.end(), rng);
        pos.insert(pos.end(), some.begin(), some.end());
    }

    const rows k(c.type, d, n_rows);
    const rows v(c.type, d, n_rows);

    const auto q    = random_floats(d*n_head*std::max(c.n_q, 1));
    const auto past = random_floats(n_rows, 0.001f);

    // symmetric
    auto cov = random_floats(d*d*n_head, 0.1f/sqrtf(d));
    for (int h = 0; h < n_head; ++h) {
        for (int i = 0; i < d; ++i) {
            for (int j = 0; j < i; ++j) {
                cov[(h*d + i)*d + j] = cov[(h*d + j)*d + i];
            }
        }
    }
    std::vector<int32_t> pos_q;
    for (int i = 0; i < c.n_q; ++i) {
        pos_q.push_back(pos_last - c.n_q + 1 + i);
    }

    const float scale   = 1.0f/sqrtf(d);
    const float gamma   = c.variant == 1 ? 50.0f : 0.0f;
    const float softcap = c.variant == 2 ? 3.0f : 0.0f;
    const int   kernel  = c.variant == 3 ? 1 : 5;
    const int   block   = c.variant == 2 ? 0 : 16;

    runner run(backend);
    auto * ctx = run.ctx.get();

    ggml_tensor * tk    = run.input(c.type, { d, n_rows }, k.data);
    ggml_tensor * tv    = run.input(c.type, { d, n_rows }, v.data);
    ggml_tensor * tsegs = run.input(GGML_TYPE_I32, { 3, (int64_t) segs.size() }, segs);
    ggml_tensor * tpos  = run.input(GGML_TYPE_I32, { (int64_t) pos.size() }, pos);

    ggml_tensor * tpast = nullptr;
    ggml_tensor * out   = nullptr;

    std::vector<int32_t> n_first;
    const auto scores = random_floats(pos.size());

    switch (c.kind) {
        case GGML_SCORES_RAGGED_NORM:
            out = ggml_norm_scores_ragged(ctx, tk, c.variant == 0 ? nullptr : tv, tsegs, tpos, n_longest, block);
            break;
        case GGML_SCORES_RAGGED_WINDOW:
            tpast = c.variant == 1 ? run.input(GGML_TYPE_F32, { 1, n_rows }, past) : nullptr;
            out   = ggml_window_scores_ragged(ctx, run.input(GGML_TYPE_F32, { d, n_head, c.n_q }, q), run.input(GGML_TYPE_I32, { c.n_q }, pos_q), tk, tpast,
                    tsegs, tpos, c.n_head_kv, n_longest, pos_last, window, kernel, gamma, scale, softcap);
            break;
        case GGML_SCORES_RAGGED_EXPECTED:
            out = ggml_expected_scores_ragged(ctx, run.input(GGML_TYPE_F32, { d, n_head }, q), c.variant == 1 ? nullptr : run.input(GGML_TYPE_F32, { d, d, n_head }, cov),
                    tk, c.variant == 2 ? nullptr : tv, tsegs, tpos, c.n_head_kv, n_longest, sink, 0.02f, scale);
            break;
        case GGML_SCORES_RAGGED_LEVERAGE:
            out = ggml_leverage_scores_ragged(ctx, run.input(GGML_TYPE_F32, { d, n_head }, q), tk, tv, tsegs, tpos, c.n_head_kv, n_longest, sink,
                    c.variant == 1 ? 0.0f : 5.0f, 1e-6f);
            break;
        default:
            for (const auto & s : segs) {
                n_first.push_back(n_first.empty() ? 0 : s[2]/3);
            }
            out = ggml_critical_scores_ragged(ctx, run.input(GGML_TYPE_F32, { (int64_t) pos.size() }, scores), c.variant == 1 ? nullptr : run.input(GGML_TYPE_F32, { 1, n_rows }, past),
                    tsegs, run.input(GGML_TYPE_I32, { (int64_t) segs.size() }, n_first), n_longest, 1e-4f, 10.0f);
    }
    if (!run.supports(out)) {
        return -1.0;
    }
    const auto res = run.compute<float>(out);

    std::vector<float> past_new(n_rows);
    if (tpast) {
        ggml_backend_tensor_get(tpast, past_new.data(), 0, ggml_nbytes(tpast));
    }

    std::vector<double> ref(pos.size());

    double err_past = 0.0;

    size_t offs = 0;
    for (size_t is = 0; is < segs.size(); ++is) {
        const int h   = segs[is][0];
        const int row = segs[is][1];
        const int n   = segs[is][2];

        const int32_t * p = &pos[offs];
        double        * r = &ref[offs];

        const auto K = [&](int i) { return &k.values[int64_t(row + i)*d]; };
        const auto V = [&](int i) { return &v.values[int64_t(row + i)*d]; };

        std::vector<int> order(n);
        for (int i = 0; i < n; ++i) {
            order[i] = i;
        }
        std::sort(order.begin(), order.end(), [&](int a, int b) { return p[a] < p[b]; });

        // softmax over the cells, of those that take part
        const auto softmax = [&](std::vector<double> x, const auto & seen) {
            double sum = 0.0;
            for (int i = 0; i < n; ++i) {
                sum += x[i] = seen(i) ? exp(x[i]) : 0.0;
            }
            for (auto & cur : x) {
                cur = sum > 0.0 ? cur/sum : 0.0;
            }
            return x;
        };

        if (c.kind == GGML_SCORES_RAGGED_NORM) {
            for (int first = 0; first < n; first += block > 0 ? block : n) {
                const int last = block > 0 ? std::min(first + block, n) : n;
                double sum_k = 0.0;
                double sum_v = 0.0;
                for (int j = first; j < last; ++j) {
                    sum_k += dot(d, K(order[j]), K(order[j]));
                    sum_v += dot(d, V(order[j]), V(order[j]));
                }
                for (int j = first; j < last; ++j) {
                    const int i = order[j];
                    r[i] = c.variant == 0 ? -sqrt(dot(d, K(i), K(i))) : dot(d, K(i), K(i))/sum_k*dot(d, V(i), V(i))/sum_v;
                }
            }
        } else if (c.kind == GGML_SCORES_RAGGED_WINDOW) {
            std::vector<double> seen(n);
            for (int g = 0; g < c.n_gqa; ++g) {
                std::vector<std::vector<double>> attention;
                for (int t = 0; t < c.n_q; ++t) {
                    std::vector<double> x(n);
                    for (int i = 0; i < n; ++i) {
                        x[i] = scale*dot(d, K(i), &q[(size_t(t)*n_head + h*c.n_gqa + g)*d]);
                        x[i] = softcap > 0.0f ? softcap*tanh(x[i]/softcap) : x[i];
                    }
                    const bool none = p[order[0]] > pos_q[t];
                    attention.push_back(softmax(x, [&](int i) { return none || p[i] <= pos_q[t]; }));
                }
                for (int i = 0; i < n; ++i) {
                    double mean = 0.0;
                    double var  = 0.0;
                    for (const auto & a : attention) {
                        mean += a[i]/c.n_q;
                    }
                    for (const auto & a : attention) {
                        var += c.n_q > 1 ? (a[i] - mean)*(a[i] - mean)/(c.n_q - 1) : 0.0;
                    }
                    seen[i] += (mean + gamma*var)/c.n_gqa;
                }
            }
            std::vector<int> outside;
            for (int i : order) {
                if (pos_last - p[i] >= window) {
                    outside.push_back(i);
                }
            }
            for (int i : order) {
                const double before = tpast ? past[row + i] : 0.0;

                const auto it = std::find(outside.begin(), outside.end(), i);
                if (it == outside.end()) {
                    r[i] = before + 1.0 + 0.5*gamma + 1.0 - double(pos_last - p[i])/window;
                    continue;
                }
                const int j = it - outside.begin();
                for (int m = std::max(j - kernel/2, 0); m <= j + kernel/2 && m < (int) outside.size(); ++m) {
                    r[i] += seen[outside[m]]/kernel;
                }
                if (tpast) {
                    r[i] = std::max(r[i], before);
                    err_past = std::max(err_past, fabs(past_new[row + i] - r[i]));
                }
            }
        } else if (c.kind == GGML_SCORES_RAGGED_EXPECTED) {
            for (int g = 0; g < c.n_gqa; ++g) {
                const int ig = h*c.n_gqa + g;
                std::vector<double> x(n);
                for (int i = 0; i < n; ++i) {
                    x[i] = scale*dot(d, K(i), &q[ig*d]);
                    for (int j = 0; c.variant != 1 && j < d; ++j) {
                        x[i] += 0.5*scale*scale*K(i)[j]*dot(d, K(i), &cov[(size_t(ig)*d + j)*d]);
                    }
                }
                x = softmax(x, [&](int i) { return p[i] >= sink; });
                for (int i = 0; i < n; ++i) {
                    r[i] += x[i]/c.n_gqa;
                }
            }
            for (int i = 0; c.variant != 2 && i < n; ++i) {
                r[i] = (r[i] + 0.02f)*sqrt(dot(d, V(i), V(i)));
            }
        } else if (c.kind == GGML_SCORES_RAGGED_LEVERAGE) {
            for (int g = 0; g < c.n_gqa; ++g) {
                const float * m = &q[(h*c.n_gqa + g)*d];
                std::vector<double> w(n);
                double largest = -1.0;
                for (int i = 0; i < n; ++i) {
                    w[i] = dot(d, K(i), m)/sqrt(dot(d, K(i), K(i))*dot(d, m, m));
                    largest = p[i] >= sink ? std::max(largest, w[i]) : largest;
                }
                std::vector<double> a(d*d);
                for (int i = 0; i < n; ++i) {
                    w[i] = p[i] >= sink ? exp((c.variant == 1 ? 0.0 : 5.0)*(w[i] - largest)) : 0.0;
                    for (int x = 0; p[i] >= sink && x < d*d; ++x) {
                        a[x] += (w[i] + 1e-6)*V(i)[x/d]*V(i)[x%d];
                    }
                }
                for (int x = 0; x < d; ++x) {
                    a[x*d + x] += 1.0;
                }
                for (int i = 0; i < n; ++i) {
                    r[i] += w[i]*quadratic_form_of_inverse(d, a, V(i))/c.n_gqa;
                }
            }
        } else {
            std::sort(order.begin(), order.end(), [&](int a, int b) { return scores[offs + a] > scores[offs + b]; });
            for (int j = 0; j < n; ++j) {
                const int i = order[j];
                r[i] = j < n_first[is] ? 10.0f : c.variant == 1 ? 0.0f : (scores[offs + i] + 1e-4f)*past[row + i];
            }
        }
        offs += n;
    }

    return nmse(res, ref) + err_past*err_past;
}

static double run_bottom_k(ggml_backend_t backend, int n_segs, int n_max, int n_values) {
    int64_t n_rows;
    const auto segs = make_segs(n_segs, 1, n_max, n_rows);

    auto x = random_floats(n_rows);
    for (auto & value : x) {
        if (n_values > 0) {
            value = floorf(value*n_values); // many are equal
        }
        if (rng() % 500 == 0) {
            value = rng() % 2 ? NAN : INFINITY;
        }
    }

    std::vector<int32_t> segs3;
    int k_max = 1;
    for (const auto & s : segs) {
        const int k = rng() % 4 == 0 ? s.n : rng() % (s.n + 1);
        segs3.insert(segs3.end(), { s.first, s.n, k });
        k_max = std::max(k_max, k);
    }

    runner run(backend);
    ggml_tensor * out = ggml_bottom_k_ragged(run.ctx.get(), run.input(GGML_TYPE_F32, { n_rows }, x), run.input(GGML_TYPE_I32, { 3, n_segs }, segs3), k_max);
    if (!run.supports(out)) {
        return -1.0;
    }
    auto res = run.compute<int32_t>(out);

    double wrong = 0.0;
    for (int i = 0; i < n_segs; ++i) {
        const int k = segs3[3*i + 2];

        std::vector<int32_t> ref(segs[i].n);
        for (int j = 0; j < segs[i].n; ++j) {
            ref[j] = j;
        }
        std::stable_sort(ref.begin(), ref.end(), [&](int32_t a, int32_t b) {
            const float fa = x[segs[i].first + a];
            const float fb = x[segs[i].first + b];
            return std::isnan(fa) || std::isnan(fb) ? std::isnan(fa) && !std::isnan(fb) : fa < fb;
        });
        ref.resize(k);
        std::sort(ref.begin(), ref.end());
        ref.resize(k_max, -1);

        wrong += !std::equal(ref.begin(), ref.end(), res.begin() + i*k_max);
    }
    return wrong;
}

static bool test(ggml_backend_t backend) {
    int n_ok      = 0;
    int n_fail    = 0;
    int n_skipped = 0;

    const auto check = [&](const std::string & name, double err, double max_err) {
        if (err < 0.0) {
            n_skipped++;
        } else if (err <= max_err) {
            n_ok++;
        } else {
            n_fail++;
            printf("  %s: error %g > %g\n", name.c_str(), err, max_err);
        }
    };

    std::vector<attn_case> cases;
    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q5_1 }) {
        for (int d : { 64, 80, 96, 128, 256 }) {
            if (d % ggml_blck_size(type) != 0) {
                continue;
            }
            for (int n_tokens : { 1, 5, 33 }) {
                cases.push_back({ type, d, 3, 2, n_tokens, 700 });
            }
            cases.push_back({ type, d, 2, 3, 2, 300, 15.0f, true });
        }
        for (int n_gqa : { 1, 3, 4, 7, 8, 16 }) {
            cases.push_back({ type, 64, 2, n_gqa, 1, 2000 });
            cases.push_back({ type, 64, 2, n_gqa, 4, 300 });
        }
        cases.push_back({ type, 128,  8, 4,   1, 20000 });
        cases.push_back({ type, 128, 40, 1,   1, 500 });
        cases.push_back({ type, 128,  2, 4, 130, 3000, 0.0f, false, 256 });
        cases.push_back({ type,  64,  3, 4, 100, 1000, 0.0f, true,  512 });

        for (int d : { 64, 128, 256 }) {
            cases.push_back({ type, d, 3, 2,  1,  700, 0.0f, false,  64, 4 });
            cases.push_back({ type, d, 2, 5,  7,  700, 5.0f, true,   64, 3 });
        }
        cases.push_back({ type, 128, 2, 4, 40, 1000, 0.0f, false, 128, 3 });
        cases.push_back({ type, 128, 8, 4,  1,  400, 0.0f, false,  64, 32 });

        // as the cache does it: each head of K as a whole, V by 64
        for (int d : { 64, 128, 256 }) {
            for (int n_tokens : { 1, 2, 5, 33, 100 }) {
                cases.push_back({ type, d, 3, 4, n_tokens, 700, 0.0f, false, 128, 1, d, 64 });
            }
            cases.push_back({ type, d, 2, 7,  1, 2000, 0.0f, false,  64, 1, d, 64 });
            cases.push_back({ type, d, 2, 16, 1, 2000, 0.0f, true,   64, 1, d, 64 });
            cases.push_back({ type, d, 2, 3,  7,  700, 5.0f, true,   64, 3, d, 64 });
            cases.push_back({ type, d, 2, 2,  1,  300, 0.0f, false,  64, 1, d, 0 });
            cases.push_back({ type, d, 2, 2, 40,  300, 0.0f, false,  64, 1, 0, 64 });
        }
        cases.push_back({ type, 128, 8, 4,   1, 20000, 0.0f, false,  64, 1, 128, 64 });
        cases.push_back({ type, 128, 2, 4, 130,  3000, 0.0f, false, 256, 1, 128, 64 });
        cases.push_back({ type,  96, 2, 2,   3,   300, 0.0f, false,  64, 1,  32, 16 });
    }
    for (const auto & c : cases) {
        check(c.name(), run_attn(backend, c), c.type == GGML_TYPE_F32 ? 1e-9 : 1e-6);
    }

    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q5_1 }) {
        for (int d : { 64, 80, 96, 128, 256 }) {
            if (d % ggml_blck_size(type) != 0) {
                continue;
            }
            for (int n_tokens : { 1, 3, 70 }) {
                for (bool rot : { false, true }) {
                    if (rot && d % 64 != 0) {
                        continue;
                    }
                    char name[256];
                    snprintf(name, sizeof(name), "STORE_RAGGED(type=%s,d=%d,n_tokens=%d,rot=%d)", ggml_type_name(type), d, n_tokens, rot);
                    // a number between two others may be rounded to either
                    check(name, run_store(backend, type, d, 3, n_tokens, rot ? d : 0, rot ? 64 : 0), ggml_is_quantized(type) ? 1e-5 : 1e-7);
                }
            }
        }
    }

    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        for (int d : { 64, 80, 96, 128, 256 }) {
            if (d % ggml_blck_size(type) == 0) {
                check(std::string("KEYDIFF_RAGGED(") + ggml_type_name(type) + "," + std::to_string(d) + ")", run_keydiff(backend, type, d, 5, 3000), 1e-9);
            }
        }
    }

    for (int d : { 64, 80, 256 }) {
        for (int n_tokens : { 1, 2, 200 }) {
            for (int n_seqs : { 1, 3 }) {
                for (bool is_outer : { false, true }) {
                    char name[256];
                    snprintf(name, sizeof(name), "SCORES_RAGGED(query_sums,d=%d,n_tokens=%d,n_seqs=%d,outer=%d)", d, n_tokens, n_seqs, is_outer);
                    check(name, run_query_sums(backend, d, 3, n_tokens, n_seqs, is_outer), 1e-12);
                }
            }
        }
    }

    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (int d : { 64, 96, 128 }) {
            for (int n_tokens : { 1, 3, 100 }) {
                for (int n_seqs : { 1, 3 }) {
                    char name[256];
                    snprintf(name, sizeof(name), "SCORES_RAGGED(attn_sums,type=%s,d=%d,n_tokens=%d,n_seqs=%d)", ggml_type_name(type), d, n_tokens, n_seqs);
                    check(name, run_attn_sums(backend, type, d, 3, 1 + d/64, n_tokens, 700, n_seqs, n_tokens == 3 ? 4.0f : 0.0f), 1e-9);
                }
            }
        }
        check("SCORES_RAGGED(value_norms)",      run_value_norms(backend, type, GGML_TYPE_F16, 64, 3, 3, 576, 200, 0),  1e-9);
        check("SCORES_RAGGED(value_norms, rot)", run_value_norms(backend, type, GGML_TYPE_F32, 128, 2, 2, 70, 100, 64), 1e-9);

        for (int variant : { 0, 1, 2, 3 }) {
            std::vector<score_case> cases = {
                { GGML_SCORES_RAGGED_NORM,     type,  64, 4, 1, 900,  0, variant },
                { GGML_SCORES_RAGGED_WINDOW,   type,  64, 3, 3, 900, 32, variant },
                { GGML_SCORES_RAGGED_WINDOW,   type, 128, 2, 1, 300,  5, variant },
                { GGML_SCORES_RAGGED_WINDOW,   type,  96, 2, 7,  20, 16, variant },
                { GGML_SCORES_RAGGED_EXPECTED, type,  64, 3, 3, 900,  0, variant },
                { GGML_SCORES_RAGGED_EXPECTED, type, 128, 2, 4, 150,  0, variant },
                { GGML_SCORES_RAGGED_CRITICAL, type,  64, 4, 1, 900,  0, variant },
            };
            if (variant < 2) {
                cases.push_back({ GGML_SCORES_RAGGED_LEVERAGE, type, 64, 3, 3, 300, 0, variant });
                cases.push_back({ GGML_SCORES_RAGGED_LEVERAGE, type, 96, 2, 2,  70, 0, variant });
            }
            for (const auto & c : cases) {
                check(c.name(), run_scores(backend, c), c.kind == GGML_SCORES_RAGGED_LEVERAGE ? 1e-8 : 1e-9);
            }
        }
    }

    for (int i = 0; i < 20; ++i) {
        check("BOTTOM_K_RAGGED(" + std::to_string(i) + ")", run_bottom_k(backend, 1 + i, i % 2 ? 100 : 20000, i % 3 ? 0 : i % 2 ? 3 : 100), 0.0);
    }

    printf("%s: %d passed, %d failed, %d not supported\n", ggml_backend_name(backend), n_ok, n_fail, n_skipped);

    return n_fail == 0;
}

static double time_ms(ggml_backend_t backend, ggml_cgraph * gf) {
    std::vector<double> times;
    for (int i = 0; i < 25; ++i) {
        ggml_backend_synchronize(backend);
        const auto t0 = std::chrono::steady_clock::now();
        for (int j = 0; j < 4; ++j) {
            ggml_backend_graph_compute_async(backend, gf);
        }
        ggml_backend_synchronize(backend);
        const auto t1 = std::chrono::steady_clock::now();
        times.push_back(std::chrono::duration<double, std::milli>(t1 - t0).count()/4);
    }
    std::sort(times.begin() + 5, times.end()); // the first ones warm up
    return times[15];
}

static void perf(ggml_backend_t backend, int n_cells, int n_layer, int n_tokens, bool even) {
    const int d         = 128;
    const int n_head_kv = 8;
    const int n_gqa     = 4;

    // kept fractions of the heads of SmolLM2-135M at ratio 0.2, quantiles
    static const float quantiles[] = {
        0.0303f, 0.0318f, 0.0342f, 0.0361f, 0.0407f, 0.0420f, 0.0454f, 0.0465f, 0.0504f, 0.0761f, 0.0998f,
        0.1134f, 0.1344f, 0.1815f, 0.2184f, 0.2895f, 0.3810f, 0.4454f, 0.5747f, 0.6828f, 0.8347f,
    };

    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        for (int kind : { 0, 1, 2 }) { // the last one rotates
            const bool ragged = kind > 0;
            const bool rot    = kind > 1;
            if (type == GGML_TYPE_F16 ? rot : type == GGML_TYPE_Q4_0 && !ragged) {
                continue;
            }
            runner run(backend);
            auto * ctx = run.ctx.get();

            std::vector<double> fractions;
            double sum = 0.0;
            for (int i = 0; i < n_layer*n_head_kv; ++i) {
                fractions.push_back(even ? 1.0f : quantiles[rng() % 21]);
                sum += fractions.back();
            }


            std::vector<ggml_tensor *> outs;
            std::vector<ggml_tensor *> kvs;

            double bytes = 0.0;
            for (int il = 0; il < n_layer; ++il) {
                ggml_tensor * q = run.input(GGML_TYPE_F32, { d, n_head_kv*n_gqa, n_tokens }, random_floats(d*n_head_kv*n_gqa*n_tokens));

                if (ragged) {
                    std::vector<seg> segs;
                    int32_t n_rows = 0;
                    for (int h = 0; h < n_head_kv; ++h) {
                        segs.push_back({ n_rows, std::max<int32_t>(64, fractions[il*n_head_kv + h]/sum*n_layer*n_head_kv*n_cells) });
                        n_rows += segs.back().n;
                    }
                    kvs.push_back(ggml_new_tensor_2d(ctx, type, d, n_rows));
                    kvs.push_back(ggml_new_tensor_2d(ctx, type, d, n_rows));
                    outs.push_back(ggml_flash_attn_ragged(ctx, q, kvs[2*il], kvs[2*il + 1], run.input(GGML_TYPE_I32, { 2, n_head_kv }, segs),
                            run.input(GGML_TYPE_I32, { n_tokens }, std::vector<int32_t>(n_tokens, 0)), nullptr, 1.0f/sqrtf(d), 0.0f, rot ? d : 0, rot ? 64 : 0));
                } else {
                    kvs.push_back(ggml_new_tensor_3d(ctx, type, d, n_head_kv, n_cells));
                    kvs.push_back(ggml_new_tensor_3d(ctx, type, d, n_head_kv, n_cells));
                    outs.push_back(ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3),
                            ggml_permute(ctx, kvs[2*il], 0, 2, 1, 3), ggml_permute(ctx, kvs[2*il + 1], 0, 2, 1, 3),
                            run.input(GGML_TYPE_F16, { n_cells, n_tokens }, std::vector<ggml_fp16_t>(size_t(n_cells)*n_tokens, 0)), 1.0f/sqrtf(d), 0.0f, 0.0f));
                }
                bytes += ggml_nbytes(kvs[2*il]) + ggml_nbytes(kvs[2*il + 1]);
            }

            run.prepare(outs);

            // random data, the same for all layers
            const rows some(type, d, 4096);
            for (ggml_tensor * t : kvs) {
                for (size_t i = 0; i < ggml_nbytes(t); i += some.data.size()) {
                    ggml_backend_tensor_set(t, some.data.data(), i, std::min(some.data.size(), ggml_nbytes(t) - i));
                }
            }

            const double ms = time_ms(backend, run.gf);
            printf("%s %5s %-8s %d cells x %d layers, %d tokens: %8.3f ms, %6.0f GB/s, %6.1f TFLOP/s\n", ggml_backend_name(backend), ggml_type_name(type),
                    rot ? "rotated" : ragged ? "ragged" : "uniform", n_cells, n_layer, n_tokens, ms, bytes/ms*1e-6, 4.0*d*n_gqa*n_head_kv*n_cells*n_layer*n_tokens/ms*1e-9);

            if (rot || (ragged && type == GGML_TYPE_F16)) {
                runner storing(backend);

                std::vector<int32_t> idxs(n_head_kv*n_tokens);
                std::iota(idxs.begin(), idxs.end(), 0);

                std::vector<ggml_tensor *> stores;
                for (int il = 0; il < n_layer; ++il) {
                    const auto cur = [&]() {
                        return storing.input(GGML_TYPE_F32, { d, n_head_kv, n_tokens }, random_floats(d*n_head_kv*n_tokens));
                    };
                    stores.push_back(ggml_store_ragged(storing.ctx.get(), cur(), cur(), kvs[2*il], kvs[2*il + 1],
                            storing.input(GGML_TYPE_I32, { n_head_kv*n_tokens }, idxs), rot ? d : 0, rot ? 64 : 0));
                }
                storing.prepare(stores);

                printf("%s %5s stores   %d layers, %d tokens: %8.3f ms\n", ggml_backend_name(backend), ggml_type_name(type),
                        n_layer, n_tokens, time_ms(backend, storing.gf));
            }

            if (ragged && !rot) {
                runner run_score(backend);

                // as the cache calls it
                ggml_tensor * anchors = run_score.input(GGML_TYPE_F32, { d, n_head_kv }, random_floats(d*n_head_kv));

                std::vector<ggml_tensor *> scores;
                for (int il = 0; il < n_layer; ++il) {
                    scores.push_back(ggml_keydiff_ragged(run_score.ctx.get(), kvs[2*il], outs[il]->src[3], anchors));
                }
                run_score.prepare(scores);

                const double ms_score = time_ms(backend, run_score.gf);
                printf("%s %5s scores   %d cells x %d layers: %8.3f ms, %6.0f GB/s\n", ggml_backend_name(backend), ggml_type_name(type),
                        n_cells, n_layer, ms_score, bytes/2/ms_score*1e-6); // K alone
            }
            fflush(stdout);
        }
    }
}

int main(int argc, char ** argv) {
    ggml_backend_load_all();

    const std::string mode = argc > 1 ? argv[1] : "test";
    const auto arg = [&](int i, int def) { return argc > i ? atoi(argv[i]) : def; };

    bool ok = true;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t dev = ggml_backend_dev_get(i);
        ggml_backend_ptr backend { ggml_backend_dev_init(dev, nullptr) };

        if (mode == "perf") {
            if (ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_GPU) {
                perf(backend.get(), arg(2, 26112), arg(3, 32), arg(4, 1), arg(5, 0));
            }
        } else {
            ok = test(backend.get()) && ok;
        }
    }
    return ok ? 0 : 1;
}
