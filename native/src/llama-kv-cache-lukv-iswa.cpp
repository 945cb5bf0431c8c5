#include "llama-kv-cache-lukv-iswa.h"

#include "llama-io.h"
#include "llama-model.h"

#include <algorithm>

//
// llama_kv_cache_lukv_iswa
//

llama_kv_cache_lukv_iswa::llama_kv_cache_lukv_iswa(
        const llama_model       & model,
        const llama_cparams     & cparams,
        const llama_lukv_params & params,
        ggml_type type_k,
        ggml_type type_v,
             bool swa_full) {
    const auto & hparams = model.hparams;

    const layer_filter_cb filter_base = [&](int32_t il) { return !hparams.is_swa(il); };
    const layer_filter_cb filter_swa  = [&](int32_t il) { return  hparams.is_swa(il); };

    // as in llama_kv_cache_iswa
    const uint32_t n_window = hparams.n_swa*(cparams.kv_unified ? cparams.n_seq_max : 1) + cparams.n_ubatch;
    const uint32_t size_swa = swa_full ? cparams.n_ctx_seq : GGML_PAD(std::min(cparams.n_ctx_seq, n_window), 256);

    kv_base = std::make_unique<llama_kv_cache_lukv>(model, cparams, params, type_k, type_v, cparams.n_ctx, filter_base);

    kv_swa = std::make_unique<llama_kv_cache>(
            model, hparams, type_k, type_v, !cparams.flash_attn, cparams.offload_kqv, cparams.kv_unified, size_swa, cparams.n_seq_max, 1,
            hparams.n_swa, hparams.swa_type, nullptr, filter_swa, nullptr, nullptr);
}

llama_memory_context_ptr llama_kv_cache_lukv_iswa::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    GGML_UNUSED(embd_all);

    auto ubatches = kv_base->split(balloc, n_ubatch);
    if (ubatches.empty()) {
        return std::make_unique<llama_kv_cache_lukv_iswa_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }

    auto sinfos_swa = kv_swa->prepare(ubatches);
    if (sinfos_swa.empty()) {
        return std::make_unique<llama_kv_cache_lukv_iswa_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }

    return std::make_unique<llama_kv_cache_lukv_iswa_context>(
            std::make_unique<llama_kv_cache_lukv_context>(kv_base.get(), ubatches),
            std::make_unique<llama_kv_cache_context>(kv_swa.get(), std::move(sinfos_swa), ubatches), std::move(ubatches));
}

llama_memory_context_ptr llama_kv_cache_lukv_iswa::init_full() {
    return std::make_unique<llama_kv_cache_lukv_iswa_context>(kv_base->init_full(), kv_swa->init_full(), std::vector<llama_ubatch>());
}

llama_memory_context_ptr llama_kv_cache_lukv_iswa::init_update(llama_context * lctx, bool optimize) {
    return std::make_unique<llama_kv_cache_lukv_iswa_context>(
            kv_base->init_update(lctx, optimize), kv_swa->init_update(lctx, optimize), std::vector<llama_ubatch>());
}

bool llama_kv_cache_lukv_iswa::get_can_shift() const {
    return false;
}

uint32_t llama_kv_cache_lukv_iswa::n_nodes_extra() const {
    return kv_base->n_nodes_extra();
}

void llama_kv_cache_lukv_iswa::clear(bool data) {
    kv_base->clear(data);
    kv_swa ->clear(data);
}

bool llama_kv_cache_lukv_iswa::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    // where the first one fails, nothing is removed
    return kv_base->seq_rm(seq_id, p0, p1) && kv_swa->seq_rm(seq_id, p0, p1);
}

void llama_kv_cache_lukv_iswa::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    kv_base->seq_cp(seq_id_src, seq_id_dst, p0, p1);
    kv_swa ->seq_cp(seq_id_src, seq_id_dst, p0, p1);
}

void llama_kv_cache_lukv_iswa::seq_keep(llama_seq_id seq_id) {
    kv_base->seq_keep(seq_id);
    kv_swa ->seq_keep(seq_id);
}

void llama_kv_cache_lukv_iswa::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    // not possible, and says so: the window must not be shifted alone
    kv_base->seq_add(seq_id, p0, p1, shift);
}

void llama_kv_cache_lukv_iswa::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    kv_base->seq_div(seq_id, p0, p1, d);
}

llama_pos llama_kv_cache_lukv_iswa::seq_pos_min(llama_seq_id seq_id) const {
    // the positions of the base cache are a superset of those of the SWA cache
    return kv_swa->seq_pos_min(seq_id);
}

llama_pos llama_kv_cache_lukv_iswa::seq_pos_max(llama_seq_id seq_id) const {
    return kv_swa->seq_pos_max(seq_id);
}

std::map<ggml_backend_buffer_type_t, size_t> llama_kv_cache_lukv_iswa::memory_breakdown() const {
    auto res = kv_base->memory_breakdown();
    for (const auto & [buft, size] : kv_swa->memory_breakdown()) {
        res[buft] += size;
    }
    return res;
}

void llama_kv_cache_lukv_iswa::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    if ((flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0) {
        kv_base->state_write(io, seq_id, flags);
    }

    kv_swa->state_write(io, seq_id, flags);
}

