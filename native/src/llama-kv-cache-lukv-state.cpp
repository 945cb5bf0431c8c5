#include "llama-kv-cache-lukv.h"

#include "llama-impl.h"
#include "llama-kv-cache-lukv-impl.h"
#include "llama-lukv-state.h"
#include "llama-lukv.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

static constexpr uint32_t STATE_MAGIC = 0x6c756b79; // of the format: another one for each change of it

//
// state
//

// FNV-1a
static void hash_add(uint64_t & hash, const void * data, size_t size) {
    for (size_t i = 0; i < size; ++i) {
        hash = (hash ^ ((const uint8_t *) data)[i])*0x100000001b3;
    }
}

uint64_t llama_kv_cache_lukv::hash_metric() const {
    uint64_t res = 0xcbf29ce484222325;

    hash_add(res, params.metric.data(), params.metric.size());
    for (const auto & [name, value] : params.metric_params) {
        hash_add(res, name.data(), name.size());
        hash_add(res, &value, sizeof(value));
    }
    hash_add(res, &params.sink,   sizeof(params.sink));
    hash_add(res, &params.recent, sizeof(params.recent));
    hash_add(res, &params.policy, sizeof(params.policy));

    return res;
}

uint64_t llama_kv_cache_lukv::hash_budget() const {
    uint64_t res = 0xcbf29ce484222325;

    hash_add(res, params.budget.data(), params.budget.size()*sizeof(float));

    return res;
}

static void write_pos(llama_io_write_i & io, const std::vector<llama_pos> & pos) {
    llama_lukv_write<uint32_t>(io, pos.size());
    io.write(pos.data(), pos.size()*sizeof(llama_pos));
}

// positions as they are cached: within the range of the sequence, or a hole
static std::vector<llama_pos> read_pos(llama_io_read_i & io, llama_pos pos_min, llama_pos pos_max, uint32_t n_max) {
    const uint32_t n = llama_lukv_read<uint32_t>(io);
    if (n > n_max) {
        throw std::runtime_error(format("it has %u cells for a head, but there is room for %u", n, n_max));
    }

    std::vector<llama_pos> res(n);
    io.read(res.data(), n*sizeof(llama_pos));

    for (llama_pos pos : res) {
        if (pos != -1 && (pos < pos_min || pos > pos_max)) {
            throw std::runtime_error(format("it has the position %d, which is not in [%d, %d]", pos, pos_min, pos_max));
        }
    }
    return res;
}

void llama_kv_cache_lukv::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    GGML_UNUSED(flags);

    llama_lukv_write<uint32_t>(io, STATE_MAGIC);
    llama_lukv_write<uint32_t>(io, params.n_layer);
    llama_lukv_write<uint32_t>(io, params.n_head_kv);
    llama_lukv_write<uint32_t>(io, type_k);
    llama_lukv_write<uint32_t>(io, type_v);
    llama_lukv_write<uint64_t>(io, hash_metric());
    llama_lukv_write<uint64_t>(io, hash_budget());

    const llama_seq_id source = get_source(seq_id);

    seq_ids_t ids;
    for (const auto & [id, _] : seqs) {
        if (seq_id < 0 || id == source) {
            ids.push_back(id);
        }
    }

    // one of them is a sequence of its own when it is restored
    const sources_t twins_all = seq_id < 0 ? twins : sources_t();

    llama_lukv_write<uint32_t>(io, ids.size());
    llama_lukv_write<uint32_t>(io, twins_all.size());
    for (const auto & [twin, id] : twins_all) {
        llama_lukv_write(io, twin);
        llama_lukv_write(io, id);
    }

    // all that decides where the cells go comes before them
    for (llama_seq_id id : ids) {
        const auto & seq = seqs.at(id);

        llama_lukv_write(io, id);
        llama_lukv_write(io, seq.pos_min);
        llama_lukv_write(io, seq.pos_max);
        // for all sequences together only: one of them may find others beside it when it is restored
        llama_lukv_write<uint32_t>(io, seq_id < 0 ? seq.quota  : 0);
        llama_lukv_write<uint32_t>(io, seq_id < 0 ? seq.n_room : 0);
        llama_lukv_write<uint32_t>(io, seq.prefill_done + 2*seq.is_recorded);

        write_pos(io, seq.pos_recent);
        for (const auto & seg : seq.segs) {
            write_pos(io, seg.pos);
        }
    }

    for (llama_seq_id id : ids) {
        const auto & seq = seqs.at(id);

        queries->state_write(io, seq.queries);

        const auto n_cells = n_cells_of(seq);

        for_each_head([&](const kv_layer & layer, uint32_t, size_t i) {
            for (ggml_tensor * t : layer.tensors()) {
                llama_lukv_write_rows(io, t, seq.segs[i].offs, n_cells[i]);
            }
        });
    }
}

