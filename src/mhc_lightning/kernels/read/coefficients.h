// From raw coefficients to mappings and back, for a group of tokens at a time.
//
// Arrays are [coefficient][token of the group]: a vector holds one coefficient of several tokens.
// Coefficients are in the order pre | post | residual; HC has those of one stream after the other.
#pragma once

#include "sinkhorn/sinkhorn.h"

namespace mhc {

enum : int64_t { rule_sinkhorn = 0, rule_gates = 1, rule_tanh = 2, rule_linear = 3 };

template <typename A>
struct Rule {
    int64_t name;
    int64_t iterations;
    const A* alpha;
    const A* bias;
    int64_t n;
    int64_t coefficients;  // K: n² + 2n or 2n + m, and n + 2 for HC

    bool per_stream() const { return name >= rule_tanh; }
    int64_t rows() const { return per_stream() ? n : 1; }  // norms of a token
    int64_t residuals() const { return per_stream() ? n * n : coefficients - 2 * n; }
    int64_t gates() const { return per_stream() ? 2 : 3; }
    int64_t gate_of(int64_t k) const { return per_stream() ? k == 1 : (k >= n) + (k >= 2 * n); }
    A gate(int64_t k) const { return alpha[gate_of(k)]; }
};

// What all three arrays of mappings hold: [n | n | residuals][group].
template <typename A>
inline int64_t mapping_count(const Rule<A>& rule) {
    return 2 * rule.n + rule.residuals();
}

template <typename A>
inline Vector<A> activated(Vector<A> normed, int64_t rule) {
    return rule == rule_tanh ? tanh_of(normed) : normed;
}

// Of HC: the place of coefficient k of stream j among a token's mappings. Coefficient 2 + i of
// stream j is residual[i, j].
inline int64_t hyper_place(int64_t n, int64_t j, int64_t k) {
    return k < 2 ? k * n + j : 2 * n + (k - 2) * n + j;
}

template <typename A>
inline void mappings_of(const Rule<A>& rule, const A* raw, const A* inverse_rms, A* mappings) {
    const int64_t N = rule.n, K = rule.coefficients;
    for (int t = 0; t < group; t += lanes<A>) {
        if (rule.per_stream()) {
            for (int64_t j = 0; j < N; ++j)
                for (int64_t k = 0; k < K; ++k) {
                    Vector<A> inverse = load<A>(inverse_rms + j * group + t);
                    Vector<A> z = activated<A>(load<A>(raw + (j * K + k) * group + t) * inverse, rule.name);
                    const int64_t place = hyper_place(N, j, k);
                    store<A>(mappings + place * group + t, rule.gate(k) * z + rule.bias[place]);
                }
            continue;
        }
        Vector<A> inverse = load<A>(inverse_rms + t), slope;
        for (int64_t k = 0; k < K; ++k) {
            Vector<A> value = load<A>(raw + k * group + t) * rule.gate(k) * inverse + rule.bias[k];
            if (k < 2 * N) sigmoid<A>(value, value, slope);
            store<A>(mappings + k * group + t, k >= N && k < 2 * N ? value * 2 : value);
        }
    }
    A* logits = mappings + 2 * N * group;
    if (rule.name == rule_sinkhorn) sinkhorn_group<A>(N, logits, logits, rule.iterations);
}

// Room that `mappings_backward` needs, for one group after the other.
template <typename A>
struct CoefficientRoom {
    std::vector<Vector<A>> history;
    std::vector<A> logits;

    explicit CoefficientRoom(const Rule<A>& rule)
        : history(rule.name == rule_sinkhorn ? 2 * rule.iterations * rule.n * rule.n : 0),
          logits(rule.residuals() * group) {}
};

// Takes gradients of the mappings in `grads` [mappings][group], overwritten, and returns those of
// `raw`, already times the inverse norm, and of the norm, as the factor of x that it adds. Gradients
// of gates and biases are added to `alpha_terms` [rows · K][group] and `bias_terms` [mappings][group].
// `squares` is the number of squares in the mean of a norm.
template <typename A>
inline void mappings_backward(
    const Rule<A>& rule, const A* raw, const A* inverse_rms, int64_t squares, A* grads, A* raw_grad,
    A* scale, A* alpha_terms, A* bias_terms, CoefficientRoom<A>& room
) {
    const int64_t N = rule.n, K = rule.coefficients;
    for (int t = 0; !rule.per_stream() && t < group; t += lanes<A>) {
        Vector<A> inverse = load<A>(inverse_rms + t), value, slope;
        for (int64_t k = 0; k < K; ++k) {
            Vector<A> logit = load<A>(raw + k * group + t) * rule.gate(k) * inverse + rule.bias[k];
            if (k >= 2 * N) {
                store<A>(room.logits.data() + (k - 2 * N) * group + t, logit);
                continue;
            }
            sigmoid<A>(logit, value, slope);
            A* grad = grads + k * group + t;
            store<A>(grad, load<A>(grad) * slope * A(k < N ? 1 : 2));
        }
    }
    if (rule.name == rule_sinkhorn)
        sinkhorn_group_backward<A>(
            N, room.logits.data(), grads + 2 * N * group, rule.iterations, room.history.data()
        );
    for (int t = 0; t < group; t += lanes<A>) {
        for (int64_t k = 0; k < mapping_count(rule); ++k) {
            A* to = bias_terms + k * group + t;
            store<A>(to, load<A>(to) + load<A>(grads + k * group + t));
        }
        for (int64_t row = 0; row < rule.rows(); ++row) {
            Vector<A> inverse = load<A>(inverse_rms + row * group + t), norm_grad{};
            for (int64_t k = 0; k < K; ++k) {
                const int64_t at = (row * K + k) * group + t;
                const int64_t place = rule.per_stream() ? hyper_place(N, row, k) : k;
                Vector<A> value = load<A>(raw + at), grad = load<A>(grads + place * group + t);
                Vector<A> z = activated<A>(value * inverse, rule.name);
                store<A>(alpha_terms + at, load<A>(alpha_terms + at) + grad * z);
                grad *= rule.gate(k);
                if (rule.name == rule_tanh) grad *= 1 - z * z;
                norm_grad += grad * value;
                store<A>(raw_grad + at, grad * inverse);
            }
            store<A>(scale + row * group + t, inverse * inverse * inverse * norm_grad / A(-squares));
        }
    }
}

}  // namespace mhc
