// Weighted sums of streams, and their products with one vector.
#pragma once

#include "compiled_support/views.h"

namespace mhc {

// Σ_j weights[j] · x[j]. Not inlined: whoever sums, the rounding is the same to the bit.
template <typename A>
__attribute__((noinline)) void weighted_sum(
    const A* const* x, const A* weights, int64_t n, int64_t count, A* out
) {
    for (int64_t c = 0; c < count; c += tile<A>) {
        Vector<A> low{}, high{};
        for (int64_t j = 0; j < n; ++j) {
            Vector<A> weight = broadcast<A>(weights[j]);
            low += weight * load<A>(x[j] + c);
            high += weight * load<A>(x[j] + c + lanes<A>);
        }
        store<A>(out + c, low);
        store<A>(out + c + lanes<A>, high);
    }
}

template <typename A>
inline A dot(const A* x, const A* y, int64_t count) {
    Vector<A> low{}, high{};
    for (int64_t c = 0; c < count; c += tile<A>) {
        low += load<A>(x + c) * load<A>(y + c);
        high += load<A>(x + c + lanes<A>) * load<A>(y + c + lanes<A>);
    }
    return sum<A>(low + high);
}

// Token t of reading with given weights [n].
template <typename A>
inline void aggregate_token(
    const View& streams, const A* weights, const View& read, int64_t n, int64_t width, int64_t t
) {
    alignas(vector_bytes) A buffers[most_streams][chunk], result[chunk];
    const A* x[most_streams];
    for (int64_t c = 0; c < width; c += chunk) {
        const int64_t count = std::min<int64_t>(chunk, width - c);
        for (int64_t j = 0; j < n; ++j)
            x[j] = fetch<A>(streams, streams.at(t, j, c), count, buffers[j]);
        A* out = target<A>(read, read.at(t, 0, c), count, result);
        weighted_sum<A>(x, weights, n, padded<A>(count), out);
        finish<A>(read, read.at(t, 0, c), count, out);
    }
}

// Products of the streams of token t with a vector: dots[j] = Σ_c streams[t, j, c] · vector[t, c].
template <typename A>
inline void dot_token(
    const View& streams, const View& vector, int64_t n, int64_t width, int64_t t, A* dots
) {
    alignas(vector_bytes) A buffer[chunk], other[chunk];
    for (int64_t j = 0; j < n; ++j) dots[j] = 0;
    for (int64_t c = 0; c < width; c += chunk) {
        const int64_t count = std::min<int64_t>(chunk, width - c);
        const A* y = fetch<A>(vector, vector.at(t, 0, c), count, other);
        for (int64_t j = 0; j < n; ++j) {
            const A* x = fetch<A>(streams, streams.at(t, j, c), count, buffer);
            dots[j] += dot<A>(x, y, padded<A>(count));
        }
    }
}

}  // namespace mhc
