#include "convert.cuh"
#include "cpy-utils.cuh"
#include "ragged.cuh"

#include "ggml-ragged.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <type_traits>

// The ops of ggml-ragged.h
//
// The cells of all segments (a KV head of a sequence) are cut into tiles, and every block gets the same number of consecutive
// tiles, whatever segment they belong to. A block that reaches from one segment into the next one has a partial result for
// each. Between two consecutive partial results either the block or the unit (a segment, or a segment and some of its queries)
// changes, hence block + unit numbers them: no lists, and the same grid for every shape of the cache.

static constexpr int RAGGED_MAX_SEGS = 512;

static constexpr float LOG2E = 1.4426950408889634f;

//
// tiles
//

// n_tiles tiles in n_blocks equal shares: the first `rest` blocks have one more. 32 bits: divisions of 64 bits are slow
struct tile_shares {
    uint32_t n_tiles;
    uint32_t size;
    uint32_t rest;

    __device__ __forceinline__ tile_shares(const uint32_t n_tiles, const uint32_t n_blocks) :
        n_tiles(n_tiles), size(n_tiles/n_blocks), rest(n_tiles%n_blocks) {}

    __device__ __forceinline__ int first(const uint32_t block) const {
        return block*size + min(block, rest);
    }

    __device__ __forceinline__ bool empty(const uint32_t block) const {
        return size == 0 && block >= rest;
    }

    // the block that has a tile
    __device__ __forceinline__ int block(const uint32_t tile) const {
        const uint32_t n_large = rest*(size + 1);
        return tile < n_large ? tile/(size + 1) : rest + (tile - n_large)/size;
    }
};

static __host__ __device__ constexpr int n_tiles_of(const int n_cells, const int tile_size) {
    return (n_cells + tile_size - 1)/tile_size;
}

static __device__ __forceinline__ uint32_t warp_prefix_sum(uint32_t x) { // x of this lane included
#pragma unroll
    for (int i = 1; i < WARP_SIZE; i *= 2) {
        const uint32_t y = __shfl_up_sync(0xFFFFFFFF, x, i, WARP_SIZE);
        if (threadIdx.x % WARP_SIZE >= i) {
            x += y;
        }
    }
    return x;
}

// the tiles of the segments, those of each segment n_units times
struct seg_tiles {
    const int32_t * segs;   // [n_segs][2]: first row and number of cells
    const int     * first;  // [n_segs + 1], shared: first tile of each segment, and the number of all
    int             n_segs;

    // first: RAGGED_MAX_SEGS + 1 numbers of shared memory
    __device__ __forceinline__ seg_tiles(
            const int32_t * segs, const int n_segs, int * first, const int n_units, const int tile_size) :
        segs(segs), first(first), n_segs(n_segs) {
        if (threadIdx.x < WARP_SIZE) {
            int sum = 0;
            for (int i0 = 0; i0 < n_segs; i0 += WARP_SIZE) {
                const int i    = i0 + threadIdx.x;
                const int n    = i < n_segs ? n_units*n_tiles_of(segs[2*i + 1], tile_size) : 0;
                const int last = sum + warp_prefix_sum(n);
                if (i < n_segs) {
                    first[i] = last - n;
                }
                sum = __shfl_sync(0xFFFFFFFF, last, WARP_SIZE - 1);
            }
            if (threadIdx.x == 0) {
                first[n_segs] = sum;
            }
        }
        __syncthreads();
    }

    __device__ __forceinline__ int row    (const int seg) const { return segs[2*seg + 0]; }
    __device__ __forceinline__ int n_cells(const int seg) const { return segs[2*seg + 1]; }
    __device__ __forceinline__ int n_tiles(const int seg) const { return first[seg + 1] - first[seg]; }
    __device__ __forceinline__ int n_all  ()              const { return first[n_segs]; }

    // the segment that has a tile
    __device__ __forceinline__ int find(const int tile) const {
        int lo = 0;
        for (int hi = n_segs; hi - lo > 1;) {
            const int mid = (lo + hi)/2;
            if (first[mid] <= tile) {
                lo = mid;
            } else {
                hi = mid;
            }
        }
        return lo;
    }
};

//
// rows of K and V
//

static __host__ __device__ constexpr int row_bytes(const ggml_type type, const int d) {
    return type == GGML_TYPE_Q8_0 ? d/QK8_0*(int) sizeof(block_q8_0) :
           type == GGML_TYPE_Q4_0 ? d/QK4_0*(int) sizeof(block_q4_0) :
           type == GGML_TYPE_F32  ? d*4 : d*2;
}

// the first or the last two bytes of a word as a pair of f16, exact: 0x6400 + b is 1024 + b
template <int half_word = 0>
static __device__ __forceinline__ half2 bytes_to_half2(const uint32_t b, const float offset) {
    const uint32_t h = __byte_perm(b, 0x64646464, half_word == 0 ? 0x4140 : 0x4342);
    return __hsub2(*(const half2 *) &h, __float2half2_rn(1024.0f + offset));
}

// the integers of the elements [8*chunk, 8*chunk + 8) of a quantised row, at any even address. returns their scale
template <ggml_type type>
static __device__ __forceinline__ half load_chunk_quantized(const char * row, const int chunk, half2 res[4]) {
    if constexpr (type == GGML_TYPE_Q8_0) {
        const char     * block = row + chunk/4*sizeof(block_q8_0);
        const uint16_t * qs    = (const uint16_t *) (block + sizeof(half)) + chunk%4*4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            res[i] = bytes_to_half2(qs[i] ^ 0x8080, 128.0f);
        }
        return *(const half *) block;
    } else {
        static_assert(type == GGML_TYPE_Q4_0, "bad type");
        const char     * block = row + chunk/4*sizeof(block_q4_0);
        const uint16_t * qs    = (const uint16_t *) (block + sizeof(half)) + chunk%2*4;
        const int        shift = chunk%4/2*4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            res[i] = bytes_to_half2((qs[i] >> shift) & 0x0F0F, 8.0f);
        }
        return *(const half *) block;
    }
}

template <ggml_type type>
static __device__ __forceinline__ void load_chunk_f32(const char * row, const int chunk, float res[8]) {
    if constexpr (type == GGML_TYPE_F32) {
        const float4 a = ((const float4 *) row)[2*chunk + 0];
        const float4 b = ((const float4 *) row)[2*chunk + 1];
        res[0] = a.x; res[1] = a.y; res[2] = a.z; res[3] = a.w;
        res[4] = b.x; res[5] = b.y; res[6] = b.z; res[7] = b.w;
    } else if constexpr (type == GGML_TYPE_F16) {
        const uint4 a = ((const uint4 *) row)[chunk];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 f = __half22float2(((const half2 *) &a)[i]);
            res[2*i + 0] = f.x;
            res[2*i + 1] = f.y;
        }
    } else if constexpr (type == GGML_TYPE_BF16) {
        const uint4 a = ((const uint4 *) row)[chunk];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t u = ((const uint32_t *) &a)[i];
            res[2*i + 0] = __uint_as_float(u << 16);
            res[2*i + 1] = __uint_as_float(u & 0xFFFF0000);
        }
    } else {
        half2 h[4];
        const float d = __half2float(load_chunk_quantized<type>(row, chunk, h));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 f = __half22float2(h[i]);
            res[2*i + 0] = d*f.x;
            res[2*i + 1] = d*f.y;
        }
    }
}

//
// rotation
//

static constexpr int ROT_MIN = 2*WARP_SIZE; // two numbers for each lane

// multiplies N*ROT_MIN numbers with the orthonormal Walsh-Hadamard matrix. x[j] are the numbers j*ROT_MIN + 2*lane and the next one
template <int N>
static __device__ __forceinline__ void hadamard(float2 x[N]) {
    const float scale = rsqrtf(N*ROT_MIN);
#pragma unroll
    for (int j = 0; j < N; ++j) {
        x[j] = make_float2(scale*(x[j].x + x[j].y), scale*(x[j].x - x[j].y));
#pragma unroll
        for (int i = 1; i < WARP_SIZE; i *= 2) {
            const float2 y    = make_float2(__shfl_xor_sync(0xFFFFFFFF, x[j].x, i, WARP_SIZE), __shfl_xor_sync(0xFFFFFFFF, x[j].y, i, WARP_SIZE));
            const float  sign = threadIdx.x & i ? -1.0f : 1.0f;

            x[j] = make_float2(y.x + sign*x[j].x, y.y + sign*x[j].y);
        }
    }
#pragma unroll
    for (int i = 1; i < N; i *= 2) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
            if ((j & i) == 0) {
                const float2 a = x[j];
                const float2 b = x[j + i];

                x[j]     = make_float2(a.x + b.x, a.y + b.y);
                x[j + i] = make_float2(a.x - b.x, a.y - b.y);
            }
        }
    }
}

//
// attention
//

// quantised K and V are converted as a whole from this number of queries of a head on
static constexpr int FATTN_CONVERT_ROWS = 256;

struct fattn_ragged_args {
    const char    * q;        // F32 [D, n_head, n_tokens*n_seqs]
    const char    * k;
    const char    * v;
    const int32_t * segs;     // [n_segs][2]
    const int32_t * n_hidden; // [n_tokens*n_seqs]

    float  * part_o;         // [n_blocks + n_units][rows of a unit][D]
    float2 * part_ml;        // [n_blocks + n_units][rows of a unit]: maximum (of base 2) and sum

    int64_t nb_q1;
    int64_t nb_q2;

    int n_segs;              // n_head_kv*n_seqs
    int n_head_kv;
    int n_gqa;
    int n_tokens;            // of a sequence
    int n_rows;              // n_gqa*n_tokens, the queries of a segment: token by token, and within a token head by head
    int n_row_blocks;

    float scale;
    float logit_softcap;     // 0 - none

    bool rot_q;              // each query is multiplied with the Walsh-Hadamard matrix of size D

    // of a query
    __device__ __forceinline__ int token(const int seg, const int row) const { return seg/n_head_kv*n_tokens + row/n_gqa; }
    __device__ __forceinline__ int head (const int seg, const int row) const { return seg%n_head_kv*n_gqa    + row%n_gqa; }

    // scores are of base 2; a soft cap comes before that
    __device__ __forceinline__ float q_scale() const { return logit_softcap == 0.0f ? scale*LOG2E : scale/logit_softcap; }
};

// WM warps share a tile, each has 16 rows of queries. WC such groups work on tiles of their own
template <ggml_type type_, int D_, int WM_, int WC_, int TILE_, int STAGES_>
struct fattn_ragged_config {
    static constexpr ggml_type type   = type_;
    static constexpr int       D      = D_;
    static constexpr int       WM     = WM_;
    static constexpr int       WC     = WC_;
    static constexpr int       TILE   = TILE_;   // cells
    static constexpr int       STAGES = STAGES_; // tiles in flight, the one that is computed included

    static constexpr int N_THREADS = WM*WC*WARP_SIZE;
    static constexpr int ROWS      = WM*16;

    static constexpr bool quantized = type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0;

    static constexpr int NC = D/8; // 16 byte chunks of a row of 16 bit numbers

    static constexpr int ROW_BYTES  = row_bytes(type, D);
    static constexpr int TILE_BYTES = TILE*D*2; // of K or V, 16 bit

    // a stage holds K, then V, quantised ones as they are in memory: from the 16 byte boundary before the first row on
    static constexpr int STAGE_BYTES_KV = quantized ? (TILE*ROW_BYTES + 16 + 15)/16*16 : TILE_BYTES;
    static constexpr int STAGE_BYTES    = 2*STAGE_BYTES_KV;

    static constexpr int GROUP_BYTES = STAGES*STAGE_BYTES + (quantized ? 2*TILE_BYTES : 0);
    static constexpr int MERGE_BYTES = WC == 1 ? 0 : WC*16*(D + 2)*(int) sizeof(float);
    static constexpr int SMEM_BYTES  = WC*GROUP_BYTES > MERGE_BYTES ? WC*GROUP_BYTES : MERGE_BYTES;

    // chunks are permuted within a row, so that ldmatrix finds the same chunk of 8 rows in different banks
    static __device__ __forceinline__ int chunk_offset(const int row, const int chunk) {
        constexpr int tail = NC%8;
        const int     mask = tail != 0 && chunk >= NC - tail ? tail - 1 : 7;
        return (row*NC + (chunk ^ (row & mask)))*16;
    }
};