void llama_kv_cache_lukv_iswa::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    try {
        if ((flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0) {
            kv_base->state_read(io, seq_id, flags);
        }

        kv_swa->state_read(io, seq_id, flags);
    } catch (const std::exception &) {
        // a sequence is in both or in none
        io.discard();
        seq_rm(seq_id, -1, -1);

        throw;
    }
}

//
// llama_kv_cache_lukv_iswa_context
//

llama_kv_cache_lukv_iswa_context::llama_kv_cache_lukv_iswa_context(llama_memory_status status) : status(status) {}

llama_kv_cache_lukv_iswa_context::llama_kv_cache_lukv_iswa_context(
        llama_memory_context_ptr  ctx_base,
        llama_memory_context_ptr  ctx_swa,
        std::vector<llama_ubatch> ubatches) :
    ctx_base(std::move(ctx_base)),
    ctx_swa (std::move(ctx_swa)),
    status(llama_memory_status_combine(this->ctx_base->get_status(), this->ctx_swa->get_status())),
    ubatches(std::move(ubatches)) {
}

bool llama_kv_cache_lukv_iswa_context::next() {
    ctx_base->next();
    ctx_swa ->next();

    return ++i_cur < ubatches.size();
}

bool llama_kv_cache_lukv_iswa_context::apply() {
    bool res = true;

    res = res & ctx_base->apply();
    res = res & ctx_swa ->apply();

    return res;
}

llama_memory_status llama_kv_cache_lukv_iswa_context::get_status() const {
    return status;
}

const llama_ubatch & llama_kv_cache_lukv_iswa_context::get_ubatch() const {
    return ubatches[i_cur];
}

const llama_kv_cache_lukv_context * llama_kv_cache_lukv_iswa_context::get_base() const {
    return static_cast<const llama_kv_cache_lukv_context *>(ctx_base.get());
}

const llama_kv_cache_context * llama_kv_cache_lukv_iswa_context::get_swa() const {
    return static_cast<const llama_kv_cache_context *>(ctx_swa.get());
}

//
// graph
//

llm_graph_input_attn_kv_lukv_iswa::llm_graph_input_attn_kv_lukv_iswa(
        ggml_context * ctx,
        const llama_ubatch & ubatch,
        const llama_hparams & hparams,
        const llama_cparams & cparams,
        const llama_kv_cache_lukv_iswa_context * mctx) :
    llm_graph_input_attn_kv_iswa(hparams, cparams, nullptr),
    mctx_lukv(mctx),
    base(build_attn_inp_kv_lukv(ctx, ubatch, hparams, cparams, mctx->get_base())) {
    const auto * mctx_swa = mctx->get_swa();

    const uint32_t n_stream = cparams.kv_unified ? 1 : ubatch.n_seqs_unq;

    self_k_idxs_swa = mctx_swa->build_input_k_idxs(ctx, ubatch);
    self_v_idxs_swa = mctx_swa->build_input_v_idxs(ctx, ubatch);

    self_kq_mask_swa = ggml_new_tensor_4d(ctx, cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32,
            mctx_swa->get_n_kv(), ubatch.n_tokens/n_stream, 1, n_stream);
    ggml_set_input(self_kq_mask_swa);
    ggml_set_name (self_kq_mask_swa, "attn_inp_kq_mask_swa");
    self_kq_mask_swa_cnv = self_kq_mask_swa;

    self_k_rot_swa = mctx_swa->build_input_k_rot(ctx);
    self_v_rot_swa = mctx_swa->build_input_v_rot(ctx);
}

void llm_graph_input_attn_kv_lukv_iswa::set_input(const llama_ubatch * ubatch) {
    const auto * mctx_swa = mctx_lukv->get_swa();

    // a model without such layers does not use the inputs for them
    if (base->self_idxs->buffer) {
        base->set_input(ubatch);
    }
    if (self_k_idxs_swa->buffer) {
        mctx_swa->set_input_k_idxs(self_k_idxs_swa, ubatch);
        mctx_swa->set_input_v_idxs(self_v_idxs_swa, ubatch);
        mctx_swa->set_input_kq_mask(self_kq_mask_swa, ubatch, cparams.causal_attn);
    }
    if (self_k_rot_swa && self_k_rot_swa->buffer) {
        mctx_swa->set_input_k_rot(self_k_rot_swa);
    }
    if (self_v_rot_swa && self_v_rot_swa->buffer) {
        mctx_swa->set_input_v_rot(self_v_rot_swa);
    }
}

bool llm_graph_input_attn_kv_lukv_iswa::can_reuse(const llm_graph_params & params) {
    mctx_lukv = static_cast<const llama_kv_cache_lukv_iswa_context *>(params.mctx);

    const uint32_t n_stream = params.cparams.kv_unified ? 1 : params.ubatch.n_seqs_unq;

    const ggml_tensor * mask = self_kq_mask_swa;

    return base->can_reuse(mctx_lukv->get_base(), params.ubatch) &&
        mask->ne[0] == mctx_lukv->get_swa()->get_n_kv() && mask->ne[1]*n_stream == params.ubatch.n_tokens && mask->ne[3] == n_stream;
}
