#include "llama-lukv-params.h"

#include "llama-impl.h"
#include "llama-hparams.h"
#include "llama-model-loader.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

static constexpr uint32_t LUKV_VERSION = 1;

// the mean of a table may differ from its ratio by this much
static constexpr float LUKV_RATIO_TOLERANCE = 0.01f;

//
// metadata keys
//

namespace {

// looks up a key in the overrides first, then in the file
struct lukv_reader {
    const llama_model_loader & ml;

    const llama_model_kv_override * find_override(const char * key) const {
        const auto it = ml.kv_overrides.find(key);

        return it == ml.kv_overrides.end() ? nullptr : &it->second;
    }

    int64_t find(const char * key, gguf_type type) const {
        const int64_t id = gguf_find_key(ml.metadata, key);
        if (id >= 0 && gguf_get_kv_type(ml.metadata, id) != type) {
            throw std::runtime_error(format("%s has the type %s but must be %s",
                    key, gguf_type_name(gguf_get_kv_type(ml.metadata, id)), gguf_type_name(type)));
        }

        return id;
    }

    static std::runtime_error bad_override(const char * key, const char * type) {
        return std::runtime_error(format("the override of %s must be of the type %s, e.g. --override-kv %s=%s:...", key, type, key, type));
    }

    bool get(const char * key, bool & res) const {
        if (const auto * o = find_override(key)) {
            if (o->tag != LLAMA_KV_OVERRIDE_TYPE_BOOL) {
                throw bad_override(key, "bool");
            }
            res = o->val_bool;
            return true;
        }

        const int64_t id = find(key, GGUF_TYPE_BOOL);
        if (id >= 0) {
            res = gguf_get_val_bool(ml.metadata, id);
        }
        return id >= 0;
    }

    bool get(const char * key, uint32_t & res) const {
        if (const auto * o = find_override(key)) {
            if (o->tag != LLAMA_KV_OVERRIDE_TYPE_INT || o->val_i64 < 0 || o->val_i64 > std::numeric_limits<int32_t>::max()) {
                throw bad_override(key, "int");
            }
            res = o->val_i64;
            return true;
        }

        const int64_t id = find(key, GGUF_TYPE_UINT32);
        if (id >= 0) {
            res = gguf_get_val_u32(ml.metadata, id);
        }
        return id >= 0;
    }

    bool get(const char * key, float & res) const {
        if (const auto * o = find_override(key)) {
            switch (o->tag) {
                case LLAMA_KV_OVERRIDE_TYPE_FLOAT: res = o->val_f64; break;
                case LLAMA_KV_OVERRIDE_TYPE_INT:   res = o->val_i64; break; // Python's 1 for 1.0
                default: throw bad_override(key, "float");
            }
            return true;
        }

        const int64_t id = find(key, GGUF_TYPE_FLOAT32);
        if (id >= 0) {
            res = gguf_get_val_f32(ml.metadata, id);
        }
        return id >= 0;
    }

    bool get(const char * key, std::string & res) const {
        if (const auto * o = find_override(key)) {
            if (o->tag != LLAMA_KV_OVERRIDE_TYPE_STR) {
                throw bad_override(key, "str");
            }
            res = o->val_str;
            return true;
        }

        const int64_t id = find(key, GGUF_TYPE_STRING);
        if (id >= 0) {
            res = gguf_get_val_str(ml.metadata, id);
        }
        return id >= 0;
    }

    bool get(const char * key, std::vector<float> & res) const {
        const int64_t id = find(key, GGUF_TYPE_ARRAY);
        if (id < 0) {
            return false;
        }
        if (gguf_get_arr_type(ml.metadata, id) != GGUF_TYPE_FLOAT32) {
            throw std::runtime_error(format("%s must be an array of float32", key));
        }

        const float * data = (const float *) gguf_get_arr_data(ml.metadata, id);
        res.assign(data, data + gguf_get_arr_n(ml.metadata, id));
        return true;
    }