// Few queries of quantised K and V: the integers become fragments without a tile of f16 in between. K and V are the matrices
// of 16 rows (s^T = k q^T, o^T = v^T p^T), so that 8 queries fill a fragment. Every warp works on tiles of its own.
//
// The fragments are words of the rows as they lie in memory: which dimension is which k of a mma, or which row of o^T, is free.
template <ggml_type type_, int D_, int NQ_, int WC_, int TILE_, int STAGES_>
struct fattn_ragged_words_config {
    static constexpr ggml_type type   = type_;
    static constexpr int       D      = D_;
    static constexpr int       NQ     = NQ_;     // times 8 queries
    static constexpr int       WM     = 1;
    static constexpr int       WC     = WC_;
    static constexpr int       TILE   = TILE_;   // cells
    static constexpr int       STAGES = STAGES_; // tiles in flight, the one that is computed included

    static constexpr int N_THREADS = WC*WARP_SIZE;
    static constexpr int ROWS      = NQ*8;

    static constexpr bool quantized = true;

    static constexpr int ROW_BYTES = row_bytes(type, D);
    static constexpr int ROW_WORDS = ROW_BYTES/4;
    static_assert(D % 64 == 0, "rows of whole words");

    // from the 16 byte boundary before the first row on
    static constexpr int STAGE_BYTES_KV = (TILE*ROW_BYTES + 16 + 15)/16*16;
    static constexpr int STAGE_BYTES    = 2*STAGE_BYTES_KV;

    static constexpr int GROUP_BYTES = STAGES*STAGE_BYTES;

    // queries as f16, on their way into fragments: in the last stage of the warp that loads them. lanes read 4 words of 8 rows each
    static constexpr int Q_WORDS = D/2 + 8;
    static_assert((ROWS + WC - 1)/WC*Q_WORDS*4 <= STAGE_BYTES, "bad config");

    static constexpr int MERGE_BYTES = WC*ROWS*(D + 2)*(int) sizeof(float);
    static constexpr int SMEM_BYTES  = WC*GROUP_BYTES > MERGE_BYTES ? WC*GROUP_BYTES : MERGE_BYTES;

    // two blocks of a row are 2*QW + 1 words: the scale of the first one is the first half of word 0, that of the second one
    // is the second half of word QW
    static constexpr int QW         = type == GGML_TYPE_Q8_0 ? QK8_0/4 : QK4_0/8;
    static constexpr int PAIR_WORDS = 2*QW + 1;

    // the i-th cell of the j-th eight of a tile. Lanes read 4 words (K) of each of an eight, or 8 words (V) of every second one of
    // it: all in different banks with cells this far apart
    static constexpr int STEP = 256/D;
    static_assert(4*STEP*ROW_WORDS % 128 == 16, "bank conflicts");
    static_assert(TILE % (8*STEP) == 0 && TILE % 16 == 0, "bad tile");

    static __device__ __forceinline__ int cell(const int j, const int i) {
        return j/STEP*8*STEP + i*STEP + j%STEP;
    }

    static __device__ __forceinline__ uint32_t * query(char * smem, const int r) {
        return (uint32_t *) (smem + r%WC*GROUP_BYTES + (STAGES - 1)*STAGE_BYTES) + r/WC*Q_WORDS;
    }

    // The 32 integers of a block are 8 words of a byte each (q4_0: the low halves of the bytes are words 0 to 3, the high ones the
    // others). The first block of a pair begins in the middle of a word of memory: its bytes move up by two, and the first two
    // become the end of the last word.

    // the first of the two elements that are half h of word j of block 0 or 1 of a pair
    static __device__ __forceinline__ int element(const int block, const int j, const int h) {
        const int i = 4*j + 2*(h + 1 - block);
        return type == GGML_TYPE_Q8_0 ? i%32 : j/4*16 + i%16;
    }

    // word j as it is in memory. word_0: that of the pair
    static __device__ __forceinline__ uint32_t load_word(const uint32_t * pair, const int block, const int j, const uint32_t word_0) {
        const uint32_t w = pair[1 + block*QW + j%QW];
        return block == 1 ? w : __byte_perm(w, word_0, j%QW == QW - 1 ? 0x7610 : 0x3210);
    }

    // the bytes of word j: the integers + OFFSET
    static constexpr float OFFSET = type == GGML_TYPE_Q8_0 ? 128.0f : 8.0f;

    static __device__ __forceinline__ uint32_t to_bytes(const uint32_t w, const int j) {
        return type == GGML_TYPE_Q8_0 ? w ^ 0x80808080 : (w >> j/4*4) & 0x0F0F0F0F;
    }
};

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)
#define RAGGED_AVAILABLE
#endif

#if defined(RAGGED_AVAILABLE) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= GGML_CUDA_CC_AMPERE
#define RAGGED_DEVICE_CODE
#endif

#ifdef RAGGED_DEVICE_CODE

// src_size < 16: the rest is filled with zeros
static __device__ __forceinline__ void cp_async_16(const uint32_t dst, const char * src, const int src_size) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" : : "r"(dst), "l"(src), "r"(src_size) : "memory");
}

static __device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" : : : "memory");
}

template <int n>
static __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(n) : "memory");
}

static __device__ __forceinline__ void ldmatrix_x4(uint32_t r[4], const uint32_t addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(addr) : "memory");
}

static __device__ __forceinline__ void ldmatrix_x4_trans(uint32_t r[4], const uint32_t addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(addr) : "memory");
}

template <bool bf16>
static __device__ __forceinline__ void mma_16x8x16(float c[4], const uint32_t a[4], const uint32_t b0, const uint32_t b1) {
    if constexpr (bf16) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

static __device__ __forceinline__ uint32_t movmatrix_trans(const uint32_t x) {
    uint32_t res;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(res) : "r"(x));
    return res;
}

static __device__ __forceinline__ uint32_t pack_f16(const float x, const float y) {
    const half2 h = __floats2half2_rn(x, y);
    return *(const uint32_t *) &h;
}

static __device__ __forceinline__ uint32_t pack_bf16(const float x, const float y) {
    const nv_bfloat162 h = __floats2bfloat162_rn(x, y);
    return *(const uint32_t *) &h;
}

// bf16 has few bits: a second number takes what the first one leaves
static __device__ __forceinline__ uint32_t pack_bf16_rest(const float x, const float y, const uint32_t hi) {
    return pack_bf16(x - __uint_as_float(hi << 16), y - __uint_as_float(hi & 0xFFFF0000));
}

// warps of a group wait for each other
template <int WM>
static __device__ __forceinline__ void group_sync(const int group) {
    if constexpr (WM == 1) {
        __syncwarp();
    } else {
        asm volatile("bar.sync %0, %1;" : : "r"(group + 1), "n"(WM*WARP_SIZE) : "memory");
    }
}

// start to load the rows [row, row + TILE) of K or V, n_valid of which exist
template <typename C>
static __device__ __forceinline__ void load_tile(
        const uint32_t dst, const char * base, const int64_t row, const int n_valid, const int tid) {
    constexpr int n_threads = C::WM*WARP_SIZE;

    if constexpr (C::quantized) {
        const char * src    = base + row*C::ROW_BYTES;
        const int    offset = (uintptr_t) src & 15;
        const int    size   = offset + n_valid*C::ROW_BYTES;

        if (n_valid == C::TILE) {
            const uint32_t dst_0 = dst + 16*tid;
            src += 16*tid - offset;
#pragma unroll
            for (int i0 = 0; i0 < C::STAGE_BYTES_KV; i0 += 16*n_threads) {
                if (i0 + 16*n_threads <= C::TILE*C::ROW_BYTES) {
                    cp_async_16(dst_0 + i0, src + i0, 16);
                } else if (i0 + 16*tid < size) {
                    cp_async_16(dst_0 + i0, src + i0, min(size - i0 - 16*tid, 16));
                }
            }
            return;
        }

        // zeros behind the last row. an address outside would be read from, even with nothing to be copied
        for (int i = 16*tid; i < C::STAGE_BYTES_KV; i += 16*n_threads) {
            const bool exists = i < size;
            cp_async_16(dst + i, src - offset + (exists ? i : 0), exists ? min(size - i, 16) : 0);
        }
    } else {
        constexpr int n_chunks = C::TILE*C::NC;

        // the rows that a thread copies differ by a multiple of 8: their permutation is the same
        if (n_threads/C::NC % 8 == 0 && n_threads % C::NC == 0 && n_valid == C::TILE) {
            const char   * src   = base + row*C::ROW_BYTES + tid*16;
            const uint32_t dst_0 = dst + C::chunk_offset(tid / C::NC, tid % C::NC);
#pragma unroll
            for (int i0 = 0; i0 < n_chunks; i0 += n_threads) {
                cp_async_16(dst_0 + i0*16, src + i0*16, 16);
            }
            return;
        }

#pragma unroll
        for (int i0 = 0; i0 < n_chunks; i0 += n_threads) {
            const int i = i0 + tid;
            if (n_chunks % n_threads != 0 && i >= n_chunks) {
                break;
            }
            const int r = i / C::NC;
            const int c = i % C::NC;

            // an address outside would be read from, even with nothing to be copied
            const int64_t row_src = row + min(r, n_valid - 1);
            cp_async_16(dst + C::chunk_offset(r, c), base + row_src*C::ROW_BYTES + c*16, r < n_valid ? 16 : 0);
        }
    }
}

template <typename C>
static __device__ __forceinline__ void dequantize_tile(
        char * dst, const char * src, const char * base, const int64_t row, const int tid) {
    constexpr int n_threads = C::WM*WARP_SIZE;

    src += (uintptr_t) (base + row*C::ROW_BYTES) & 15;

#pragma unroll 2
    for (int i = tid; i < C::TILE*C::NC; i += n_threads) {
        const int r = i / C::NC;
        const int c = i % C::NC;

        half2       res[4];
        const half2 d = __half2half2(load_chunk_quantized<C::type>(src + r*C::ROW_BYTES, c, res));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            res[j] = __hmul2(d, res[j]);
        }
        *(uint4 *) (dst + C::chunk_offset(r, c)) = *(const uint4 *) res;
    }
}

// the tiles [lo, hi) of a segment, of which every group of WM warps takes each WC-th, on their way through its stages
template <typename C>
struct tile_stream {
    const fattn_ragged_args & args;

    const uint32_t stages;  // shared memory of the group
    const int64_t  row0;    // of the segment
    const int      n_cells;
    const int      first;   // tile of the group
    const int      n;       // its tiles
    const int      tid;     // in the group

    __device__ __forceinline__ tile_stream(
            const fattn_ragged_args & args, const uint32_t stages, const int64_t row0, const int n_cells,
            const int lo, const int hi, const int group, const int tid) :
        args(args), stages(stages), row0(row0), n_cells(n_cells), first(lo + group),
        n(hi - lo > group ? (hi - lo - group + C::WC - 1)/C::WC : 0), tid(tid) {
#pragma unroll
        for (int i = 0; i < C::STAGES - 1; ++i) {
            load(i);
        }
    }

    __device__ __forceinline__ int cell(const int i) const { return (first + i*C::WC)*C::TILE; }

    // start to load the i-th tile, if there is one
    __device__ __forceinline__ void load(const int i) const {
        if (i < n) {
            const int      n_valid = min(C::TILE, n_cells - cell(i));
            const uint32_t dst     = stages + i%C::STAGES*C::STAGE_BYTES;

            load_tile<C>(dst,                     args.k, row0 + cell(i), n_valid, tid);
            load_tile<C>(dst + C::STAGE_BYTES_KV, args.v, row0 + cell(i), n_valid, tid);
        }
        cp_async_commit();
    }
};

// the partial results of the WC warps of a block in one, for the first n_rows of ROWS queries.
// before: sm_m [WC][ROWS], sm_l [WC][ROWS], sm_o [WC][ROWS][D] at smem, and a barrier
template <int D, int ROWS, int WC>
static __device__ __forceinline__ void merge_warps(const float * smem, const int n_rows, float * part_o, float2 * part_ml) {
    const float * sm_m = smem;
    const float * sm_l = sm_m + WC*ROWS;
    const float * sm_o = sm_l + WC*ROWS;

    for (int i = threadIdx.x; i < n_rows*D; i += WC*WARP_SIZE) {
        const int r = i / D;

        float m_all = -INFINITY;
#pragma unroll
        for (int w = 0; w < WC; ++w) {
            m_all = fmaxf(m_all, sm_m[w*ROWS + r]);
        }
        const float m_sub = m_all == -INFINITY ? 0.0f : m_all;

        float o_all = 0.0f;
        float l_all = 0.0f;
#pragma unroll
        for (int w = 0; w < WC; ++w) {
            const float weight = exp2f(sm_m[w*ROWS + r] - m_sub);
            o_all += weight*sm_o[w*ROWS*D + i];
            l_all += weight*sm_l[w*ROWS + r];
        }

        part_o[i] = o_all;
        if (i % D == 0) {
            part_ml[r] = make_float2(m_all, l_all);
        }
    }
}

#endif // RAGGED_DEVICE_CODE

