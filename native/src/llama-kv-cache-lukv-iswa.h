#pragma once

#include "llama-kv-cache.h"
#include "llama-kv-cache-lukv.h"

//
// llama_kv_cache_lukv_iswa
//

// the counterpart of llama_kv_cache_iswa
//   the first instance has per-head budgets and is for the non-SWA layers of the model, the second instance is for the SWA layers
class llama_kv_cache_lukv_iswa : public llama_memory_i {
public:
    llama_kv_cache_lukv_iswa(
            const llama_model       & model,
            const llama_cparams     & cparams,
            const llama_lukv_params & params,
            ggml_type type_k,
            ggml_type type_v,
                 bool swa_full);

    ~llama_kv_cache_lukv_iswa() = default;

    //
    // llama_memory_i
    //

    llama_memory_context_ptr init_batch(
            llama_batch_allocr & balloc,
            uint32_t n_ubatch,
            bool embd_all) override;

    llama_memory_context_ptr init_full() override;

    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift() const override;

    uint32_t n_nodes_extra() const override;

    void clear(bool data) override;

    bool seq_rm  (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id)                                                          override;
    void seq_add (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    //
    // llama_kv_cache_lukv_iswa specific API
    //

    llama_kv_cache_lukv * get_base() const { return kv_base.get(); }
    llama_kv_cache      * get_swa () const { return kv_swa .get(); }

private:
    std::unique_ptr<llama_kv_cache_lukv> kv_base;
    std::unique_ptr<llama_kv_cache>      kv_swa;
};

class llama_kv_cache_lukv_iswa_context : public llama_memory_context_i {
public:
    // used for errors
    llama_kv_cache_lukv_iswa_context(llama_memory_status status);

    // ubatches - none for a full-cache or an update context
    llama_kv_cache_lukv_iswa_context(
            llama_memory_context_ptr  ctx_base,
            llama_memory_context_ptr  ctx_swa,
            std::vector<llama_ubatch> ubatches);

    ~llama_kv_cache_lukv_iswa_context() = default;

    //
    // llama_memory_context_i
    //

    bool next()  override;
    bool apply() override;

    llama_memory_status  get_status() const override;
    const llama_ubatch & get_ubatch() const override;

    //
    // llama_kv_cache_lukv_iswa_context specific API
    //

    const llama_kv_cache_lukv_context * get_base() const;
    const llama_kv_cache_context      * get_swa()  const;

private:
    const llama_memory_context_ptr ctx_base;
    const llama_memory_context_ptr ctx_swa;

    const llama_memory_status status;

    size_t i_cur = 0;

    std::vector<llama_ubatch> ubatches;
};

//
// graph
//

class llm_graph_input_attn_kv_lukv_iswa : public llm_graph_input_attn_kv_iswa {
public:
    llm_graph_input_attn_kv_lukv_iswa(
            ggml_context * ctx,
            const llama_ubatch & ubatch,
            const llama_hparams & hparams,
            const llama_cparams & cparams,
            const llama_kv_cache_lukv_iswa_context * mctx);

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    const llama_kv_cache_lukv_iswa_context * mctx_lukv;

    std::unique_ptr<llm_graph_input_attn_kv_lukv> base;
};
