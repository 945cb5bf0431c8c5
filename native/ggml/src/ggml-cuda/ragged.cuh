#include "common.cuh"

void ggml_cuda_flash_attn_ragged(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void ggml_cuda_store_ragged(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void ggml_cuda_keydiff_ragged   (ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void ggml_cuda_bottom_k_ragged  (ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void ggml_cuda_scores_ragged    (ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// for the ops above
bool ggml_cuda_ragged_supported(int device, const ggml_tensor * dst);
