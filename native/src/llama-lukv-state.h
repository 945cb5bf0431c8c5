#pragma once

#include "llama-io.h"

#include "ggml.h"

#include <cstdint>
#include <stdexcept>

//
// parts of a saved state
//

template <typename T>
void llama_lukv_write(llama_io_write_i & io, const T & val) {
    io.write(&val, sizeof(val));
}

template <typename T>
T llama_lukv_read(llama_io_read_i & io) {
    T val;
    io.read(&val, sizeof(val));
    return val;
}

// rows of a tensor. what they are stands before them, as in the states of llama_kv_cache: damaged data are noticed
// there, while the data themselves may never pass through the host
inline void llama_lukv_write_rows(llama_io_write_i & io, ggml_tensor * t, uint64_t first, uint64_t n) {
    llama_lukv_write<int32_t> (io, t->type);
    llama_lukv_write<uint64_t>(io, t->nb[1]);
    llama_lukv_write<uint64_t>(io, n);

    io.write_tensor(t, first*t->nb[1], n*t->nb[1]);
}

inline void llama_lukv_read_rows(llama_io_read_i & io, ggml_tensor * t, uint64_t first, uint64_t n) {
    const auto type     = llama_lukv_read<int32_t> (io);
    const auto row_size = llama_lukv_read<uint64_t>(io);
    const auto n_rows   = llama_lukv_read<uint64_t>(io);

    if (type != t->type || row_size != t->nb[1] || n_rows != n) {
        throw std::runtime_error("it is damaged");
    }

    io.read_tensor(t, first*t->nb[1], n*t->nb[1]);
}