    template <typename T>
    void require(const char * key, T & res) const {
        if (!get(key, res)) {
            throw std::runtime_error(format("%s is missing", key));
        }
    }
};

void check_fractions(const char * key, const float * data, size_t n, float ratio) {
    double sum = 0.0;
    for (size_t i = 0; i < n; ++i) {
        if (!(data[i] >= 0.0f && data[i] <= 1.0f)) {
            throw std::runtime_error(format("%s holds %f, which is not in [0, 1]", key, data[i]));
        }
        sum += data[i];
    }

    if (std::fabs(sum/n - ratio) > LUKV_RATIO_TOLERANCE) {
        throw std::runtime_error(format("%s keeps %.4f of the cache on average, but is meant for the ratio %.4f", key, sum/n, ratio));
    }
}

// the budgets at a ratio on the grid are the row of the profile, between two ratios they are interpolated
// the mean of each row is its ratio, hence so is the mean of the result
std::vector<float> interpolate(const std::vector<float> & ratios, const std::vector<float> & budgets, float ratio, size_t n) {
    // ratio 0 keeps nothing and ratio 1 keeps everything, whatever the grid's ends are
    const auto row = [&](size_t i, size_t j) {
        return i == 0 ? 0.0f : i > ratios.size() ? 1.0f : budgets[(i - 1)*n + j];
    };
    const auto pos = [&](size_t i) {
        return i == 0 ? 0.0f : i > ratios.size() ? 1.0f : ratios[i - 1];
    };

    size_t i1 = 1;
    while (i1 <= ratios.size() && ratios[i1 - 1] < ratio) {
        i1++;
    }

    const float x0 = pos(i1 - 1);
    const float x1 = pos(i1);
    const float w  = x1 > x0 ? (ratio - x0)/(x1 - x0) : 1.0f;

    std::vector<float> res(n);
    for (size_t j = 0; j < n; ++j) {
        res[j] = (1.0f - w)*row(i1 - 1, j) + w*row(i1, j);
    }

    return res;
}

llama_lukv_metric_params load_metric_params(const lukv_reader & rd, const std::string & name) {
    const auto * metric = llama_lukv_metric::find(name);
    if (!metric) {
        throw std::runtime_error(format("lukv.metric is '%s', but this build knows only: %s", name.c_str(), llama_lukv_metric::names().c_str()));
    }

    // those in the file are for the metric in the file
    const bool in_file = !rd.find_override("lukv.metric");

    llama_lukv_metric_params res;
    for (const auto & param : metric->params) {
        const std::string key = std::string("lukv.metric.") + param.name;

        res[param.name] = param.value;
        if (!in_file && !rd.find_override(key.c_str())) {
            continue;
        }
        if (param.integer) {
            uint32_t value = param.value;
            rd.get(key.c_str(), value);
            res[param.name] = value;
        } else {
            float value = param.value;
            rd.get(key.c_str(), value);
            res[param.name] = value;
        }
    }
    metric->check(res);

    const auto check_known = [&](const std::string & key) {
        static const std::string prefix = "lukv.metric.";
        if (key.compare(0, prefix.size(), prefix) == 0 && res.count(key.substr(prefix.size())) == 0) {
            throw std::runtime_error(format("%s is not a parameter of the metric %s", key.c_str(), name.c_str()));
        }
    };
    for (const auto & [key, _] : rd.ml.kv_overrides) {
        check_known(key);
    }
    for (int64_t i = 0; in_file && i < gguf_get_n_kv(rd.ml.metadata); ++i) {
        check_known(gguf_get_key(rd.ml.metadata, i));
    }

    return res;
}

std::shared_ptr<const llama_lukv_weights> load_weights(const lukv_reader & rd, size_t n_heads, uint32_t n_embd_k, uint32_t n_embd_v) {
    auto res = std::make_shared<llama_lukv_weights>();

    uint32_t n_embd_key = 0;
    rd.require("lukv.scorer.key_length", n_embd_key);
    rd.require("lukv.scorer.hidden",     res->n_hidden);
    if (n_embd_key != n_embd_k) {
        throw std::runtime_error(format("lukv.scorer.key_length is %u, but the model has keys of %u", n_embd_key, n_embd_k));
    }

    const auto require = [&](const char * key, std::vector<float> & data, size_t n) {
        rd.require(key, data);
        if (n == 0 || data.size() != n_heads*n) {
            throw std::runtime_error(format("%s has %zu values, but the model and lukv.scorer.hidden ask for %zu", key, data.size(), n_heads*n));
        }
        for (float x : data) {
            if (!std::isfinite(x)) {
                throw std::runtime_error(format("%s holds %f", key, x));
            }
        }
    };
    require("lukv.scorer.input",  res->input,  size_t(res->n_hidden)*(llama_lukv_weights::N_FEATURES + n_embd_k + n_embd_v));
    require("lukv.scorer.bias",   res->bias,   res->n_hidden);
    require("lukv.scorer.output", res->output, res->n_hidden);
    require("lukv.scorer.skip",   res->skip,   llama_lukv_weights::N_FEATURES);

    return res;
}

} // namespace