template <typename C>
__launch_bounds__(C::N_THREADS)
static __global__ void fattn_ragged(const fattn_ragged_args args) {
#ifdef RAGGED_DEVICE_CODE
    constexpr int  D      = C::D;
    constexpr int  TILE   = C::TILE;
    constexpr int  STAGES = C::STAGES;
    constexpr bool bf16   = C::type == GGML_TYPE_BF16;

    extern __shared__ __align__(128) char smem[];

    __shared__ int first_tiles[RAGGED_MAX_SEGS + 1];

    const int lane = threadIdx.x % WARP_SIZE;
    const int warp = threadIdx.x / WARP_SIZE;
    const int wm   = warp % C::WM;
    const int wc   = warp / C::WM;
    const int tid  = wm*WARP_SIZE + lane; // in the group

    // the place of a thread in the fragments of a matrix
    const int fr = lane / 4;
    const int fc = lane % 4 * 2;

    char * const   stages   = smem + wc*C::GROUP_BYTES;
    char * const   tile_f16 = stages + STAGES*C::STAGE_BYTES; // quantised types only
    const uint32_t stages_s = __cvta_generic_to_shared(stages);

    ggml_cuda_pdl_sync();
    ggml_cuda_pdl_lc(); // all blocks are resident: the next kernel can only start when there is room

    const seg_tiles   tiles(args.segs, args.n_segs, first_tiles, args.n_row_blocks, TILE);
    const tile_shares shares(tiles.n_all(), gridDim.x);

    const int t_begin = shares.first(blockIdx.x);
    const int t_end   = shares.first(blockIdx.x + 1);
    if (t_begin == t_end) {
        return;
    }

    for (int seg = tiles.find(t_begin); seg < args.n_segs && tiles.first[seg] < t_end; ++seg) {
        const int64_t row0    = tiles.row(seg);
        const int     n_cells = tiles.n_cells(seg);
        const int     n_tiles = n_tiles_of(n_cells, TILE);
        const int     t_seg   = tiles.first[seg];

        if (n_tiles == 0) {
            continue;
        }

        for (int rb = max(t_begin - t_seg, 0)/n_tiles; rb < args.n_row_blocks; ++rb) {
            const int t_unit = t_seg + rb*n_tiles;
            if (t_unit >= t_end) {
                break;
            }
            const int lo = max(t_begin - t_unit, 0);
            const int hi = min(t_end   - t_unit, n_tiles);

            const tile_stream<C> stream(args, stages_s, row0, n_cells, lo, hi, wc, tid);

            // the rows of the warp
            const int  r0     = rb*C::ROWS + wm*16;
            const bool active = r0 < args.n_rows;

            const float q_scale = args.q_scale();

            const auto q_row = [&](const int r) {
                return r >= args.n_rows ? nullptr :
                    (const float *) (args.q + args.token(seg, r)*args.nb_q2 + args.head(seg, r)*args.nb_q1);
            };
            const auto load_q = [&](const float * row, const int col) {
                float2 res = row ? *(const float2 *) (row + col) : make_float2(0.0f, 0.0f);
                res.x *= q_scale;
                res.y *= q_scale;
                return res;
            };

            uint32_t q_frag[D/16][4];
            uint32_t q_rest[bf16 ? D/16 : 1][4];
            {
                const float * rows[2] = { q_row(r0 + fr), q_row(r0 + fr + 8) };
#pragma unroll
                for (int ks = 0; ks < D/16; ++ks) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float2   f  = load_q(rows[i%2], ks*16 + i/2*8 + fc);
                        const uint32_t hi = bf16 ? pack_bf16(f.x, f.y) : pack_f16(f.x, f.y);

                        q_frag[ks][i] = hi;
                        if constexpr (bf16) {
                            q_rest[ks][i] = pack_bf16_rest(f.x, f.y, hi);
                        }
                    }
                }
            }

            // the cells that the queries see, and those that all queries of the warp do
            int n_seen[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                n_seen[j] = n_cells - args.n_hidden[args.token(seg, min(r0 + fr + 8*j, args.n_rows - 1))];
            }
            const int n_seen_all = __reduce_min_sync(0xFFFFFFFF, min(n_seen[0], n_seen[1]));

            float o[D/8][4] = {};
            float m[2] = { -INFINITY, -INFINITY };
            float l[2] = { 0.0f, 0.0f };

            for (int i = 0; i < stream.n; ++i) {
                cp_async_wait<STAGES - 2>();
                group_sync<C::WM>(wc);

                const int cell = stream.cell(i);

                char * kv = stages + i%STAGES*C::STAGE_BYTES;

                if constexpr (C::quantized) {
                    dequantize_tile<C>(tile_f16,                 kv,                     args.k, row0 + cell, tid);
                    dequantize_tile<C>(tile_f16 + C::TILE_BYTES, kv + C::STAGE_BYTES_KV, args.v, row0 + cell, tid);
                    group_sync<C::WM>(wc);
                    kv = tile_f16;
                }

                stream.load(i + STAGES - 1);

                if (!active) {
                    continue;
                }

                const uint32_t k_s = __cvta_generic_to_shared(kv);
                const uint32_t v_s = k_s + (C::quantized ? C::TILE_BYTES : C::STAGE_BYTES_KV);

                // s = q k^T
                float s[TILE/8][4] = {};
                {
                    const int row = lane%8 + lane/16*8;
                    const int col = lane/8%2;
#pragma unroll
                    for (int ks = 0; ks < D/16; ++ks) {
#pragma unroll
                        for (int nt = 0; nt < TILE/16; ++nt) {
                            uint32_t b[4];
                            ldmatrix_x4(b, k_s + C::chunk_offset(nt*16 + row, ks*2 + col));
                            mma_16x8x16<bf16>(s[2*nt + 0], q_frag[ks], b[0], b[1]);
                            mma_16x8x16<bf16>(s[2*nt + 1], q_frag[ks], b[2], b[3]);
                            if constexpr (bf16) {
                                mma_16x8x16<bf16>(s[2*nt + 0], q_rest[ks], b[0], b[1]);
                                mma_16x8x16<bf16>(s[2*nt + 1], q_rest[ks], b[2], b[3]);
                            }
                        }
                    }
                }

                if (args.logit_softcap != 0.0f) {
#pragma unroll
                    for (int nt = 0; nt < TILE/8; ++nt) {
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            s[nt][j] = args.logit_softcap*LOG2E*tanhf(s[nt][j]);
                        }
                    }
                }

                if (cell + TILE > n_seen_all) {
#pragma unroll
                    for (int nt = 0; nt < TILE/8; ++nt) {
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            if (cell + nt*8 + fc + j%2 >= n_seen[j/2]) {
                                s[nt][j] = -INFINITY;
                            }
                        }
                    }
                }

                // p = 2^(s - m)
                float alpha[2];
                bool  rescale = false;
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float m_new = m[j];
#pragma unroll
                    for (int nt = 0; nt < TILE/8; ++nt) {
                        m_new = fmaxf(m_new, fmaxf(s[nt][2*j + 0], s[nt][2*j + 1]));
                    }
                    m_new = fmaxf(m_new, __shfl_xor_sync(0xFFFFFFFF, m_new, 1));
                    m_new = fmaxf(m_new, __shfl_xor_sync(0xFFFFFFFF, m_new, 2));

                    const float m_sub = m_new == -INFINITY ? 0.0f : m_new;

                    rescale  = rescale || m_new != m[j];
                    alpha[j] = exp2f(m[j] - m_sub);
                    m[j]     = m_new;
                    l[j]    *= alpha[j];
#pragma unroll
                    for (int nt = 0; nt < TILE/8; ++nt) {
#pragma unroll
                        for (int jj = 0; jj < 2; ++jj) {
                            s[nt][2*j + jj] = exp2f(s[nt][2*j + jj] - m_sub);
                            l[j] += s[nt][2*j + jj];
                        }
                    }
                }

                if (__any_sync(0xFFFFFFFF, rescale)) {
#pragma unroll
                    for (int nt = 0; nt < D/8; ++nt) {
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            o[nt][j] *= alpha[j/2];
                        }
                    }
                }

                // o += p v
                {
                    const int row = lane%8 + lane/8%2*8;
                    const int col = lane/16;
#pragma unroll
                    for (int ks = 0; ks < TILE/16; ++ks) {
                        uint32_t p_frag[4];
                        uint32_t p_rest[4];
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            const float x = s[2*ks + j/2][j%2*2 + 0];
                            const float y = s[2*ks + j/2][j%2*2 + 1];

                            p_frag[j] = bf16 ? pack_bf16(x, y) : pack_f16(x, y);
                            if constexpr (bf16) {
                                p_rest[j] = pack_bf16_rest(x, y, p_frag[j]);
                            }
                        }
#pragma unroll
                        for (int nt = 0; nt < D/16; ++nt) {
                            uint32_t b[4];
                            ldmatrix_x4_trans(b, v_s + C::chunk_offset(ks*16 + row, nt*2 + col));
                            mma_16x8x16<bf16>(o[2*nt + 0], p_frag, b[0], b[1]);
                            mma_16x8x16<bf16>(o[2*nt + 1], p_frag, b[2], b[3]);
                            if constexpr (bf16) {
                                mma_16x8x16<bf16>(o[2*nt + 0], p_rest, b[0], b[1]);
                                mma_16x8x16<bf16>(o[2*nt + 1], p_rest, b[2], b[3]);
                            }
                        }
                    }
                }
            }

#pragma unroll
            for (int j = 0; j < 2; ++j) {
                l[j] += __shfl_xor_sync(0xFFFFFFFF, l[j], 1);
                l[j] += __shfl_xor_sync(0xFFFFFFFF, l[j], 2);
            }

            const int64_t slot    = blockIdx.x + seg*args.n_row_blocks + rb;
            float  *      part_o  = args.part_o  + slot*C::ROWS*D;
            float2 *      part_ml = args.part_ml + slot*C::ROWS;

            cp_async_wait<0>();
            __syncthreads(); // the stages are free

            if constexpr (C::WC == 1) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int r = wm*16 + fr + 8*j;
                    if (rb*C::ROWS + r >= args.n_rows) {
                        continue;
                    }
#pragma unroll
                    for (int nt = 0; nt < D/8; ++nt) {
                        *(float2 *) (part_o + r*D + nt*8 + fc) = make_float2(o[nt][2*j + 0], o[nt][2*j + 1]);
                    }
                    if (fc == 0) {
                        part_ml[r] = make_float2(m[j], l[j]);
                    }
                }
            } else {
                static_assert(C::WM == 1, "bad config");

                const int n_rows = min(args.n_rows - r0, 16);

                float * sm_m = (float *) smem;     // [WC][16]
                float * sm_l = sm_m + C::WC*16;    // [WC][16]
                float * sm_o = sm_l + C::WC*16;    // [WC][16][D]

                if (fc == 0) {
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        sm_m[wc*16 + fr + 8*j] = m[j];
                        sm_l[wc*16 + fr + 8*j] = l[j];
                    }
                }
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int r = fr + 8*j;
                    if (r < n_rows) {
#pragma unroll
                        for (int nt = 0; nt < D/8; ++nt) {
                            *(float2 *) (sm_o + (wc*16 + r)*D + nt*8 + fc) = make_float2(o[nt][2*j + 0], o[nt][2*j + 1]);
                        }
                    }
                }
                __syncthreads();

                merge_warps<D, 16, C::WC>((const float *) smem, n_rows, part_o, part_ml);
            }
            __syncthreads(); // before the next unit writes to the stages
        }
    }
#else
    GGML_UNUSED(args);
    NO_DEVICE_CODE;
#endif // RAGGED_DEVICE_CODE
}

// the maximum that p is relative to may lag behind by this much (of base 2): p is far from the limits of f16 even so, and
// after the first tiles there is next to nothing to rescale
static constexpr float FATTN_MAX_LAG = 6.0f;

