#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

void ggml_compute_forward_flash_attn_ragged(const struct ggml_compute_params * params, struct ggml_tensor * dst);
void ggml_compute_forward_store_ragged     (const struct ggml_compute_params * params, struct ggml_tensor * dst);
void ggml_compute_forward_keydiff_ragged   (const struct ggml_compute_params * params, struct ggml_tensor * dst);
void ggml_compute_forward_bottom_k_ragged  (const struct ggml_compute_params * params, struct ggml_tensor * dst);
void ggml_compute_forward_scores_ragged    (const struct ggml_compute_params * params, struct ggml_tensor * dst);

// for the ops above
size_t ggml_ragged_work_size       (const struct ggml_tensor * dst, int n_tasks);
size_t ggml_scores_ragged_work_size(const struct ggml_tensor * dst, int n_tasks);

#ifdef __cplusplus
}
#endif
