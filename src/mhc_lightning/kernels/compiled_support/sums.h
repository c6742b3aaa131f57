// Sums over tokens that do not depend on the number of threads.
#pragma once

#include "compiled_support/views.h"

namespace mhc {

constexpr int64_t most_parts = 64;  // sums that are kept at a time

// Tokens of a block that sums by itself.
inline int64_t block_tokens(int64_t tokens) {
    constexpr int64_t least = 256;
    const int64_t share = std::max(least, (tokens + most_parts - 1) / most_parts);
    return (share + group - 1) / group * group;
}

// Adds part(1), part(2), …, each of `size` numbers, to part(0), always in the same order.
template <typename F>
inline void add_parts(int64_t parts, int64_t size, int64_t threads, const F& part) {
    constexpr int64_t slice = 4096;
    each_block((size + slice - 1) / slice, threads, [&](int64_t k) {
        const int64_t last = std::min(size, (k + 1) * slice);
        auto* to = part(0);
        for (int64_t p = 1; p < parts; ++p) {
            const auto* from = part(p);
            for (int64_t at = k * slice; at < last; ++at) to[at] += from[at];
        }
    });
}

// Dense rows [rows, width], each padded with zeros, so that whole vectors can be loaded.
template <typename A>
inline std::vector<A> padded_rows(const A* from, int64_t rows, int64_t width) {
    const int64_t wide = padded<A>(width);
    std::vector<A> made(rows * wide);
    for (int64_t r = 0; r < rows; ++r) std::copy_n(from + r * width, width, &made[r * wide]);
    return made;
}

// The way back.
template <typename A>
inline void unpadded_rows(const A* from, int64_t rows, int64_t width, A* to) {
    const int64_t wide = padded<A>(width);
    for (int64_t r = 0; r < rows; ++r) std::copy_n(from + r * wide, width, to + r * width);
}

}  // namespace mhc
