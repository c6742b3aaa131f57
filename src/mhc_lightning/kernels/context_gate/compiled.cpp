// Context gates, forward and backward: each stream-sized operand is read or written once.
#include "compiled_support/sums.h"

namespace mhc {

constexpr double least_score = 1e-6;  // below it the signed square root is flat

template <typename A>
inline A gate_of(A score) {
    const A root = std::sqrt(std::max(std::abs(score), A(least_score)));
    return 1 / (1 + std::exp(-root * A((score > 0) - (score < 0))));
}

template <typename A>
void context_gate_forward(
    const View* streams, const View* key, const void* weight, void* gate, void* score,
    void* inverse_rms, void* key_inverse_rms, double eps, int64_t tokens, int64_t n, int64_t width,
    int64_t threads
) {
    const int64_t wide = padded<A>(width);
    const std::vector<A> weights = padded_rows((const A*)weight, n, width);
    const A root = std::sqrt(A(width));
    each_block((tokens + group - 1) / group, threads, [&](int64_t block) {
        alignas(vector_bytes) A buffer[chunk], other[chunk];
        const int64_t last = std::min<int64_t>(tokens, (block + 1) * group);
        for (int64_t row = block * group * n; row < last * n; ++row) {
            const int64_t t = row / n, j = row % n;
            Vector<A> product{}, square{}, key_square{};
            for (int64_t c = 0; c < width; c += chunk) {
                const int64_t count = std::min<int64_t>(chunk, width - c), whole = padded<A>(count);
                const A* h = fetch<A>(*streams, streams->at(t, j, c), count, buffer);
                const A* k = fetch<A>(*key, key->at(t, j, c), count, other);
                const A* w = &weights[j * wide + c];
                for (int64_t at = 0; at < whole; at += lanes<A>) {
                    const Vector<A> of_stream = load<A>(h + at), of_key = load<A>(k + at);
                    product += of_stream * of_key * load<A>(w + at);
                    square += of_stream * of_stream;
                    key_square += of_key * of_key;
                }
            }
            const A inverse = 1 / std::sqrt(sum<A>(square) / width + A(eps));
            const A key_inverse = 1 / std::sqrt(sum<A>(key_square) / width + A(eps));
            const A found = sum<A>(product) * inverse * key_inverse / root;
            ((A*)gate)[row] = gate_of(found);
            ((A*)score)[row] = found;
            ((A*)inverse_rms)[row] = inverse;
            ((A*)key_inverse_rms)[row] = key_inverse;
        }
    });
}

// The factors of `gradient_factors` in operands.py.
template <typename A>
struct Factors {
    A product, own, key_own;

    Factors(A gate_grad, A score, A inverse_rms, A key_inverse_rms, int64_t width) {
        const A gate = gate_of(score), size = std::abs(score);
        const A slope = size >= A(least_score) ? A(0.5) / std::sqrt(size) : A(0);
        const A score_grad = gate_grad * gate * (1 - gate) * slope;
        const A through_norm = -score_grad * score / width;
        product = score_grad * inverse_rms * key_inverse_rms / std::sqrt(A(width));
        own = through_norm * inverse_rms * inverse_rms;
        key_own = through_norm * key_inverse_rms * key_inverse_rms;
    }
};

// `kept_grad` may be null.
template <typename A>
void context_gate_backward(
    const View* streams, const View* key, const void* weight, const void* score,
    const void* inverse_rms, const void* key_inverse_rms, const View* kept_grad,
    const void* gate_grad, const View* streams_grad, const View* key_grad, void* weight_grad,
    int64_t tokens, int64_t n, int64_t width, int64_t threads
) {
    const int64_t wide = padded<A>(width), share = block_tokens(tokens);
    const std::vector<A> weights = padded_rows((const A*)weight, n, width);
    std::vector<std::vector<A>> sums((tokens + share - 1) / share);
    const std::vector<A> nothing(chunk);
    each_block(sums.size(), threads, [&](int64_t block) {
        alignas(vector_bytes) A of_streams[chunk], of_key[chunk], of_kept[chunk];
        alignas(vector_bytes) A result[chunk], key_result[chunk];
        sums[block].resize(n * wide);
        const int64_t last = std::min(tokens, (block + 1) * share);
        for (int64_t row = block * share * n; row < last * n; ++row) {
            const int64_t t = row / n, j = row % n;
            const Factors<A> by(
                ((const A*)gate_grad)[row], ((const A*)score)[row], ((const A*)inverse_rms)[row],
                ((const A*)key_inverse_rms)[row], width
            );
            for (int64_t c = 0; c < width; c += chunk) {
                const int64_t count = std::min<int64_t>(chunk, width - c), whole = padded<A>(count);
                const int64_t at = streams_grad->at(t, j, c), key_at = key_grad->at(t, j, c);
                const A* h = fetch<A>(*streams, streams->at(t, j, c), count, of_streams);
                const A* k = fetch<A>(*key, key->at(t, j, c), count, of_key);
                const A* kept = nothing.data();
                if (kept_grad) kept = fetch<A>(*kept_grad, kept_grad->at(t, j, c), count, of_kept);
                A* out = target<A>(*streams_grad, at, count, result);
                A* key_out = target<A>(*key_grad, key_at, count, key_result);
                const A* w = &weights[j * wide + c];
                A* total = &sums[block][j * wide + c];
                for (int64_t s = 0; s < whole; s += lanes<A>) {
                    const Vector<A> stream = load<A>(h + s), of_its_key = load<A>(k + s);
                    const Vector<A> weighted = by.product * load<A>(w + s);
                    store<A>(out + s, weighted * of_its_key + by.own * stream + load<A>(kept + s));
                    store<A>(key_out + s, weighted * stream + by.key_own * of_its_key);
                    store<A>(total + s, load<A>(total + s) + by.product * stream * of_its_key);
                }
                finish<A>(*streams_grad, at, count, out);
                finish<A>(*key_grad, key_at, count, key_out);
            }
        }
    });
    add_parts(sums.size(), n * wide, threads, [&](int64_t block) { return sums[block].data(); });
    unpadded_rows(sums[0].data(), n, width, (A*)weight_grad);
}

}  // namespace mhc

MHC_EXPORT(
    context_gate_forward,
    (const mhc::View* streams, const mhc::View* key, const void* weight, void* gate, void* score,
     void* inverse_rms, void* key_inverse_rms, double eps, int64_t tokens, int64_t n,
     int64_t width, int64_t threads),
    (streams, key, weight, gate, score, inverse_rms, key_inverse_rms, eps, tokens, n, width,
     threads)
)
MHC_EXPORT(
    context_gate_backward,
    (const mhc::View* streams, const mhc::View* key, const void* weight, const void* score,
     const void* inverse_rms, const void* key_inverse_rms, const mhc::View* kept_grad,
     const void* gate_grad, const mhc::View* streams_grad, const mhc::View* key_grad,
     void* weight_grad, int64_t tokens, int64_t n, int64_t width, int64_t threads),
    (streams, key, weight, score, inverse_rms, key_inverse_rms, kept_grad, gate_grad,
     streams_grad, key_grad, weight_grad, tokens, n, width, threads)
)
