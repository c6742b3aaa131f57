// Tensors as Python hands them over, and their rows in the precision of the arithmetic.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "compiled_support/vectors.h"

namespace mhc {

enum : int64_t { float32 = 0, bfloat16 = 1, float64 = 2 };

// A tensor's memory; strides in elements, of tokens, streams and columns. The same fields as
// `View` of library.py.
struct View {
    char* data;
    int64_t type;
    int64_t token;
    int64_t stream;
    int64_t column;

    int64_t at(int64_t t, int64_t j, int64_t c) const { return t * token + j * stream + c * column; }
};

template <typename A>
constexpr int64_t type_of = std::is_same_v<A, float> ? float32 : float64;

constexpr int most_streams = 8;
constexpr int group = 16;    // tokens that are computed together
constexpr int chunk = 256;   // columns that are computed together
template <typename A>
constexpr int tile = 2 * lanes<A>;  // columns are padded to multiples of this

template <typename A>
inline int64_t padded(int64_t count) {
    return (count + tile<A> - 1) / tile<A> * tile<A>;
}

inline float widened(uint16_t value) {
    uint32_t bits = uint32_t(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof(wide));
    return wide;
}

inline uint16_t rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    uint32_t even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return value != value ? 0x7fc0 : uint16_t(even);
}

template <typename A, typename S>
inline void read_row(const S* from, int64_t stride, int64_t count, A* to) {
    auto wide = [](S value) {
        if constexpr (std::is_same_v<S, uint16_t>) return A(widened(value));
        else return A(value);
    };
    if (stride == 1) {
        for (int64_t c = 0; c < count; ++c) to[c] = wide(from[c]);
    } else {
        for (int64_t c = 0; c < count; ++c) to[c] = wide(from[c * stride]);
    }
}

// Copies `count` columns from `at` on to the buffer, followed by zeros up to a multiple of `tile`.
template <typename A>
inline void copy_row(const View& view, int64_t at, int64_t count, A* buffer) {
    const int64_t whole = padded<A>(count);
    if (view.type == float32)
        read_row(reinterpret_cast<const float*>(view.data) + at, view.column, count, buffer);
    else if (view.type == bfloat16)
        read_row(reinterpret_cast<const uint16_t*>(view.data) + at, view.column, count, buffer);
    else
        read_row(reinterpret_cast<const double*>(view.data) + at, view.column, count, buffer);
    for (int64_t c = count; c < whole; ++c) buffer[c] = 0;
}

// As `copy_row`, but without a copy where the columns lie in memory as the arithmetic wants them.
template <typename A>
inline const A* fetch(const View& view, int64_t at, int64_t count, A* buffer) {
    if (view.type == type_of<A> && view.column == 1 && padded<A>(count) == count)
        return reinterpret_cast<const A*>(view.data) + at;
    copy_row<A>(view, at, count, buffer);
    return buffer;
}

// Where to write `count` columns of a dense result, padded; `finish` brings them to their place.
template <typename A>
inline A* target(const View& view, int64_t at, int64_t count, A* buffer) {
    const bool direct = view.type == type_of<A> && padded<A>(count) == count;
    return direct ? reinterpret_cast<A*>(view.data) + at : buffer;
}

template <typename A>
inline void finish(const View& view, int64_t at, int64_t count, const A* from) {
    if (view.type == type_of<A>) {
        A* to = reinterpret_cast<A*>(view.data) + at;
        if (to != from) std::memcpy(to, from, count * sizeof(A));
    } else if (view.type == bfloat16) {
        uint16_t* to = reinterpret_cast<uint16_t*>(view.data) + at;
        for (int64_t c = 0; c < count; ++c) to[c] = rounded(float(from[c]));
    } else if (view.type == float32) {
        float* to = reinterpret_cast<float*>(view.data) + at;
        for (int64_t c = 0; c < count; ++c) to[c] = float(from[c]);
    } else {
        double* to = reinterpret_cast<double*>(view.data) + at;
        for (int64_t c = 0; c < count; ++c) to[c] = from[c];
    }
}

// Runs f(0) … f(blocks - 1). What a block computes does not depend on the number of threads.
template <typename F>
inline void each_block(int64_t blocks, int64_t threads, const F& f) {
    if (threads > 1 && blocks > 1) {
#pragma omp parallel for num_threads(int(threads < blocks ? threads : blocks)) schedule(static)
        for (int64_t k = 0; k < blocks; ++k) f(k);
    } else {
        for (int64_t k = 0; k < blocks; ++k) f(k);
    }
}

// Calls f with n as a constant.
template <typename F>
inline void by_streams(int64_t n, const F& f) {
    switch (n) {
        case 1: f(std::integral_constant<int, 1>{}); break;
        case 2: f(std::integral_constant<int, 2>{}); break;
        case 3: f(std::integral_constant<int, 3>{}); break;
        case 4: f(std::integral_constant<int, 4>{}); break;
        case 5: f(std::integral_constant<int, 5>{}); break;
        case 6: f(std::integral_constant<int, 6>{}); break;
        case 7: f(std::integral_constant<int, 7>{}); break;
        case 8: f(std::integral_constant<int, 8>{}); break;
    }
}

}  // namespace mhc

// Each function of Python for both precisions of the arithmetic.
#define MHC_EXPORT(name, parameters, arguments)                             \
    extern "C" void name##_float parameters { mhc::name<float> arguments; } \
    extern "C" void name##_double parameters { mhc::name<double> arguments; }