template <typename C>
__launch_bounds__(C::N_THREADS)
static __global__ void fattn_ragged_words(const fattn_ragged_args args) {
#ifdef RAGGED_DEVICE_CODE
    constexpr int D      = C::D;
    constexpr int NQ     = C::NQ;
    constexpr int TILE   = C::TILE;
    constexpr int STAGES = C::STAGES;

    extern __shared__ __align__(128) char smem[];

    __shared__ int first_tiles[RAGGED_MAX_SEGS + 1];

    const int lane = threadIdx.x % WARP_SIZE;
    const int warp = threadIdx.x / WARP_SIZE;

    // the place of a thread in the fragments of a matrix
    const int fr = lane / 4;
    const int ft = lane % 4;
    const int fc = 2*ft;

    char * const   stages   = smem + warp*C::GROUP_BYTES;
    const uint32_t stages_s = __cvta_generic_to_shared(stages);

    ggml_cuda_pdl_sync();
    ggml_cuda_pdl_lc(); // all blocks are resident: the next kernel can only start when there is room

    const seg_tiles   tiles(args.segs, args.n_segs, first_tiles, 1, TILE);
    const tile_shares shares(tiles.n_all(), gridDim.x);

    const int t_begin = shares.first(blockIdx.x);
    const int t_end   = shares.first(blockIdx.x + 1);
    if (t_begin == t_end) {
        return;
    }

    for (int seg = tiles.find(t_begin); seg < args.n_segs && tiles.first[seg] < t_end; ++seg) {
        const int lo = max(t_begin - tiles.first[seg], 0);
        const int hi = min(t_end   - tiles.first[seg], tiles.n_tiles(seg));
        if (lo >= hi) {
            continue;
        }

        const int64_t row0    = tiles.row(seg);
        const int     n_cells = tiles.n_cells(seg);

        const tile_stream<C> stream(args, stages_s, row0, n_cells, lo, hi, warp, lane);

        const float q_scale = args.q_scale();

#pragma unroll 1
        for (int r = warp; r < C::ROWS; r += C::WC) {
            const float * row = (const float *) (args.q + args.token(seg, r)*args.nb_q2 + args.head(seg, r)*args.nb_q1);

            float2 q[D/ROT_MIN];
#pragma unroll
            for (int j = 0; j < D/ROT_MIN; ++j) {
                q[j] = r < args.n_rows ? ((const float2 *) row)[j*WARP_SIZE + lane] : make_float2(0.0f, 0.0f);
            }
            if (args.rot_q && r < args.n_rows) {
                hadamard<D/ROT_MIN>(q);
            }
#pragma unroll
            for (int j = 0; j < D/ROT_MIN; ++j) {
                C::query(smem, r)[j*WARP_SIZE + lane] = pack_f16(q_scale*q[j].x, q_scale*q[j].y);
            }
        }
        __syncthreads();

        uint32_t q_frag[NQ][D/16][2];
#pragma unroll
        for (int nq = 0; nq < NQ; ++nq) {
#pragma unroll
            for (int ks = 0; ks < D/16; ++ks) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    q_frag[nq][ks][h] = C::query(smem, nq*8 + fr)[(ks/2*32 + C::element(ks/2%2, ks%2*4 + ft, h))/2];
                }
            }
        }
        __syncthreads(); // the last stages are free

        // the cells that the queries see, and those that all of them do
        int n_seen[NQ][2];
        int n_seen_all = n_cells;
#pragma unroll
        for (int nq = 0; nq < NQ; ++nq) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                n_seen[nq][j] = n_cells - args.n_hidden[args.token(seg, min(nq*8 + fc + j, args.n_rows - 1))];
                n_seen_all    = min(n_seen_all, n_seen[nq][j]);
            }
        }
        n_seen_all = __reduce_min_sync(0xFFFFFFFF, n_seen_all);

        float o[NQ][D/32][2][4] = {}; // of a block of V: rows are bytes 0 and 1 of its words, then 2 and 3
        float m[NQ][2];
        float l[NQ][2] = {};
#pragma unroll
        for (int nq = 0; nq < NQ; ++nq) {
            m[nq][0] = m[nq][1] = -INFINITY;
        }

        for (int i = 0; i < stream.n; ++i) {
            cp_async_wait<STAGES - 2>();
            __syncwarp();

            stream.load(i + STAGES - 1);

            const int    cell = stream.cell(i);
            const char * kv   = stages + i%STAGES*C::STAGE_BYTES;

            const int64_t row = row0 + cell;

            const uint32_t * k = (const uint32_t *) (kv                     + ((uintptr_t) (args.k + row*C::ROW_BYTES) & 15));
            const uint32_t * v = (const uint32_t *) (kv + C::STAGE_BYTES_KV + ((uintptr_t) (args.v + row*C::ROW_BYTES) & 15));

            // s^T = k q^T
            float s[TILE/16][NQ][4] = {};
#pragma unroll
            for (int mt = 0; mt < TILE/16; ++mt) {
#pragma unroll
                for (int pair = 0; pair < D/64; ++pair) {
                    const uint32_t * words[2];
                    uint32_t         word_0[2];
                    half2            d[2];
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        words[r]  = k + C::cell(2*mt + r, fr)*C::ROW_WORDS + pair*C::PAIR_WORDS;
                        word_0[r] = words[r][0];

                        const uint32_t scales = __byte_perm(word_0[r], words[r][C::QW], 0x7610);
                        d[r] = *(const half2 *) &scales;
                    }
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float dot[NQ][4] = {}; // of a block: its scale is that of all products
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
                            half2 a[4];
#pragma unroll
                            for (int r = 0; r < 2; ++r) {
                                const uint32_t b = C::to_bytes(C::load_word(words[r], e, 4*h + ft, word_0[r]), 4*h);

                                a[r]     = bytes_to_half2<0>(b, C::OFFSET);
                                a[r + 2] = bytes_to_half2<1>(b, C::OFFSET);
                            }
#pragma unroll
                            for (int nq = 0; nq < NQ; ++nq) {
                                const uint32_t * q = q_frag[nq][pair*4 + e*2 + h];
                                mma_16x8x16<false>(dot[nq], (const uint32_t *) a, q[0], q[1]);
                            }
                        }
#pragma unroll
                        for (int nq = 0; nq < NQ; ++nq) {
#pragma unroll
                            for (int j = 0; j < 4; ++j) {
                                s[mt][nq][j] += (e == 0 ? __low2float(d[j/2]) : __high2float(d[j/2]))*dot[nq][j];
                            }
                        }
                    }
                }
            }

            if (args.logit_softcap != 0.0f) {
#pragma unroll
                for (int mt = 0; mt < TILE/16; ++mt) {
#pragma unroll
                    for (int nq = 0; nq < NQ; ++nq) {
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            s[mt][nq][j] = args.logit_softcap*LOG2E*tanhf(s[mt][nq][j]);
                        }
                    }
                }
            }

            if (cell + TILE > n_seen_all) {
#pragma unroll
                for (int mt = 0; mt < TILE/16; ++mt) {
#pragma unroll
                    for (int nq = 0; nq < NQ; ++nq) {
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            if (cell + C::cell(2*mt + j/2, fr) >= n_seen[nq][j%2]) {
                                s[mt][nq][j] = -INFINITY;
                            }
                        }
                    }
                }
            }

            float m_new[NQ][2];
            bool  rescale = false;
#pragma unroll
            for (int nq = 0; nq < NQ; ++nq) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    m_new[nq][j] = m[nq][j];
#pragma unroll
                    for (int mt = 0; mt < TILE/16; ++mt) {
                        m_new[nq][j] = fmaxf(m_new[nq][j], fmaxf(s[mt][nq][j], s[mt][nq][j + 2]));
                    }
                    rescale = rescale || m_new[nq][j] > m[nq][j] + FATTN_MAX_LAG;
                }
            }

            if (__any_sync(0xFFFFFFFF, rescale)) {
#pragma unroll
                for (int nq = 0; nq < NQ; ++nq) {
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        float x = m_new[nq][j];
                        x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x,  4));
                        x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x,  8));
                        x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 16));

                        const float alpha = exp2f(m[nq][j] - (x == -INFINITY ? 0.0f : x));

                        m[nq][j]  = x;
                        l[nq][j] *= alpha;
#pragma unroll
                        for (int b = 0; b < D/32; ++b) {
#pragma unroll
                            for (int h = 0; h < 2; ++h) {
                                o[nq][b][h][j]     *= alpha;
                                o[nq][b][h][j + 2] *= alpha;
                            }
                        }
                    }
                }
            }

            // p = 2^(s - m)
#pragma unroll
            for (int nq = 0; nq < NQ; ++nq) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const float m_sub = m[nq][j] == -INFINITY ? 0.0f : m[nq][j];
#pragma unroll
                    for (int mt = 0; mt < TILE/16; ++mt) {
#pragma unroll
                        for (int r = 0; r < 2; ++r) {
                            float & x = s[mt][nq][2*r + j];
                            x = exp2f(x - m_sub);
                            l[nq][j] += x;
                        }
                    }
                }
            }

            // o^T += v^T p^T
#pragma unroll
            for (int mt = 0; mt < TILE/16; ++mt) {
                uint32_t p_frag[NQ][2];
#pragma unroll
                for (int nq = 0; nq < NQ; ++nq) {
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        p_frag[nq][r] = movmatrix_trans(pack_f16(s[mt][nq][2*r + 0], s[mt][nq][2*r + 1]));
                    }
                }
#pragma unroll
                for (int pair = 0; pair < D/64; ++pair) {
                    const uint32_t * words[4];
                    uint32_t         word_0[4];
                    uint32_t         word_qw[4];
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        words[r]   = v + C::cell(2*mt + r/2, fc + r%2)*C::ROW_WORDS + pair*C::PAIR_WORDS;
                        word_0[r]  = words[r][0];
                        word_qw[r] = words[r][C::QW];
                    }
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        half2 a[2][4];
#pragma unroll
                        for (int r = 0; r < 2; ++r) {
                            // two cells
                            const uint32_t x = C::load_word(words[2*r + 0], e, fr, word_0[2*r + 0]);
                            const uint32_t y = C::load_word(words[2*r + 1], e, fr, word_0[2*r + 1]);

                            const uint32_t scales = e == 0 ? __byte_perm(word_0 [2*r], word_0 [2*r + 1], 0x5410) :
                                                             __byte_perm(word_qw[2*r], word_qw[2*r + 1], 0x7632);
                            const half2 d = *(const half2 *) &scales;
#pragma unroll
                            for (int h = 0; h < 2; ++h) {
                                // the same byte of both, then the next one
                                const uint32_t b = C::to_bytes(__byte_perm(x, y, h == 0 ? 0x5140 : 0x7362), fr);

                                a[h][2*r + 0] = __hmul2(d, bytes_to_half2<0>(b, C::OFFSET));
                                a[h][2*r + 1] = __hmul2(d, bytes_to_half2<1>(b, C::OFFSET));
                            }
                        }
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
#pragma unroll
                            for (int nq = 0; nq < NQ; ++nq) {
                                mma_16x8x16<false>(o[nq][2*pair + e][h], (const uint32_t *) a[h], p_frag[nq][0], p_frag[nq][1]);
                            }
                        }
                    }
                }
            }
        }

#pragma unroll
        for (int nq = 0; nq < NQ; ++nq) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                l[nq][j] += __shfl_xor_sync(0xFFFFFFFF, l[nq][j],  4);
                l[nq][j] += __shfl_xor_sync(0xFFFFFFFF, l[nq][j],  8);
                l[nq][j] += __shfl_xor_sync(0xFFFFFFFF, l[nq][j], 16);
            }
        }

        cp_async_wait<0>();
        __syncthreads(); // the stages are free

        float * sm_m = (float *) smem;
        float * sm_l = sm_m + C::WC*C::ROWS;
        float * sm_o = sm_l + C::WC*C::ROWS;

#pragma unroll
        for (int nq = 0; nq < NQ; ++nq) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int r = nq*8 + fc + j;
                if (r >= args.n_rows) {
                    continue;
                }
                const int i = warp*C::ROWS + r;
                if (fr == 0) {
                    sm_m[i] = m[nq][j];
                    sm_l[i] = l[nq][j];
                }
#pragma unroll
                for (int b = 0; b < D/32; ++b) {
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        *(float2 *) (sm_o + i*D + b*32 + C::element(b%2, fr, h)) = make_float2(o[nq][b][h][j], o[nq][b][h][j + 2]);
                    }
                }
            }
        }
        __syncthreads();

        const int64_t slot = blockIdx.x + seg;

        merge_warps<D, C::ROWS, C::WC>((const float *) smem, args.n_rows, args.part_o + slot*C::ROWS*D, args.part_ml + slot*C::ROWS);

        __syncthreads(); // before the next unit writes to the stages
    }
#else
    GGML_UNUSED(args);
    NO_DEVICE_CODE;
#endif // RAGGED_DEVICE_CODE
}

// the partial results of a unit
struct unit_parts {
    tile_shares shares;

    int n      = 0;
    int block0 = 0;
    int slot0  = 0;

    // first_tiles: shared memory
    __device__ __forceinline__ unit_parts(
            const fattn_ragged_args & args, const int tile_size, const int n_blocks, const int seg, const int rb, int * first_tiles) :
        unit_parts(args, seg_tiles(args.segs, args.n_segs, first_tiles, args.n_row_blocks, tile_size), n_blocks, seg, rb) {}