void llama_kv_cache_lukv::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    GGML_UNUSED(flags);

    seq_rm(seq_id, -1, -1);

    seq_ids_t ids;

    try {
        if (llama_lukv_read<uint32_t>(io) != STATE_MAGIC) {
            throw std::runtime_error("it was saved without LU-KV, or by another version of it");
        }
        if (llama_lukv_read<uint32_t>(io) != params.n_layer || llama_lukv_read<uint32_t>(io) != params.n_head_kv ||
                llama_lukv_read<uint32_t>(io) != (uint32_t) type_k || llama_lukv_read<uint32_t>(io) != (uint32_t) type_v) {
            throw std::runtime_error("it was saved for another model or another type of the KV cache");
        }
        if (llama_lukv_read<uint64_t>(io) != hash_metric()) {
            throw std::runtime_error("it was saved with another metric, policy, lukv.sink or lukv.recent: use those that it was saved with");
        }
        const bool same_budget = llama_lukv_read<uint64_t>(io) == hash_budget();

        const uint32_t n_seqs = llama_lukv_read<uint32_t>(io);
        const uint32_t n_twins = llama_lukv_read<uint32_t>(io);
        const uint32_t n_free  = n_seq_max - seqs.size() - twins.size();
        if (n_seqs > (seq_id < 0 ? n_free : std::min(n_free, 1u)) || n_twins > (seq_id < 0 ? n_free - n_seqs : 0)) {
            throw std::runtime_error(format("it has %u sequences, but there is room for %u", n_seqs + n_twins, n_free));
        }

        sources_t twins_read;
        for (uint32_t t = 0; t < n_twins; ++t) {
            const llama_seq_id twin = llama_lukv_read<llama_seq_id>(io);
            twins_read[twin] = llama_lukv_read<llama_seq_id>(io);
        }

        std::map<llama_seq_id, kv_seq> added;
        for (uint32_t s = 0; s < n_seqs; ++s) {
            const llama_seq_id id = llama_lukv_read<llama_seq_id>(io);

            const auto & seq = added[seq_id < 0 ? id : seq_id] = state_read_seq(io);

            // a prompt that is cached in full does not know its budgets yet
            if (!same_budget && (params.policy != LLAMA_LUKV_POLICY_PREFILL || seq.prefill_done)) {
                throw std::runtime_error("it was saved with another table of budgets: use the model and the ratio that it was saved with");
            }
        }

        for (const auto & [id, _] : added) {
            ids.push_back(id);
        }
        bool ok = ids.size() == n_seqs && twins_read.size() == n_twins && (ids.empty() || (ids.front() >= 0 && ids.back() < LLAMA_MAX_SEQ));
        for (const auto & [twin, id] : twins_read) {
            ok = ok && twin >= 0 && twin < LLAMA_MAX_SEQ && added.count(twin) == 0 && added.count(id) > 0;
        }
        if (!ok) {
            throw std::runtime_error("it is damaged");
        }
        if (!add_seqs(std::move(added), seq_id < 0)) {
            throw std::runtime_error("there is no memory for it");
        }

        for (llama_seq_id id : ids) {
            queries->state_read(io, seqs.at(id).queries);

            const auto & seq = seqs.at(id);

            const auto n_cells = n_cells_of(seq);

            for_each_head([&](const kv_layer & layer, uint32_t, size_t i) {
                for (ggml_tensor * t : layer.tensors()) {
                    llama_lukv_read_rows(io, t, seq.segs[i].offs, n_cells[i]);
                }
            });
        }

        twins.insert(twins_read.begin(), twins_read.end());
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: the state cannot be restored: %s\n", __func__, err.what());

        io.discard();

        // some cells may have been written. they are masked from now on, but they are read: no NaNs
        for (llama_seq_id id : ids) {
            if (seqs.count(id) == 0) {
                continue;
            }
            const auto & seq = seqs.at(id);

            const auto n_cells = n_cells_of(seq);

            for_each_head([&](const kv_layer & layer, uint32_t, size_t i) {
                for (ggml_tensor * t : layer.tensors()) {
                    ggml_backend_tensor_memset(t, 0, seq.segs[i].offs*t->nb[1], n_cells[i]*t->nb[1]);
                }
            });
        }
        seq_rm(seq_id, -1, -1);

        throw std::runtime_error("failed to restore kv cache");
    }
}

llama_kv_cache_lukv::kv_seq llama_kv_cache_lukv::state_read_seq(llama_io_read_i & io) const {
    kv_seq res;
    res.pos_min      = llama_lukv_read<llama_pos>(io);
    res.pos_max      = llama_lukv_read<llama_pos>(io);
    res.quota        = llama_lukv_read<uint32_t>(io);
    res.n_room       = llama_lukv_read<uint32_t>(io);
    const uint32_t flags = llama_lukv_read<uint32_t>(io);
    res.prefill_done = flags & 1;
    res.is_recorded  = flags & 2;
    res.has_holes    = true; // perhaps

    if (res.pos_min < 0 || res.pos_max < res.pos_min || res.quota > kv_size || res.n_room > n_room_all) {
        throw std::runtime_error("it was saved with another size of the context or of the ubatches, or it is damaged");
    }

    res.pos_recent = read_pos(io, res.pos_min, res.pos_max, n_room_all);

    res.segs.resize(n_heads());
    for (auto & seg : res.segs) {
        seg.pos = read_pos(io, res.pos_min, res.pos_max, kv_size);
    }

    return res;
}
