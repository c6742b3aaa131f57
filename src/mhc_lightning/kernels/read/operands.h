// The operands of reading, forward and backward, as all groups of tokens share them.
#pragma once

#include "aggregate/aggregate.h"
#include "read/coefficients.h"
#include "read/project.h"

namespace mhc {

template <typename A>
struct ReadOperands {
    const View* streams;
    const A* carry;  // [T, n]; null where the new `pre` are the weights
    int64_t tokens;
    int64_t width;
    A eps;
    Rule<A> rule;

    Packing<A> packing() const {
        return {rule.per_stream() ? 1 : rule.n, width, rule.coefficients};
    }
    int64_t squares() const { return rule.per_stream() ? width : rule.n * width; }
    // The row of phi, packed, where stream j's columns from c on begin.
    int64_t row(int64_t j, int64_t c) const {
        return (rule.per_stream() ? 0 : j * padded<A>(width)) + c;
    }
    // Among a token's norms, that of stream j.
    int64_t norm(int64_t j) const { return rule.per_stream() ? j : 0; }
};

// The operands as Python hands them over: the same fields as `Reading` of read/compiled.py.
struct Reading {
    const View* streams;
    const void* phi;
    const void* alpha;
    const void* bias;
    const void* carry;
    int64_t tokens;
    int64_t n;
    int64_t width;
    int64_t coefficients;
    int64_t rule;
    int64_t iterations;
    double eps;

    template <typename A>
    ReadOperands<A> operands() const {
        const Rule<A> made{rule, iterations, (const A*)alpha, (const A*)bias, n, coefficients};
        return {streams, (const A*)carry, tokens, width, A(eps), made};
    }
};

// Rows [tokens, count] of a tensor as lanes [count][group] of a group, zero behind the last token.
template <typename A>
inline void to_lanes(const A* tensor, int64_t first, int64_t tokens, int64_t count, A* to) {
    for (int64_t t = 0; t < group; ++t)
        for (int64_t k = 0; k < count; ++k)
            to[k * group + t] = tensor && t < tokens ? tensor[(first + t) * count + k] : A(0);
}

template <typename A>
inline void from_lanes(const A* from, int64_t first, int64_t tokens, int64_t count, A* tensor) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t k = 0; k < count; ++k) tensor[(first + t) * count + k] = from[k * group + t];
}

}  // namespace mhc