    __device__ __forceinline__ unit_parts(
            const fattn_ragged_args & args, const seg_tiles & tiles, const int n_blocks, const int seg, const int rb) :
        shares(tiles.n_all(), n_blocks) {
        const int n_tiles = tiles.n_tiles(seg)/args.n_row_blocks;
        if (n_tiles == 0) {
            return;
        }
        const int t0 = tiles.first[seg] + rb*n_tiles;

        block0 = shares.block(t0);
        n      = shares.block(t0 + n_tiles - 1) - block0 + 1;
        slot0  = block0 + seg*args.n_row_blocks + rb;
    }

    __device__ __forceinline__ float2 load_ml(const fattn_ragged_args & args, const int i, const int n_rows_unit, const int r) const {
        // with few tiles some blocks have none
        return shares.empty(block0 + i) ? make_float2(-INFINITY, 0.0f) : args.part_ml[(slot0 + i)*n_rows_unit + r%n_rows_unit];
    }
};

static constexpr int COMBINE_THREADS = 256;

// few queries, many partial results: one block for each query and WIDTH columns
// rot - these columns are multiplied with the Walsh-Hadamard matrix
template <int D, int WIDTH, bool rot>
__launch_bounds__(COMBINE_THREADS)
static __global__ void fattn_ragged_combine_parts(
        const fattn_ragged_args args,
        float       * dst,     // [D, n_head, n_tokens]
        const float * sinks,   // [n_head], or nullptr
        const int     n_blocks,
        const int     n_rows_unit,
        const int     tile_size) {
    extern __shared__ float weights[]; // [n_blocks]

    __shared__ int   first_tiles[RAGGED_MAX_SEGS + 1];
    __shared__ __align__(sizeof(float2)) float acc[COMBINE_THREADS];

    const int seg  = blockIdx.x / args.n_rows;
    const int r    = blockIdx.x % args.n_rows;
    const int head = args.head(seg, r);

    // what was there before the kernel that wrote the partial results
    const unit_parts parts(args, tile_size, n_blocks, seg, r/n_rows_unit, first_tiles);

    const float sink = sinks ? sinks[head]*LOG2E : -INFINITY;

    ggml_cuda_pdl_sync();
    ggml_cuda_pdl_lc();

    // each warp finds the maximum and the sum of all
    float m = sink;
    for (int i = threadIdx.x % WARP_SIZE; i < parts.n; i += WARP_SIZE) {
        m = fmaxf(m, parts.load_ml(args, i, n_rows_unit, r).x);
    }
    m = warp_reduce_max(m);

    float l = 0.0f;
    for (int i = threadIdx.x % WARP_SIZE; i < parts.n; i += WARP_SIZE) {
        const float2 ml = parts.load_ml(args, i, n_rows_unit, r);
        const float  w  = ml.x == -INFINITY ? 0.0f : exp2f(ml.x - m);

        weights[i] = w; // the same from all warps
        l += w*ml.y;
    }
    l = warp_reduce_sum(l);
    if (sinks) {
        l += exp2f(sink - m);
    }
    __syncthreads();

    constexpr int n_groups = COMBINE_THREADS/WIDTH;

    const int d = blockIdx.y*WIDTH + threadIdx.x%WIDTH;

    const float * part_o = args.part_o + ((int64_t) parts.slot0*n_rows_unit + r%n_rows_unit)*D + d;

    float o = 0.0f;
#pragma unroll 8
    for (int i = threadIdx.x/WIDTH; i < parts.n; i += n_groups) {
        const float w = weights[i];
        const float x = part_o[(int64_t) i*n_rows_unit*D];
        o += w == 0.0f ? 0.0f : w*x; // what was not written may be NaN
    }
    acc[threadIdx.x] = o;
    __syncthreads();

    float * row = dst + ((int64_t) args.token(seg, r)*args.n_head_kv*args.n_gqa + head)*D;

    if constexpr (rot) {
        static_assert(WIDTH == ROT_MIN, "bad width");

        if (threadIdx.x < WARP_SIZE) {
            float2 sum[1] = {};
#pragma unroll
            for (int g = 0; g < n_groups; ++g) {
                const float2 x = ((const float2 *) acc)[g*WARP_SIZE + threadIdx.x];
                sum[0].x += x.x;
                sum[0].y += x.y;
            }
            hadamard<1>(sum);

            const float inv = l > 0.0f ? 1.0f/l : 0.0f;
            ((float2 *) row)[blockIdx.y*WARP_SIZE + threadIdx.x] = make_float2(inv*sum[0].x, inv*sum[0].y);
        }
    } else if (threadIdx.x < WIDTH) {
#pragma unroll
        for (int g = 1; g < n_groups; ++g) {
            o += acc[g*WIDTH + threadIdx.x];
        }
        row[d] = l > 0.0f ? o/l : 0.0f;
    }
}

// many queries, few partial results: one warp for each query
// rot - each ROT_MIN columns are multiplied with the Walsh-Hadamard matrix
template <int D, bool rot>
__launch_bounds__(COMBINE_THREADS)
static __global__ void fattn_ragged_combine_rows(
        const fattn_ragged_args args,
        float       * dst,
        const float * sinks,
        const int     n_blocks,
        const int     n_rows_unit,
        const int     tile_size) {
    __shared__ int first_tiles[RAGGED_MAX_SEGS + 1];

    // the rows of a block belong to one unit
    const int seg = blockIdx.y;
    const int r   = blockIdx.x*(COMBINE_THREADS/WARP_SIZE) + threadIdx.x/WARP_SIZE;
    const int rb  = blockIdx.x*(COMBINE_THREADS/WARP_SIZE) / n_rows_unit;

    const unit_parts parts(args, tile_size, n_blocks, seg, rb, first_tiles);

    ggml_cuda_pdl_sync();
    ggml_cuda_pdl_lc();

    if (r >= args.n_rows) {
        return;
    }

    const int   lane = threadIdx.x % WARP_SIZE;
    const int   head = args.head(seg, r);
    const float sink = sinks ? sinks[head]*LOG2E : -INFINITY;

    float m = sink;
    for (int i = lane; i < parts.n; i += WARP_SIZE) {
        m = fmaxf(m, parts.load_ml(args, i, n_rows_unit, r).x);
    }
    m = warp_reduce_max(m);

    constexpr int N = (D/2 + WARP_SIZE - 1)/WARP_SIZE;

    float2 o[N] = {};
    float  l    = sinks ? exp2f(sink - m) : 0.0f;

    for (int i = 0; i < parts.n; ++i) {
        const float2 ml = parts.load_ml(args, i, n_rows_unit, r);
        if (ml.x == -INFINITY) {
            continue;
        }
        const float w = exp2f(ml.x - m);
        l += w*ml.y;

        const float2 * part_o = (const float2 *) (args.part_o + ((int64_t) (parts.slot0 + i)*n_rows_unit + r%n_rows_unit)*D);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const int d = j*WARP_SIZE + lane;
            if (D/2 % WARP_SIZE == 0 || d < D/2) {
                const float2 x = part_o[d];
                o[j].x += w*x.x;
                o[j].y += w*x.y;
            }
        }
    }

    const float inv = l > 0.0f ? 1.0f/l : 0.0f;
#pragma unroll
    for (int j = 0; j < N; ++j) {
        if constexpr (rot) {
            hadamard<1>(o + j);
        }
        const int d = j*WARP_SIZE + lane;
        if (D/2 % WARP_SIZE == 0 || d < D/2) {
            ((float2 *) (dst + ((int64_t) args.token(seg, r)*args.n_head_kv*args.n_gqa + head)*D))[d] = make_float2(inv*o[j].x, inv*o[j].y);
        }
    }
}

// many queries: rotated before they are read again and again. one warp for each
template <int D>
__launch_bounds__(COMBINE_THREADS)
static __global__ void fattn_ragged_rotate_q(const fattn_ragged_args args, float * dst, const int n_rows) {
    const int row  = (blockIdx.x*COMBINE_THREADS + threadIdx.x)/WARP_SIZE;
    const int lane = threadIdx.x % WARP_SIZE;

    ggml_cuda_pdl_sync();
    ggml_cuda_pdl_lc();

    if (row >= n_rows) {
        return;
    }
    const int n_head = args.n_head_kv*args.n_gqa;

    const float2 * src = (const float2 *) (args.q + row/n_head*args.nb_q2 + row%n_head*args.nb_q1);

    float2 q[D/ROT_MIN];
#pragma unroll
    for (int j = 0; j < D/ROT_MIN; ++j) {
        q[j] = src[j*WARP_SIZE + lane];
    }
    hadamard<D/ROT_MIN>(q);
#pragma unroll
    for (int j = 0; j < D/ROT_MIN; ++j) {
        ((float2 *) (dst + (int64_t) row*D))[j*WARP_SIZE + lane] = q[j];
    }
}

// blocks that the device runs at a time
static int n_blocks_resident(const void * kernel, const int n_threads, const int smem_bytes) {
    static std::mutex mutex;
    static std::map<std::pair<int, const void *>, int> cache;

    const int device = ggml_cuda_get_device();

    std::lock_guard<std::mutex> lock(mutex);

    int & res = cache[{ device, kernel }];
    if (res == 0) {
        if (smem_bytes > 0) {
            CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes));
        }
        int n = 0;
        CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n, kernel, n_threads, smem_bytes));
        GGML_ASSERT(n > 0);
        res = n*ggml_cuda_info().devices[device].nsm;
    }
    return res;
}

template <typename C>
static void launch_fattn_ragged(
        void (* kernel)(fattn_ragged_args), ggml_backend_cuda_context & ctx, ggml_tensor * dst, fattn_ragged_args args) {
    args.n_row_blocks = (args.n_rows + C::ROWS - 1)/C::ROWS;

    const int    n_blocks = n_blocks_resident((const void *) kernel, C::N_THREADS, C::SMEM_BYTES);
    const size_t n_parts  = size_t(n_blocks + args.n_segs*args.n_row_blocks)*C::ROWS;

    ggml_cuda_pool_alloc<float>  part_o (ctx.pool(), n_parts*C::D);
    ggml_cuda_pool_alloc<float2> part_ml(ctx.pool(), n_parts);

    args.part_o  = part_o.get();
    args.part_ml = part_ml.get();

    ggml_cuda_kernel_launch(kernel, { dim3(n_blocks), C::N_THREADS, C::SMEM_BYTES, ctx.stream() }, args);

    float       * res   = (float *) dst->data;
    const float * sinks = dst->src[5] ? (const float *) dst->src[5]->data : nullptr;

    constexpr bool can_rot = C::D % ROT_MIN == 0;

    const bool rot = can_rot && ggml_get_op_params_i32(dst, 3) > 0;

    if constexpr (C::WM == 1) {
        constexpr int WIDTH     = C::D % 32 == 0 ? 32 : 16;
        constexpr int WIDTH_ROT = can_rot ? ROT_MIN : WIDTH;

        const dim3 grid(args.n_segs*args.n_rows, C::D/(rot ? WIDTH_ROT : WIDTH));
        ggml_cuda_kernel_launch(rot ? fattn_ragged_combine_parts<C::D, WIDTH_ROT, can_rot> : fattn_ragged_combine_parts<C::D, WIDTH, false>,
                { grid, COMBINE_THREADS, n_blocks*(int) sizeof(float), ctx.stream() }, args, res, sinks, n_blocks, C::ROWS, C::TILE);
    } else {
        constexpr int rows_block = COMBINE_THREADS/WARP_SIZE;
        static_assert(C::ROWS % rows_block == 0, "bad config");

        const dim3 grid((args.n_rows + rows_block - 1)/rows_block, args.n_segs);
        ggml_cuda_kernel_launch(rot ? fattn_ragged_combine_rows<C::D, can_rot> : fattn_ragged_combine_rows<C::D, false>,
                { grid, COMBINE_THREADS, 0, ctx.stream() }, args, res, sinks, n_blocks, C::ROWS, C::TILE);
    }
}

template <ggml_type type, int D, int NQ>
static void launch_fattn_ragged_words(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fattn_ragged_args & args) {
    // two blocks for a multiprocessor of Hopper, one for those with 100 KiB
    constexpr int WC   = D > 128 ? 3 : 6;
    constexpr int TILE = D > 64 ? 16 : 32;

    using C = fattn_ragged_words_config<type, D, NQ, WC, TILE, 3>;

    launch_fattn_ragged<C>(fattn_ragged_words<C>, ctx, dst, args);
}

