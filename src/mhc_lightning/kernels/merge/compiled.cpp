// Merging, forward and backward: each stream-sized operand is read or written once.
#include "merge/merge.h"

#include "aggregate/aggregate.h"

namespace mhc {

// new[i] = Σ_j residual[i, j] · x[j] + post[i] · y. Not inlined: the same bits wherever it is used.
template <typename A, int N>
__attribute__((noinline)) void mix(
    const A* const* x, const A* y, const A* residual, const A* post, A* const* out, int64_t count
) {
    constexpr int pair = N <= 4 ? 2 : 1;  // rows whose weights fit the registers
    for (int i = 0; i < N; i += pair) {
        const int rows = N - i < pair ? N - i : pair;
        Vector<A> weights[pair][N], of_output[pair];
        for (int r = 0; r < rows; ++r) {
            for (int j = 0; j < N; ++j) weights[r][j] = broadcast<A>(residual[(i + r) * N + j]);
            of_output[r] = broadcast<A>(post[i + r]);
        }
        for (int64_t c = 0; c < count; c += lanes<A>)
            for (int r = 0; r < rows; ++r) {
                Vector<A> total = weights[r][0] * load<A>(x[0] + c);
                for (int j = 1; j < N; ++j) total += weights[r][j] * load<A>(x[j] + c);
                store<A>(out[i + r] + c, total + of_output[r] * load<A>(y + c));
            }
    }
}

template <typename A, int N>
inline void merge_by(
    const View& streams, const View& output, const A* residual, const A* post, const View& merged,
    int64_t width, int64_t t
) {
    alignas(vector_bytes) A buffers[N + 1][chunk], results[N][chunk];
    const A* x[N];
    A* out[N];
    for (int64_t c = 0; c < width; c += chunk) {
        const int64_t count = std::min<int64_t>(chunk, width - c);
        const A* y = fetch<A>(output, output.at(t, 0, c), count, buffers[N]);
        for (int j = 0; j < N; ++j) {
            x[j] = fetch<A>(streams, streams.at(t, j, c), count, buffers[j]);
            out[j] = target<A>(merged, merged.at(t, j, c), count, results[j]);
        }
        mix<A, N>(x, y, residual, post, out, padded<A>(count));
        for (int j = 0; j < N; ++j) finish<A>(merged, merged.at(t, j, c), count, out[j]);
    }
}

// Products of each gradient with each stream and with the output, added to [N, N] and [N].
template <typename A, int N>
inline void add_products(
    const A* const* grads, const A* const* x, const A* y, int64_t count, A* residual, A* post
) {
    for (int i = 0; i < N; ++i) {
        Vector<A> totals[N + 1] = {};
        for (int64_t c = 0; c < count; c += lanes<A>) {
            Vector<A> grad = load<A>(grads[i] + c);
            for (int j = 0; j < N; ++j) totals[j] += grad * load<A>(x[j] + c);
            totals[N] += grad * load<A>(y + c);
        }
        for (int j = 0; j < N; ++j) residual[i * N + j] += sum<A>(totals[j]);
        post[i] += sum<A>(totals[N]);
    }
}

template <typename A, int N>
inline void merge_backward_by(
    const View& grad, int64_t grad_token, const View& streams, const View& output,
    const A* residual, const A* post, const MergeGrads<A>& grads, int64_t width, int64_t t
) {
    alignas(vector_bytes) A of_grad[N][chunk], of_streams[N][chunk], of_output[chunk], result[chunk];
    const A *g[N], *x[N];
    A products[N * N] = {}, output_products[N] = {}, columns[N * N];
    for (int i = 0; i < N; ++i)
        for (int j = 0; j < N; ++j) columns[j * N + i] = residual[i * N + j];
    for (int64_t c = 0; c < width; c += chunk) {
        const int64_t count = std::min<int64_t>(chunk, width - c), whole = padded<A>(count);
        for (int i = 0; i < N; ++i)
            g[i] = fetch<A>(grad, grad.at(grad_token, i, c), count, of_grad[i]);
        if (grads.residual) {
            for (int j = 0; j < N; ++j)
                x[j] = fetch<A>(streams, streams.at(t, j, c), count, of_streams[j]);
            const A* y = fetch<A>(output, output.at(t, 0, c), count, of_output);
            add_products<A, N>(g, x, y, whole, products, output_products);
        }
        for (int j = 0; grads.streams && j < N; ++j) {
            const int64_t at = grads.streams->at(t, j, c);
            A* out = target<A>(*grads.streams, at, count, result);
            weighted_sum<A>(g, columns + j * N, N, whole, out);
            finish<A>(*grads.streams, at, count, out);
        }
        if (grads.output) {
            const int64_t at = grads.output->at(t, 0, c);
            A* out = target<A>(*grads.output, at, count, result);
            weighted_sum<A>(g, post, N, whole, out);
            finish<A>(*grads.output, at, count, out);
        }
    }
    if (grads.residual) {
        std::memcpy(grads.residual + t * N * N, products, sizeof(products));
        std::memcpy(grads.post + t * N, output_products, sizeof(output_products));
    }
}

template <typename A>
void merge_token(
    int64_t n, const View& streams, const View& output, const A* residual, const A* post,
    const View& merged, int64_t width, int64_t t
) {
    by_streams(n, [&](auto count) {
        merge_by<A, count>(streams, output, residual, post, merged, width, t);
    });
}

template <typename A>
void merge_token_backward(
    int64_t n, const View& grad, int64_t grad_token, const View& streams, const View& output,
    const A* residual, const A* post, const MergeGrads<A>& grads, int64_t width, int64_t t
) {
    by_streams(n, [&](auto count) {
        merge_backward_by<A, count>(
            grad, grad_token, streams, output, residual, post, grads, width, t
        );
    });
}

#define MHC_INSTANTIATE(A)                                                                         \
    template void merge_token(                                                                     \
        int64_t, const View&, const View&, const A*, const A*, const View&, int64_t, int64_t       \
    );                                                                                             \
    template void merge_token_backward(                                                            \
        int64_t, const View&, int64_t, const View&, const View&, const A*, const A*,               \
        const MergeGrads<A>&, int64_t, int64_t                                                     \
    );
MHC_INSTANTIATE(float)
MHC_INSTANTIATE(double)

template <typename A>
void merge_forward(
    const View* streams, const View* output, const void* residual, const void* post,
    const View* merged, int64_t tokens, int64_t n, int64_t width, int64_t threads
) {
    each_block((tokens + group - 1) / group, threads, [&](int64_t block) {
        const int64_t last = std::min<int64_t>(tokens, (block + 1) * group);
        for (int64_t t = block * group; t < last; ++t)
            merge_token<A>(
                n, *streams, *output, (const A*)residual + t * n * n, (const A*)post + t * n,
                *merged, width, t
            );
    });
}

template <typename A>
void merge_backward(
    const View* grad, const View* streams, const View* output, const void* residual,
    const void* post, const View* streams_grad, const View* output_grad, void* residual_grad,
    void* post_grad, int64_t tokens, int64_t n, int64_t width, int64_t threads
) {
    const MergeGrads<A> grads{streams_grad, output_grad, (A*)residual_grad, (A*)post_grad};
    each_block((tokens + group - 1) / group, threads, [&](int64_t block) {
        const int64_t last = std::min<int64_t>(tokens, (block + 1) * group);
        for (int64_t t = block * group; t < last; ++t)
            merge_token_backward<A>(
                n, *grad, t, *streams, *output, (const A*)residual + t * n * n,
                (const A*)post + t * n, grads, width, t
            );
    });
}

}  // namespace mhc

MHC_EXPORT(
    merge_forward,
    (const mhc::View* streams, const mhc::View* output, const void* residual, const void* post,
     const mhc::View* merged, int64_t tokens, int64_t n, int64_t width, int64_t threads),
    (streams, output, residual, post, merged, tokens, n, width, threads)
)
MHC_EXPORT(
    merge_backward,
    (const mhc::View* grad, const mhc::View* streams, const mhc::View* output,
     const void* residual, const void* post, const mhc::View* streams_grad,
     const mhc::View* output_grad, void* residual_grad, void* post_grad, int64_t tokens, int64_t n,
     int64_t width, int64_t threads),
    (grad, streams, output, residual, post, streams_grad, output_grad, residual_grad, post_grad,
     tokens, n, width, threads)
)
