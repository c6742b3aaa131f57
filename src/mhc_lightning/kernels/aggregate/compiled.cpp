// Reading streams with given weights, and back.
#include "aggregate/aggregate.h"

namespace mhc {

template <typename A>
void aggregate_forward(
    const View* streams, const void* pre, const View* read, int64_t tokens, int64_t n,
    int64_t width, int64_t threads
) {
    each_block((tokens + group - 1) / group, threads, [&](int64_t block) {
        const int64_t last = std::min<int64_t>(tokens, (block + 1) * group);
        for (int64_t t = block * group; t < last; ++t)
            aggregate_token<A>(*streams, (const A*)pre + t * n, *read, n, width, t);
    });
}

// Either gradient may be unwanted: a null pointer.
template <typename A>
void aggregate_backward(
    const View* grad, const View* streams, const void* pre, const View* streams_grad,
    void* pre_grad, int64_t tokens, int64_t n, int64_t width, int64_t threads
) {
    each_block((tokens + group - 1) / group, threads, [&](int64_t block) {
        alignas(vector_bytes) A buffer[chunk], result[chunk];
        const int64_t last = std::min<int64_t>(tokens, (block + 1) * group);
        for (int64_t t = block * group; t < last; ++t) {
            if (pre_grad) dot_token<A>(*streams, *grad, n, width, t, (A*)pre_grad + t * n);
            for (int64_t c = 0; streams_grad && c < width; c += chunk) {
                const int64_t count = std::min<int64_t>(chunk, width - c);
                const A* y = fetch<A>(*grad, grad->at(t, 0, c), count, buffer);
                for (int64_t j = 0; j < n; ++j) {
                    const int64_t at = streams_grad->at(t, j, c);
                    A* out = target<A>(*streams_grad, at, count, result);
                    weighted_sum<A>(&y, (const A*)pre + t * n + j, 1, padded<A>(count), out);
                    finish<A>(*streams_grad, at, count, out);
                }
            }
        }
    });
}

}  // namespace mhc

MHC_EXPORT(
    aggregate_forward,
    (const mhc::View* streams, const void* pre, const mhc::View* read, int64_t tokens, int64_t n,
     int64_t width, int64_t threads),
    (streams, pre, read, tokens, n, width, threads)
)
MHC_EXPORT(
    aggregate_backward,
    (const mhc::View* grad, const mhc::View* streams, const void* pre,
     const mhc::View* streams_grad, void* pre_grad, int64_t tokens, int64_t n, int64_t width,
     int64_t threads),
    (grad, streams, pre, streams_grad, pre_grad, tokens, n, width, threads)
)