template <ggml_type type, int D>
static void launch_fattn_ragged(ggml_backend_cuda_context & ctx, ggml_tensor * dst, fattn_ragged_args args) {
    constexpr bool words = (type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0) && D % 64 == 0;

    if constexpr (words) {
        if (args.n_rows <= 8) {
            launch_fattn_ragged_words<type, D, 1>(ctx, dst, args);
            return;
        }
        if (args.n_rows <= 16) {
            launch_fattn_ragged_words<type, D, 2>(ctx, dst, args);
            return;
        }
    }

    // the other kernel does not rotate queries
    ggml_cuda_pool_alloc<float> q_rot(ctx.pool());
    if constexpr (D % ROT_MIN == 0) {
        if (args.rot_q) {
            const int n_rows = ggml_nrows(dst);
            ggml_cuda_kernel_launch(fattn_ragged_rotate_q<D>,
                    { dim3((n_rows*WARP_SIZE + COMBINE_THREADS - 1)/COMBINE_THREADS), COMBINE_THREADS, 0, ctx.stream() },
                    args, q_rot.alloc(n_rows*D), n_rows);

            args.q     = (const char *) q_rot.get();
            args.nb_q1 = D*sizeof(float);
            args.nb_q2 = args.nb_q1*args.n_head_kv*args.n_gqa;
        }
    }

    if constexpr (!words) {
        if (args.n_rows <= 16) {
            // 96 KiB of shared memory, which every device since Ampere has
            constexpr int WC   = D > 128 ? 2 : 4;
            constexpr int TILE = D > 64 ? 16 : 32;

            using C = fattn_ragged_config<type, D, 1, WC, TILE, 3>;

            launch_fattn_ragged<C>(fattn_ragged<C>, ctx, dst, args);
            return;
        }
    }

    constexpr int TILE = D > 128 ? 32 : 64;

    using C = fattn_ragged_config<type, D, 8, 1, TILE, 2>;

    launch_fattn_ragged<C>(fattn_ragged<C>, ctx, dst, args);
}

template <ggml_type type>
static void launch_fattn_ragged(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fattn_ragged_args & args) {
    switch (dst->src[1]->ne[0]) {
        case  64: launch_fattn_ragged<type,  64>(ctx, dst, args); break;
        case  96: launch_fattn_ragged<type,  96>(ctx, dst, args); break;
        case 128: launch_fattn_ragged<type, 128>(ctx, dst, args); break;
        case 256: launch_fattn_ragged<type, 256>(ctx, dst, args); break;
        case  80:
            if constexpr (type == GGML_TYPE_F16 || type == GGML_TYPE_BF16) {
                launch_fattn_ragged<type, 80>(ctx, dst, args);
                break;
            }
        default: GGML_ABORT("fatal error");
    }
}

void ggml_cuda_flash_attn_ragged(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
#ifdef RAGGED_AVAILABLE
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * v    = dst->src[2];
    const ggml_tensor * segs = dst->src[3];

    fattn_ragged_args args = {};

    args.q        = (const char *)    q->data;
    args.k        = (const char *)    k->data;
    args.v        = (const char *)    v->data;
    args.segs     = (const int32_t *) segs->data;
    args.n_hidden = (const int32_t *) dst->src[4]->data;
    args.nb_q1    = q->nb[1];
    args.nb_q2    = q->nb[2];

    args.n_segs    = segs->ne[1]*segs->ne[2];
    args.n_head_kv = segs->ne[1];
    args.n_gqa     = q->ne[1]/segs->ne[1];
    args.n_tokens  = q->ne[2]/segs->ne[2];
    args.n_rows    = args.n_gqa*args.n_tokens;

    args.scale         = ggml_get_op_params_f32(dst, 0);
    args.logit_softcap = ggml_get_op_params_f32(dst, 1);
    args.rot_q         = ggml_get_op_params_i32(dst, 2) > 0;

    // with many queries a tile would be dequantised again and again
    ggml_cuda_pool_alloc<half> k_f16(ctx.pool());
    ggml_cuda_pool_alloc<half> v_f16(ctx.pool());

    ggml_type type = k->type;
    if (ggml_is_quantized(type) && args.n_rows > FATTN_CONVERT_ROWS) {
        const to_fp16_cuda_t to_fp16 = ggml_get_to_fp16_cuda(type);

        to_fp16(k->data, k_f16.alloc(ggml_nelements(k)), ggml_nelements(k), ctx.stream());
        to_fp16(v->data, v_f16.alloc(ggml_nelements(v)), ggml_nelements(v), ctx.stream());

        args.k = (const char *) k_f16.get();
        args.v = (const char *) v_f16.get();

        type = GGML_TYPE_F16;
    }

    switch (type) {
        case GGML_TYPE_F16:  launch_fattn_ragged<GGML_TYPE_F16> (ctx, dst, args); break;
        case GGML_TYPE_BF16: launch_fattn_ragged<GGML_TYPE_BF16>(ctx, dst, args); break;
        case GGML_TYPE_Q8_0: launch_fattn_ragged<GGML_TYPE_Q8_0>(ctx, dst, args); break;
        case GGML_TYPE_Q4_0: launch_fattn_ragged<GGML_TYPE_Q4_0>(ctx, dst, args); break;
        default: GGML_ABORT("fatal error");
    }
#else
    GGML_UNUSED_VARS(ctx, dst);
    GGML_ABORT("not available");
#endif // RAGGED_AVAILABLE
}

//
// new rows of K and V
//

static constexpr int STORE_THREADS = 128;

struct store_ragged_args {
    struct rows {
        const char * cur;   // F32 [D, n_head, n_tokens]
        char       * cells;
        int64_t      nb1;   // of cur
        int64_t      nb2;
        bool         rot;
    };
    rows k;
    rows v;

    const int32_t * idxs;

    int n_head;
    int n_rows; // n_head*n_tokens
};

// a warp reads and rotates a row, a thread quantises a block
template <ggml_type type, int D>
__launch_bounds__(STORE_THREADS)
static __global__ void store_ragged(const store_ragged_args args) {
    constexpr bool quantized = type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0;

    constexpr int N       = (D/2 + WARP_SIZE - 1)/WARP_SIZE;
    constexpr int N_WARPS = STORE_THREADS/WARP_SIZE;
    constexpr int QK      = QK8_0;
    static_assert(QK8_0 == QK4_0, "bad block");

    __shared__ float blocks[quantized ? N_WARPS*D/QK : 1][QK + 1]; // in different banks

    const int warp = threadIdx.x / WARP_SIZE;
    const int lane = threadIdx.x % WARP_SIZE;

    const bool is_k = blockIdx.y == 0;

    const store_ragged_args::rows rows = is_k ? args.k : args.v;

    const int r0 = blockIdx.x*N_WARPS;
    const int r  = r0 + warp;

    ggml_cuda_pdl_sync();
    ggml_cuda_pdl_lc();

    const auto cell = [&](const int r) { return rows.cells + args.idxs[r]*(int64_t) row_bytes(type, D); };

    if (r < args.n_rows) {
        const float2 * src = (const float2 *) (rows.cur + r/args.n_head*rows.nb2 + r%args.n_head*rows.nb1);

        float2 x[N];
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const int d = j*WARP_SIZE + lane;
            x[j] = D/2 % WARP_SIZE == 0 || d < D/2 ? src[d] : make_float2(0.0f, 0.0f);
        }
        if constexpr (D % ROT_MIN == 0) {
            if (rows.rot && is_k) {
                hadamard<N>(x);
            } else if (rows.rot) {
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    hadamard<1>(x + j);
                }
            }
        }
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const int d = j*WARP_SIZE + lane;
            if (D/2 % WARP_SIZE != 0 && d >= D/2) {
                continue;
            }
            if constexpr (type == GGML_TYPE_F16) {
                ((half2 *) cell(r))[d] = ggml_cuda_cast<half2>(x[j]);
            } else if constexpr (type == GGML_TYPE_BF16) {
                ((nv_bfloat162 *) cell(r))[d] = ggml_cuda_cast<nv_bfloat162>(x[j]);
            } else {
                float * block = blocks[(warp*D + 2*d)/QK] + 2*d%QK;
                block[0] = x[j].x;
                block[1] = x[j].y;
            }
        }
    }

    if constexpr (quantized) {
        __syncthreads();

        for (int b = threadIdx.x; b < N_WARPS*D/QK && r0 + b*QK/D < args.n_rows; b += STORE_THREADS) {
            char * row = cell(r0 + b*QK/D);

            if constexpr (type == GGML_TYPE_Q8_0) {
                quantize_f32_q8_0_block(blocks[b], (block_q8_0 *) row + b%(D/QK));
            } else {
                quantize_f32_q4_0_block(blocks[b], (block_q4_0 *) row + b%(D/QK));
            }
        }
    }
}

template <ggml_type type, int D>
static void launch_store_ragged(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const auto rows = [&](const int i) {
        const ggml_tensor * cur = dst->src[i];
        return store_ragged_args::rows {
            (const char *) cur->data, (char *) dst->src[2 + i]->data, (int64_t) cur->nb[1], (int64_t) cur->nb[2], ggml_get_op_params_i32(dst, i) > 0,
        };
    };

    store_ragged_args args = {};

    args.k      = rows(0);
    args.v      = rows(1);
    args.idxs   = (const int32_t *) dst->src[4]->data;
    args.n_head = dst->src[0]->ne[1];
    args.n_rows = ggml_nelements(dst->src[4]);

    constexpr int n_warps = STORE_THREADS/WARP_SIZE;

    ggml_cuda_kernel_launch(store_ragged<type, D>, { dim3((args.n_rows + n_warps - 1)/n_warps, 2), STORE_THREADS, 0, ctx.stream() }, args);
}

template <ggml_type type>
static void launch_store_ragged(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    switch (dst->src[2]->ne[0]) {
        case  64: launch_store_ragged<type,  64>(ctx, dst); break;
        case  96: launch_store_ragged<type,  96>(ctx, dst); break;
        case 128: launch_store_ragged<type, 128>(ctx, dst); break;
        case 256: launch_store_ragged<type, 256>(ctx, dst); break;
        case  80:
            if constexpr (type == GGML_TYPE_F16 || type == GGML_TYPE_BF16) {
                launch_store_ragged<type, 80>(ctx, dst);
                break;
            }
        default: GGML_ABORT("fatal error");
    }
}

void ggml_cuda_store_ragged(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    switch (dst->type) {
        case GGML_TYPE_F16:  launch_store_ragged<GGML_TYPE_F16> (ctx, dst); break;
        case GGML_TYPE_BF16: launch_store_ragged<GGML_TYPE_BF16>(ctx, dst); break;
        case GGML_TYPE_Q8_0: launch_store_ragged<GGML_TYPE_Q8_0>(ctx, dst); break;
        case GGML_TYPE_Q4_0: launch_store_ragged<GGML_TYPE_Q4_0>(ctx, dst); break;
        default: GGML_ABORT("fatal error");
    }
}

//
// KeyDiff
//

// 8 threads per row
static constexpr int KEYDIFF_THREADS = 256;
static constexpr int KEYDIFF_TILE    = 64;

struct keydiff_args {
    const char    * k;
    const int32_t * segs;

    const float * anchors; // [n_segs][D]

    float * scores; // [n_rows]

    int n_segs;
};

// calls f(segment, row, number of rows) for the parts of the segments that the block has
template <typename F>
static __device__ __forceinline__ void for_each_part(const seg_tiles & tiles, const F & f) {
    const tile_shares shares(tiles.n_all(), gridDim.x);

    const int t_begin = shares.first(blockIdx.x);
    const int t_end   = shares.first(blockIdx.x + 1);
    if (t_begin == t_end) {
        return;
    }

    const int first = tiles.find(t_begin);
    const int last  = tiles.find(t_end - 1);
    for (int seg = first; seg <= last; ++seg) {
        const int lo  = max(t_begin - tiles.first[seg], 0);
        const int hi  = min(t_end   - tiles.first[seg], tiles.n_tiles(seg));

        if (lo < hi) {
            const int cell = lo*KEYDIFF_TILE;
            f(seg, (int64_t) tiles.row(seg) + cell, min(hi*KEYDIFF_TILE, tiles.n_cells(seg)) - cell);
        }
    }
}

template <int n_threads>
static __device__ __forceinline__ float sum_threads(float x) {
#pragma unroll
    for (int i = 1; i < n_threads; i *= 2) {
        x += __shfl_xor_sync(0xFFFFFFFF, x, i, WARP_SIZE);
    }
    return x;
}

// a row, and the inverse of its length
template <ggml_type type, int D>
static __device__ __forceinline__ float load_row(const char * row, const int sub, float res[][8]) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < (D/8 + 7)/8; ++j) {
        if (8*j + sub < D/8) {
            load_chunk_f32<type>(row, 8*j + sub, res[j]);
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                res[j][i] = 0.0f;
            }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            sum += res[j][i]*res[j][i];
        }
    }
    sum = sum_threads<8>(sum);
    return sum > 0.0f ? rsqrtf(sum) : 0.0f;
}