std::unique_ptr<llama_lukv_params> llama_lukv_params::load(const llama_model_loader & ml, const llama_hparams & hparams) {
    const lukv_reader rd { ml };

    const bool has_table    = gguf_find_key(ml.metadata, "lukv.version") >= 0 || gguf_find_key(ml.metadata, "lukv.budget") >= 0;
    const bool has_override = rd.find_override("lukv.ratio") != nullptr;

    if (!has_table && !has_override) {
        return nullptr;
    }

    try {
        bool enabled = true;
        rd.get("lukv.enabled", enabled);
        if (!enabled) {
            return nullptr;
        }

        auto res = std::make_unique<llama_lukv_params>();

        rd.require("lukv.ratio", res->ratio);
        if (!(res->ratio > 0.0f && res->ratio <= 1.0f)) {
            throw std::runtime_error(format("lukv.ratio is %f, but must be in (0, 1]", res->ratio));
        }

        rd.get("lukv.sink",   res->sink);
        rd.get("lukv.recent", res->recent);
        if (res->recent == 0 || res->recent > (1u << 20) || res->sink > (1u << 20)) {
            throw std::runtime_error("lukv.recent must be in [1, 1048576] and lukv.sink at most 1048576");
        }

        rd.get("lukv.metric", res->metric);
        res->metric_params = load_metric_params(rd, res->metric);

        std::string policy = "capacity";
        rd.get("lukv.policy", policy);
        if (policy == "capacity") {
            res->policy = LLAMA_LUKV_POLICY_CAPACITY;
        } else if (policy == "prefill") {
            res->policy = LLAMA_LUKV_POLICY_PREFILL;
        } else {
            throw std::runtime_error(format("lukv.policy is '%s', but must be 'capacity' or 'prefill'", policy.c_str()));
        }

        if (llama_lukv_metric::find(res->metric)->needs(res->metric_params).repeated && res->policy != LLAMA_LUKV_POLICY_PREFILL) {
            throw std::runtime_error(format("lukv.policy is '%s', but the metric %s needs 'prefill'", policy.c_str(), res->metric.c_str()));
        }

        res->n_layer   = hparams.n_layer_all;
        res->n_head_kv = hparams.n_head_kv(0);

        const size_t n_heads = size_t(res->n_layer)*res->n_head_kv;

        if (llama_lukv_metric::find(res->metric)->needs(res->metric_params).weights) {
            res->weights = load_weights(rd, n_heads, hparams.n_embd_head_k(), hparams.n_embd_head_v());
        }

        if (!has_table) {
            res->budget.assign(n_heads, res->ratio);
            return res;
        }

        uint32_t version = 0;
        rd.require("lukv.version", version);
        if (version != LUKV_VERSION) {
            throw std::runtime_error(format("lukv.version is %u, but this build reads only %u", version, LUKV_VERSION));
        }

        uint32_t n_layer   = 0;
        uint32_t n_head_kv = 0;
        rd.require("lukv.layers",   n_layer);
        rd.require("lukv.heads_kv", n_head_kv);
        if (n_layer != res->n_layer || n_head_kv != res->n_head_kv) {
            throw std::runtime_error(format("lukv.layers x lukv.heads_kv is %u x %u, but the model has %u x %u",
                    n_layer, n_head_kv, res->n_layer, res->n_head_kv));
        }

        rd.require("lukv.budget", res->budget);
        if (res->budget.size() != n_heads) {
            throw std::runtime_error(format("lukv.budget has %zu values, but the model has %zu heads", res->budget.size(), n_heads));
        }

        // the table is for the ratio in the file, an override asks the profile for another one
        float ratio_table = res->ratio;
        const int64_t id = rd.find("lukv.ratio", GGUF_TYPE_FLOAT32);
        if (id >= 0) {
            ratio_table = gguf_get_val_f32(ml.metadata, id);
        }
        check_fractions("lukv.budget", res->budget.data(), n_heads, ratio_table);

        std::vector<float> ratios;
        std::vector<float> budgets;
        rd.get("lukv.profile.ratios", ratios);
        rd.get("lukv.profile.budget", budgets);
        if (budgets.size() != ratios.size()*n_heads) {
            throw std::runtime_error(format("lukv.profile.budget has %zu values, but lukv.profile.ratios and the model ask for %zu",
                    budgets.size(), ratios.size()*n_heads));
        }
        for (size_t i = 0; i < ratios.size(); ++i) {
            if (!(ratios[i] > (i == 0 ? 0.0f : ratios[i - 1]) && ratios[i] <= 1.0f)) {
                throw std::runtime_error("lukv.profile.ratios must ascend within (0, 1]");
            }
        }
        for (size_t i = 0; i < ratios.size(); ++i) {
            check_fractions("lukv.profile.budget", &budgets[i*n_heads], n_heads, ratios[i]);
        }

        if (std::fabs(res->ratio - ratio_table) > 1e-6f) {
            if (ratios.empty()) {
                throw std::runtime_error(format("lukv.ratio is overridden with %f, but the file has no lukv.profile.* to take other budgets than for %f from",
                        res->ratio, ratio_table));
            }
            res->budget = interpolate(ratios, budgets, res->ratio, n_heads);
        }

        return res;
    } catch (const std::runtime_error & err) {
        throw std::runtime_error(format("LU-KV: %s. Embed the model again (lukv-gguf embed), or load it with --override-kv lukv.enabled=bool:false",
                err.what()));
    }
}

