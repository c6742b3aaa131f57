// Sinkhorn-Knopp on dense matrices [n, n, tokens].
#include "sinkhorn/sinkhorn.h"

namespace mhc {

// The matrices after the first column and after the first row normalisation, whatever the size of
// the logits: their largest entries are subtracted before anything is exponentiated.
template <typename A, int N>
inline void first_iteration(const Vector<A>* logits, Vector<A>* columns, Vector<A>* rows) {
    Vector<A> inverse[N], shifted[N * N];
    for (int j = 0; j < N; ++j) {
        Vector<A> top = logits[j];
        for (int i = 1; i < N; ++i) top = larger<A>(top, logits[i * N + j]);
        Vector<A> total{};
        for (int i = 0; i < N; ++i) {
            shifted[i * N + j] = logits[i * N + j] - top;
            columns[i * N + j] = exp_of_negative(shifted[i * N + j]);
            total += columns[i * N + j];
        }
        inverse[j] = 1 / total;
        for (int i = 0; i < N; ++i) columns[i * N + j] *= inverse[j];
    }
    for (int i = 0; i < N; ++i) {
        Vector<A> top = shifted[i * N];
        for (int j = 1; j < N; ++j) top = larger<A>(top, shifted[i * N + j]);
        Vector<A> total{};
        for (int j = 0; j < N; ++j) {
            rows[i * N + j] = exp_of_negative(shifted[i * N + j] - top) * inverse[j];
            total += rows[i * N + j];
        }
        Vector<A> scale = 1 / total;
        for (int j = 0; j < N; ++j) rows[i * N + j] *= scale;
    }
}

// Sums over the rows (axis 0) or the columns (axis 1) of a matrix.
template <typename A, int N>
inline void sums(const Vector<A>* matrix, int axis, Vector<A>* totals) {
    for (int a = 0; a < N; ++a) {
        Vector<A> total = matrix[axis == 0 ? a : a * N];
        for (int b = 1; b < N; ++b) total += matrix[axis == 0 ? b * N + a : a * N + b];
        totals[a] = total;
    }
}

template <typename A, int N>
inline void normalise(const Vector<A>* from, Vector<A>* to, int axis) {
    Vector<A> scale[N];
    sums<A, N>(from, axis, scale);
    for (int a = 0; a < N; ++a) scale[a] = 1 / scale[a];
    for (int i = 0; i < N; ++i)
        for (int j = 0; j < N; ++j) to[i * N + j] = from[i * N + j] * scale[axis == 0 ? j : i];
}

template <typename A, int N>
inline void sinkhorn(const A* logits, A* matrices, int64_t iterations) {
    Vector<A> given[N * N], columns[N * N], matrix[N * N];
    for (int k = 0; k < N * N; ++k) given[k] = load<A>(logits + k * group);
    first_iteration<A, N>(given, columns, matrix);
    for (int64_t step = 1; step < iterations; ++step) {
        normalise<A, N>(matrix, matrix, 0);
        normalise<A, N>(matrix, matrix, 1);
    }
    for (int k = 0; k < N * N; ++k) store<A>(matrices + k * group, matrix[k]);
}

// In logarithmic coordinates a normalisation is y = x - logsumexp(x), so its gradient is
// G - M · ΣG along the same axis.
template <typename A, int N>
inline void sinkhorn_gradient(
    const A* logits, A* grads, int64_t iterations, Vector<A>* history
) {
    Vector<A> given[N * N], grad[N * N], totals[N];
    for (int k = 0; k < N * N; ++k) given[k] = load<A>(logits + k * group);
    first_iteration<A, N>(given, history, history + N * N);
    Vector<A>* last = history + N * N;
    for (int64_t step = 2; step < 2 * iterations; step += 2) {
        normalise<A, N>(last, last + N * N, 0);
        normalise<A, N>(last + N * N, last + 2 * N * N, 1);
        last += 2 * N * N;
    }
    for (int k = 0; k < N * N; ++k) grad[k] = load<A>(grads + k * group) * last[k];
    for (int64_t step = 0; step < iterations; ++step, last -= 2 * N * N) {
        sums<A, N>(grad, 1, totals);
        for (int k = 0; k < N * N; ++k) grad[k] -= last[k] * totals[k / N];
        sums<A, N>(grad, 0, totals);
        for (int k = 0; k < N * N; ++k) grad[k] -= (last - N * N)[k] * totals[k % N];
    }
    for (int k = 0; k < N * N; ++k) store<A>(grads + k * group, grad[k]);
}

template <typename A>
void sinkhorn_group(int64_t n, const A* logits, A* matrices, int64_t iterations) {
    by_streams(n, [&](auto streams) {
        for (int t = 0; t < group; t += lanes<A>)
            sinkhorn<A, streams>(logits + t, matrices + t, iterations);
    });
}

template <typename A>
void sinkhorn_group_backward(
    int64_t n, const A* logits, A* grads, int64_t iterations, Vector<A>* history
) {
    by_streams(n, [&](auto streams) {
        for (int t = 0; t < group; t += lanes<A>)
            sinkhorn_gradient<A, streams>(logits + t, grads + t, iterations, history);
    });
}

template void sinkhorn_group(int64_t, const float*, float*, int64_t);
template void sinkhorn_group(int64_t, const double*, double*, int64_t);
template void sinkhorn_group_backward(int64_t, const float*, float*, int64_t, Vector<float>*);
template void sinkhorn_group_backward(int64_t, const double*, double*, int64_t, Vector<double>*);

// The entries of up to `group` tokens, from the tensor to a buffer [n², group] or back.
template <typename A>
inline void gather(const A* tensor, int64_t tokens, int64_t first, int64_t entries, A* buffer) {
    const int64_t count = std::min<int64_t>(group, tokens - first);
    for (int64_t k = 0; k < entries; ++k)
        for (int64_t t = 0; t < group; ++t)
            buffer[k * group + t] = t < count ? tensor[k * tokens + first + t] : A(0);
}

template <typename A>
inline void scatter(const A* buffer, int64_t tokens, int64_t first, int64_t entries, A* tensor) {
    const int64_t count = std::min<int64_t>(group, tokens - first);
    for (int64_t k = 0; k < entries; ++k)
        for (int64_t t = 0; t < count; ++t) tensor[k * tokens + first + t] = buffer[k * group + t];
}

template <typename A>
void sinkhorn_forward(
    const void* logits, void* matrices, int64_t n, int64_t tokens, int64_t iterations,
    int64_t threads
) {
    each_block((tokens + group - 1) / group, threads, [&](int64_t block) {
        A buffer[most_streams * most_streams * group];
        gather((const A*)logits, tokens, block * group, n * n, buffer);
        sinkhorn_group<A>(n, buffer, buffer, iterations);
        scatter(buffer, tokens, block * group, n * n, (A*)matrices);
    });
}

template <typename A>
void sinkhorn_backward(
    const void* grads, const void* logits, void* results, int64_t n, int64_t tokens,
    int64_t iterations, int64_t threads
) {
    constexpr int64_t share = 16 * group;  // tokens whose iterates use the same room in turn
    each_block((tokens + share - 1) / share, threads, [&](int64_t block) {
        std::vector<Vector<A>> history(2 * iterations * n * n);
        A grad[most_streams * most_streams * group], given[most_streams * most_streams * group];
        const int64_t last = std::min<int64_t>(tokens, (block + 1) * share);
        for (int64_t first = block * share; first < last; first += group) {
            gather((const A*)grads, tokens, first, n * n, grad);
            gather((const A*)logits, tokens, first, n * n, given);
            sinkhorn_group_backward<A>(n, given, grad, iterations, history.data());
            scatter(grad, tokens, first, n * n, (A*)results);
        }
    });
}

}  // namespace mhc

MHC_EXPORT(
    sinkhorn_forward,
    (const void* logits, void* matrices, int64_t n, int64_t tokens, int64_t iterations,
     int64_t threads),
    (logits, matrices, n, tokens, iterations, threads)
)
MHC_EXPORT(
    sinkhorn_backward,
    (const void* grads, const void* logits, void* results, int64_t n, int64_t tokens,
     int64_t iterations, int64_t threads),
    (grads, logits, results, n, tokens, iterations, threads)
)