template <ggml_type type, int D>
__launch_bounds__(KEYDIFF_THREADS)
static __global__ void keydiff_score(const keydiff_args args) {
    constexpr int NJ = (D/8 + 7)/8;

    __shared__ int first_tiles[RAGGED_MAX_SEGS + 1];

    ggml_cuda_pdl_sync();

    const seg_tiles tiles(args.segs, args.n_segs, first_tiles, 1, KEYDIFF_TILE);

    const int sub  = threadIdx.x % 8;
    const int slot = threadIdx.x / 8;

    for_each_part(tiles, [&](const int seg, const int64_t row, const int n) {
        float anchor[NJ][8] = {};
#pragma unroll
        for (int j = 0; j < NJ; ++j) {
            if (8*j + sub < D/8) {
                load_chunk_f32<GGML_TYPE_F32>((const char *) (args.anchors + seg*D), 8*j + sub, anchor[j]);
            }
        }

        // all threads of a warp take part in the sums
        for (int i0 = 0; i0 < n; i0 += KEYDIFF_THREADS/8) {
            const int i = i0 + slot;

            float       k[NJ][8];
            const float inv = load_row<type, D>(args.k + (row + min(i, n - 1))*row_bytes(type, D), sub, k);

            float dot = 0.0f;
#pragma unroll
            for (int j = 0; j < NJ; ++j) {
#pragma unroll
                for (int c = 0; c < 8; ++c) {
                    dot += anchor[j][c]*k[j][c];
                }
            }
            dot = sum_threads<8>(dot);

            if (i < n && sub == 0) {
                args.scores[row + i] = -inv*dot;
            }
        }
    });
}

// calls f(type, D) for rows that scores are made of, both as integral constants
template <ggml_type type, typename F>
static void with_rows_of(const int d, const F & f) {
    constexpr std::integral_constant<ggml_type, type> t;

    switch (d) {
        case  64: f(t, std::integral_constant<int,  64>()); break;
        case  96: f(t, std::integral_constant<int,  96>()); break;
        case 128: f(t, std::integral_constant<int, 128>()); break;
        case 256: f(t, std::integral_constant<int, 256>()); break;
        case  80:
            if constexpr (type != GGML_TYPE_Q8_0 && type != GGML_TYPE_Q4_0) {
                f(t, std::integral_constant<int, 80>());
                break;
            }
        default: GGML_ABORT("fatal error");
    }
}

template <typename F>
static void with_rows(const ggml_tensor * k, const F & f) {
    switch (k->type) {
        case GGML_TYPE_F32:  with_rows_of<GGML_TYPE_F32> (k->ne[0], f); break;
        case GGML_TYPE_F16:  with_rows_of<GGML_TYPE_F16> (k->ne[0], f); break;
        case GGML_TYPE_BF16: with_rows_of<GGML_TYPE_BF16>(k->ne[0], f); break;
        case GGML_TYPE_Q8_0: with_rows_of<GGML_TYPE_Q8_0>(k->ne[0], f); break;
        case GGML_TYPE_Q4_0: with_rows_of<GGML_TYPE_Q4_0>(k->ne[0], f); break;
        default: GGML_ABORT("fatal error");
    }
}

template <ggml_type type, int D>
static void launch_keydiff(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    keydiff_args args = {};

    args.k       = (const char *)    dst->src[0]->data;
    args.segs    = (const int32_t *) dst->src[1]->data;
    args.anchors = (const float *)   dst->src[2]->data;
    args.scores  = (float *)         dst->data;
    args.n_segs  = dst->src[1]->ne[1];

    const int n_blocks = n_blocks_resident((const void *) keydiff_score<type, D>, KEYDIFF_THREADS, 0);

    ggml_cuda_kernel_launch(keydiff_score<type, D>, { dim3(n_blocks), KEYDIFF_THREADS, 0, ctx.stream() }, args);
}

void ggml_cuda_keydiff_ragged(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    with_rows(dst->src[0], [&](auto type, auto d) { launch_keydiff<type(), d()>(ctx, dst); });
}

//
// the smallest of each segment
//

static constexpr int BOTTOM_K_THREADS = 1024;
static constexpr int BOTTOM_K_BITS    = 11; // per pass
static constexpr int BOTTOM_K_UNROLL  = 4;

// the order of the numbers as that of unsigned integers, NaN first
static __device__ __forceinline__ uint32_t float_to_ordered(const float x) {
    const uint32_t u = __float_as_uint(x);
    return isnan(x) ? 0 : u & 0x80000000 ? ~u : u | 0x80000000;
}

// not the rows of the k smallest, but new scores for all: `chosen` for the others, (score + epsilon)*norm or 0 for them
struct choice_args {
    float         * dst;
    const float   * norms;   // of all rows, or nullptr
    const int32_t * n_first; // [n_segs]: the others

    float epsilon;
    float chosen;
};

// one block for each segment: radix select
template <bool is_choice>
__launch_bounds__(BOTTOM_K_THREADS)
static __global__ void bottom_k_ragged(const float * x, const int32_t * segs, int32_t * dst, const int k_max, const choice_args choice) {
    constexpr int n_bins  = 1 << BOTTOM_K_BITS;
    constexpr int n_warps = BOTTOM_K_THREADS/WARP_SIZE;
    static_assert(n_warps == WARP_SIZE, "one lane for each warp");

    __shared__ uint32_t hist[n_bins];
    __shared__ uint32_t sums[2][n_warps];
    __shared__ uint32_t sh_prefix;
    __shared__ int      sh_rest;

    const int tid  = threadIdx.x;
    const int lane = tid % WARP_SIZE;
    const int warp = tid / WARP_SIZE;

    // segs: first row, cells, and how many to find; of a choice KV head, row of the norms, and cells: its scores are one behind the other
    const int n = segs[3*blockIdx.x + (is_choice ? 2 : 1)];
    const int k = is_choice ? n - min(choice.n_first[blockIdx.x], n) : min(segs[3*blockIdx.x + 2], n);

    int64_t first = is_choice ? 0 : segs[3*blockIdx.x];
    if constexpr (is_choice) {
        for (int s = 0; s < blockIdx.x; ++s) {
            first += segs[3*s + 2];
        }
    } else {
        dst += (int64_t) blockIdx.x*k_max;

        for (int i = tid + k; i < k_max; i += BOTTOM_K_THREADS) {
            dst[i] = -1;
        }
    }
    x += first;

    const auto choose = [&](const int i, const bool is_smallest) {
        const float norm = choice.norms ? choice.norms[(int64_t) segs[3*blockIdx.x + 1] + i] : 0.0f;

        choice.dst[first + i] = !is_smallest ? choice.chosen : choice.norms ? (x[i] + choice.epsilon)*norm : 0.0f;
    };
    GGML_UNUSED(choose);

    if (k <= 0) {
        if constexpr (is_choice) {
            for (int i = tid; i < n; i += BOTTOM_K_THREADS) {
                choose(i, false);
            }
        }
        return;
    }

    uint32_t prefix = 0; // first bits of the k-th smallest number
    int      rest   = k; // how many of the numbers that begin with them

    for (int end = 32; end > 0; end -= BOTTOM_K_BITS) {
        const int shift = max(end - BOTTOM_K_BITS, 0);

        for (int i = tid; i < n_bins; i += BOTTOM_K_THREADS) {
            hist[i] = 0;
        }
        __syncthreads();

        for (int i0 = 0; i0 < n; i0 += BOTTOM_K_UNROLL*BOTTOM_K_THREADS) {
            float values[BOTTOM_K_UNROLL];
#pragma unroll
            for (int j = 0; j < BOTTOM_K_UNROLL; ++j) {
                const int i = i0 + j*BOTTOM_K_THREADS + tid;
                values[j] = i < n ? x[i] : 0.0f;
            }
#pragma unroll
            for (int j = 0; j < BOTTOM_K_UNROLL; ++j) {
                const uint32_t u     = float_to_ordered(values[j]);
                const bool     match = i0 + j*BOTTOM_K_THREADS + tid < n && (end == 32 || u >> end == prefix);
                const uint32_t bin   = u >> shift & ((1u << (end - shift)) - 1);

                // scores are close to each other: most of a warp meets in one bin
                const uint32_t same = __match_any_sync(0xFFFFFFFF, match ? bin : n_bins);
                if (match && lane == __ffs(same) - 1) {
                    atomicAdd(&hist[bin], __popc(same));
                }
            }
        }
        __syncthreads();

        if (warp == 0) {
            constexpr int n_bins_lane = n_bins/WARP_SIZE;

            uint32_t sum = 0;
            for (int i = 0; i < n_bins_lane; ++i) {
                sum += hist[lane*n_bins_lane + i];
            }
            const int before = warp_prefix_sum(sum) - sum;
            if (before < rest && rest <= before + (int) sum) {
                int bin = lane*n_bins_lane;
                int r   = rest - before;
                while (r > (int) hist[bin]) {
                    r -= hist[bin++];
                }
                sh_prefix = prefix << (end - shift) | bin;
                sh_rest   = r;
            }
        }
        __syncthreads();

        prefix = sh_prefix;
        rest   = sh_rest;
    }

    // the smaller ones, and the first ones of those that are equal
    int n_less  = 0;
    int n_equal = 0;
    for (int i0 = 0, buf = 0; i0 < n; i0 += BOTTOM_K_THREADS, buf ^= 1) {
        const int      i     = i0 + tid;
        const uint32_t u     = i < n ? float_to_ordered(x[i]) : 0xFFFFFFFF;
        const bool     less  = i < n && u <  prefix;
        const bool     equal = i < n && u == prefix;

        const uint32_t less_mask  = __ballot_sync(0xFFFFFFFF, less);
        const uint32_t equal_mask = __ballot_sync(0xFFFFFFFF, equal);
        if (lane == 0) {
            sums[buf][warp] = __popc(less_mask) | __popc(equal_mask) << 16;
        }
        __syncthreads();

        const uint32_t prefixes = warp_prefix_sum(sums[buf][lane]);
        const uint32_t before   = __shfl_sync(0xFFFFFFFF, prefixes - sums[buf][lane], warp);
        const uint32_t total    = __shfl_sync(0xFFFFFFFF, prefixes, n_warps - 1);

        const uint32_t lower        = (1u << lane) - 1;
        const int      before_less  = n_less  + (before & 0xFFFF) + __popc(less_mask  & lower);
        const int      before_equal = n_equal + (before >> 16)    + __popc(equal_mask & lower);

        const bool is_smallest = less || (equal && before_equal < rest);
        if constexpr (is_choice) {
            if (i < n) {
                choose(i, is_smallest);
            }
        } else if (is_smallest) {
            dst[before_less + min(before_equal, rest)] = i;
        }

        n_less  += total & 0xFFFF;
        n_equal += total >> 16;
    }
}

void ggml_cuda_bottom_k_ragged(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * x    = dst->src[0];
    const ggml_tensor * segs = dst->src[1];

    bottom_k_ragged<false><<<segs->ne[1], BOTTOM_K_THREADS, 0, ctx.stream()>>>(
            (const float *) x->data, (const int32_t *) segs->data, (int32_t *) dst->data, dst->ne[0], {});
    CUDA_CHECK(cudaGetLastError());
}

//
// numbers that scores are made of
//

static void critical_scores(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * scores = dst->src[0];
    const ggml_tensor * norms  = dst->src[1];
    const ggml_tensor * segs   = dst->src[2];

    const choice_args args = {
        /*.dst     =*/ (float *) dst->data,
        /*.norms   =*/ norms ? (const float *) norms->data : nullptr,
        /*.n_first =*/ (const int32_t *) dst->src[3]->data,
        /*.epsilon =*/ ggml_get_op_params_f32(dst, 6),
        /*.chosen  =*/ ggml_get_op_params_f32(dst, 7),
    };

    bottom_k_ragged<true><<<segs->ne[1], BOTTOM_K_THREADS, 0, ctx.stream()>>>(
            (const float *) scores->data, (const int32_t *) segs->data, nullptr, 0, args);
    CUDA_CHECK(cudaGetLastError());
}

static constexpr int QUERY_SUMS_THREADS = 256;

// a thread for each number of a query, a row of blocks for each sequence
__launch_bounds__(QUERY_SUMS_THREADS)
static __global__ void add_queries(const float * q, const float * counted, const int32_t * slots, float * sum, const int n, const int n_tokens) {
    const int i = blockIdx.x*QUERY_SUMS_THREADS + threadIdx.x;
    if (i >= n) {
        return;
    }

    float res = 0.0f;
    for (int t = blockIdx.y*n_tokens; t < (int) (blockIdx.y + 1)*n_tokens; ++t) {
        res += counted[t]*q[(int64_t) t*n + i];
    }
    sum[(int64_t) slots[blockIdx.y]*n + i] += res;
}