std::vector<uint32_t> llama_lukv_params::get_n_cells(uint32_t n_tokens) const {
    const size_t n = budget.size();

    const double lo = std::min(n_cells_min(), n_tokens);
    const double hi = n_tokens;

    const double target = std::round(double(ratio)*n_tokens*n);

    // water-filling: the wanted sizes are scaled until the sum of the clamped ones is the target
    // note: the small term lets heads with a budget of zero take part when the others are full
    const auto size_of = [&](size_t i, double scale) {
        return std::min(hi, std::max(lo, scale*(double(budget[i])*n_tokens + 1e-3)));
    };
    const auto sum_of = [&](double scale) {
        double sum = 0.0;
        for (size_t i = 0; i < n; ++i) {
            sum += size_of(i, scale);
        }
        return sum;
    };

    double s0 = 0.0;
    double s1 = 1.0;
    while (sum_of(s1) < target && s1 < 1e9) {
        s1 *= 2.0;
    }
    for (int iter = 0; iter < 100; ++iter) {
        const double s = 0.5*(s0 + s1);
        (sum_of(s) < target ? s0 : s1) = s;
    }

    // largest remainders
    std::vector<uint32_t> res(n);
    std::vector<std::pair<double, size_t>> rest(n);

    int64_t n_left = (int64_t) target;
    for (size_t i = 0; i < n; ++i) {
        const double size = size_of(i, s1);

        res[i]  = (uint32_t) size;
        rest[i] = { res[i] - size, i };
        n_left -= res[i];
    }
    std::sort(rest.begin(), rest.end());
    for (size_t i = 0; i < n && n_left > 0; ++i) {
        if (res[rest[i].second] < n_tokens) {
            res[rest[i].second]++;
            n_left--;
        }
    }

    return res;
}