static void query_sums(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * q       = dst->src[0];
    const ggml_tensor * counted = dst->src[1];
    const ggml_tensor * slots   = dst->src[2];

    const int n = q->ne[0]*q->ne[1];

    const dim3 grid((n + QUERY_SUMS_THREADS - 1)/QUERY_SUMS_THREADS, counted->ne[1]);

    add_queries<<<grid, QUERY_SUMS_THREADS, 0, ctx.stream()>>>((const float *) q->data, (const float *) counted->data,
            (const int32_t *) slots->data, (float *) dst->src[3]->data, n, counted->ne[0]);
    CUDA_CHECK(cudaGetLastError());
}

// ExpectedAttention without covariance and values: the mean over the query heads of softmax(scale mean k)

static constexpr int EXPECTED_THREADS = 256;
static constexpr int EXPECTED_CELLS   = 256; // of a block
static constexpr int EXPECTED_MAX_GQA = 16;  // 32 KiB of shared memory with heads of 256

struct expected_args {
    const float   * q;    // [n_head][D]
    const char    * k;
    const int32_t * segs; // [n_segs][3]: KV head, first row, number of cells
    const int32_t * pos;  // of the cells, segment by segment

    float  * logits;   // [n_gqa][n_cells]
    float2 * parts;    // [n_segs][gridDim.x][n_gqa]: maximum and sum of a block
    float  * dst;      // [n_cells]

    int n_cells;
    int n_gqa;
    int pos_first;     // cells at earlier positions do not compete

    float scale;

    // cells of the segments before
    __device__ __forceinline__ int offset(const int seg) const {
        int res = 0;
        for (int s = 0; s < seg; ++s) {
            res += segs[3*s + 2];
        }
        return res;
    }
};

template <ggml_type type, int D>
__launch_bounds__(EXPECTED_THREADS)
static __global__ void expected_logits(const expected_args args) {
    constexpr int NJ = (D/8 + 7)/8;

    extern __shared__ float4 shared[];

    float * means = (float *) shared;    // [n_gqa][D]
    float * tile  = means + args.n_gqa*D; // [n_gqa][EXPECTED_CELLS]

    const int seg  = blockIdx.y;
    const int n    = args.segs[3*seg + 2];
    const int cell = blockIdx.x*EXPECTED_CELLS;
    if (cell >= n) {
        return;
    }
    const int64_t row  = args.segs[3*seg + 1];
    const int     offs = args.offset(seg);

    const float * q = args.q + (int64_t) args.segs[3*seg]*args.n_gqa*D;
    for (int i = threadIdx.x; i < args.n_gqa*D; i += EXPECTED_THREADS) {
        means[i] = args.scale*q[i];
    }
    __syncthreads();

    // 8 threads per row
    const int sub = threadIdx.x % 8;
    for (int i = threadIdx.x / 8; i < EXPECTED_CELLS; i += EXPECTED_THREADS/8) {
        const int  c        = cell + i;
        const bool competes = c < n && args.pos[offs + min(c, n - 1)] >= args.pos_first;

        float k[NJ][8];
        load_row<type, D>(args.k + (row + min(c, n - 1))*row_bytes(type, D), sub, k);

        for (int g = 0; g < args.n_gqa; ++g) {
            float dot = 0.0f;
#pragma unroll
            for (int j = 0; j < NJ; ++j) {
                if (8*j + sub < D/8) {
#pragma unroll
                    for (int e = 0; e < 8; ++e) {
                        dot += k[j][e]*means[g*D + 8*(8*j + sub) + e];
                    }
                }
            }
            dot = sum_threads<8>(dot);

            if (sub == 0) {
                tile[g*EXPECTED_CELLS + i] = competes ? dot : -INFINITY;
                if (c < n) {
                    args.logits[(int64_t) g*args.n_cells + offs + c] = competes ? dot : -INFINITY;
                }
            }
        }
    }
    __syncthreads();

    const int lane = threadIdx.x % WARP_SIZE;
    for (int g = threadIdx.x/WARP_SIZE; g < args.n_gqa; g += EXPECTED_THREADS/WARP_SIZE) {
        const float * x = tile + g*EXPECTED_CELLS;

        float m = -INFINITY;
        for (int i = lane; i < EXPECTED_CELLS; i += WARP_SIZE) {
            m = fmaxf(m, x[i]);
        }
        m = warp_reduce_max(m);

        float l = 0.0f;
        for (int i = lane; i < EXPECTED_CELLS && m > -INFINITY; i += WARP_SIZE) {
            l += expf(x[i] - m);
        }
        l = warp_reduce_sum(l);

        if (lane == 0) {
            args.parts[((int64_t) seg*gridDim.x + blockIdx.x)*args.n_gqa + g] = make_float2(m, l);
        }
    }
}

__launch_bounds__(EXPECTED_THREADS)
static __global__ void expected_weights(const expected_args args) {
    __shared__ float2 totals[EXPECTED_MAX_GQA]; // maximum, and what to multiply exponentials with

    const int seg  = blockIdx.y;
    const int n    = args.segs[3*seg + 2];
    const int cell = blockIdx.x*EXPECTED_CELLS;
    if (cell >= n) {
        return;
    }
    const int offs     = args.offset(seg);
    const int n_blocks = (n + EXPECTED_CELLS - 1)/EXPECTED_CELLS;

    const int lane = threadIdx.x % WARP_SIZE;
    for (int g = threadIdx.x/WARP_SIZE; g < args.n_gqa; g += EXPECTED_THREADS/WARP_SIZE) {
        const float2 * parts = args.parts + (int64_t) seg*gridDim.x*args.n_gqa + g;

        float m = -INFINITY;
        for (int b = lane; b < n_blocks; b += WARP_SIZE) {
            m = fmaxf(m, parts[b*args.n_gqa].x);
        }
        m = warp_reduce_max(m);

        float l = 0.0f;
        for (int b = lane; b < n_blocks && m > -INFINITY; b += WARP_SIZE) {
            const float2 part = parts[b*args.n_gqa];
            l += part.y*expf(part.x - m);
        }
        l = warp_reduce_sum(l);

        if (lane == 0) {
            totals[g] = l > 0.0f ? make_float2(m, 1.0f/(l*args.n_gqa)) : make_float2(0.0f, 0.0f);
        }
    }
    __syncthreads();

    for (int c = cell + threadIdx.x; c < min(n, cell + EXPECTED_CELLS); c += EXPECTED_THREADS) {
        float res = 0.0f;
        for (int g = 0; g < args.n_gqa; ++g) {
            res += totals[g].y*expf(args.logits[(int64_t) g*args.n_cells + offs + c] - totals[g].x);
        }
        args.dst[offs + c] = res;
    }
}

template <ggml_type type, int D>
static void launch_expected(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    expected_args args = {};

    args.q         = (const float *)   dst->src[0]->data;
    args.k         = (const char *)    dst->src[1]->data;
    args.segs      = (const int32_t *) dst->src[2]->data;
    args.pos       = (const int32_t *) dst->src[3]->data;
    args.dst       = (float *)         dst->data;
    args.n_cells   = dst->ne[0];
    args.n_gqa     = dst->src[0]->ne[1]/ggml_get_op_params_i32(dst, 1);
    args.pos_first = ggml_get_op_params_i32(dst, 3);
    args.scale     = ggml_get_op_params_f32(dst, 6);

    const int  n_max = ggml_get_op_params_i32(dst, 2);
    const dim3 grid((n_max + EXPECTED_CELLS - 1)/EXPECTED_CELLS, dst->src[2]->ne[1]);

    ggml_cuda_pool_alloc<float>  logits(ctx.pool(), (size_t) args.n_gqa*args.n_cells);
    ggml_cuda_pool_alloc<float2> parts (ctx.pool(), (size_t) grid.x*grid.y*args.n_gqa);

    args.logits = logits.get();
    args.parts  = parts.get();

    const int smem = args.n_gqa*(D + EXPECTED_CELLS)*sizeof(float);

    expected_logits<type, D><<<grid, EXPECTED_THREADS, smem, ctx.stream()>>>(args);
    CUDA_CHECK(cudaGetLastError());
    expected_weights<<<grid, EXPECTED_THREADS, 0, ctx.stream()>>>(args);
    CUDA_CHECK(cudaGetLastError());
}

static void expected_scores(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    with_rows(dst->src[1], [&](auto type, auto d) { launch_expected<type(), d()>(ctx, dst); });
}

void ggml_cuda_scores_ragged(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    switch (ggml_get_scores_ragged(dst)) {
        case GGML_SCORES_RAGGED_QUERY_SUMS: query_sums     (ctx, dst); break;
        case GGML_SCORES_RAGGED_EXPECTED:   expected_scores(ctx, dst); break;
        case GGML_SCORES_RAGGED_CRITICAL:   critical_scores(ctx, dst); break;
        default: GGML_ABORT("fatal error");
    }
}

bool ggml_cuda_ragged_supported(int device, const ggml_tensor * dst) {
#ifdef RAGGED_AVAILABLE
    const int cc = ggml_cuda_info().devices[device].cc;

    const auto is_head_size = [](const ggml_tensor * t) {
        switch (t->ne[0]) {
            case 64: case 96: case 128: case 256: return true;
            case 80:                              return !ggml_is_quantized(t->type);
            default:                              return false;
        }
    };
    const auto is_type = [](const ggml_tensor * t) {
        return t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_BF16 || t->type == GGML_TYPE_Q8_0 || t->type == GGML_TYPE_Q4_0;
    };

    // compiled, but not run on a GPU yet
    static const bool use_untried = getenv("GGML_CUDA_RAGGED_UNTRIED") != nullptr;

    // as the cache has them: a head of K as a whole, V by ROT_MIN
    const auto is_rot = [](const ggml_tensor * k, const int n_rot_k, const int n_rot_v) {
        return (n_rot_k == 0 || (n_rot_k == k->ne[0] && n_rot_k % ROT_MIN == 0)) && (n_rot_v == 0 || n_rot_v == ROT_MIN);
    };
    // read in pairs
    const auto is_aligned = [](const ggml_tensor * t) { return t->nb[1] % 8 == 0 && t->nb[2] % 8 == 0; };

    switch (dst->op) {
        case GGML_OP_FLASH_ATTN_RAGGED: {
            const ggml_tensor * q = dst->src[0];
            const ggml_tensor * k = dst->src[1];
            const ggml_tensor * v = dst->src[2];

            return cc >= GGML_CUDA_CC_AMPERE && cc < GGML_CUDA_CC_OFFSET_AMD &&
                is_type(k) && v->type == k->type && is_head_size(k) && v->ne[0] == k->ne[0] &&
                is_rot(k, ggml_get_op_params_i32(dst, 2), ggml_get_op_params_i32(dst, 3)) && is_aligned(q) && dst->src[3]->ne[1]*dst->src[3]->ne[2] <= RAGGED_MAX_SEGS;
        }
        case GGML_OP_STORE_RAGGED: {
            const ggml_tensor * k = dst->src[2];
            const ggml_tensor * v = dst->src[3];

            return is_type(k) && v->type == k->type && is_head_size(k) && v->ne[0] == k->ne[0] &&
                is_rot(k, ggml_get_op_params_i32(dst, 0), ggml_get_op_params_i32(dst, 1)) && is_aligned(dst->src[0]) && is_aligned(dst->src[1]);
        }
        case GGML_OP_KEYDIFF_RAGGED: {
            const ggml_tensor * k = dst->src[0];

            return (is_type(k) || k->type == GGML_TYPE_F32) && is_head_size(k) && dst->src[1]->ne[1] <= RAGGED_MAX_SEGS;
        }
        case GGML_OP_BOTTOM_K_RAGGED:
            return true;
        case GGML_OP_SCORES_RAGGED:
            if (!use_untried) {
                return false;
            }
            switch (ggml_get_scores_ragged(dst)) {
                case GGML_SCORES_RAGGED_QUERY_SUMS:
                    return !dst->src[4]; // no outer products
                case GGML_SCORES_RAGGED_EXPECTED: {
                    const ggml_tensor * k = dst->src[1];

                    return !dst->src[4] && !dst->src[5] && (is_type(k) || k->type == GGML_TYPE_F32) && is_head_size(k) &&
                        dst->src[0]->ne[1]/ggml_get_op_params_i32(dst, 1) <= EXPECTED_MAX_GQA;
                }
                case GGML_SCORES_RAGGED_CRITICAL:
                    return true;
                default:
                    return false;
            }
        default:
            return false;
    }
#else
    GGML_UNUSED_VARS(device, dst);
    return false;
#endif // RAGGED_AVAILABLE
}
