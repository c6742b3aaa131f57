// Reading a group of tokens: their streams come into the cache once, and are used from there.
#pragma once

#include "read/operands.h"

namespace mhc {

template <typename A>
struct ReadResults {
    const View* read;  // null if not wanted
    A* pre;
    A* post;
    A* residual;
    A* raw;
    A* inverse_rms;
};

// One object per block of groups: it holds the room that they use one after the other.
template <typename A>
class ReadForward {
public:
    ReadForward(const ReadOperands<A>& given, const A* phi, const ReadResults<A>& results)
        : given(given),
          phi(phi),
          results(results),
          packing(given.packing()),
          N(given.rule.n),
          totals(group * given.rule.rows() * packing.padded_coefficients()),
          raw(given.rule.rows() * given.rule.coefficients * group),
          inverse_rms(given.rule.rows() * group),
          mappings(mapping_count(given.rule) * group) {}

    void run(int64_t first) {
        const int64_t tokens = std::min<int64_t>(group, given.tokens - first);
        project(first, tokens);
        mappings_of<A>(given.rule, raw.data(), inverse_rms.data(), mappings.data());
        const A* from = mappings.data();
        from_lanes(from, first, tokens, N, results.pre);
        from_lanes(from + N * group, first, tokens, N, results.post);
        from_lanes(from + 2 * N * group, first, tokens, given.rule.residuals(), results.residual);
        const A* weights = given.carry ? given.carry : results.pre;
        for (int64_t t = first; results.read && t < first + tokens; ++t)
            aggregate_token<A>(*given.streams, weights + t * N, *results.read, N, given.width, t);
    }

private:
    const ReadOperands<A>& given;
    const A* phi;  // by rows
    const ReadResults<A>& results;
    const Packing<A> packing;
    const int64_t N;
    std::vector<A> totals, raw, inverse_rms, mappings;
    A norms[most_streams][group];

    void project(int64_t first, int64_t tokens) {
        const int64_t rows = given.rule.rows(), wide = packing.padded_coefficients();
        alignas(vector_bytes) A buffers[together][chunk];
        std::fill(totals.begin(), totals.end(), A(0));
        std::memset(norms, 0, sizeof(norms));
        for (int64_t j = 0; j < N; ++j) {
            const int64_t norm = given.norm(j);
            for (int64_t c = 0; c < given.width; c += chunk) {
                const int64_t count = std::min<int64_t>(chunk, given.width - c);
                for (int64_t t = 0; t < tokens; t += together) {
                    const A* x[together] = {};
                    A* to[together];
                    for (int64_t q = 0; q < together; ++q) {
                        to[q] = totals.data() + ((t + q) * rows + norm) * wide;
                        x[q] = x[0];  // behind the last token: computed for nothing
                        if (t + q >= tokens) continue;
                        const int64_t at = given.streams->at(first + t + q, j, c);
                        x[q] = fetch<A>(*given.streams, at, count, buffers[q]);
                        norms[norm][t + q] += squares(x[q], padded<A>(count));
                    }
                    project_rows<A>(packing, phi, x, given.row(j, c), padded<A>(count), to);
                }
            }
        }
        for (int64_t row = 0; row < rows; ++row) keep(first, tokens, row);
    }

    // The norms and raw coefficients of one row of each token: as lanes, and as results.
    void keep(int64_t first, int64_t tokens, int64_t row) {
        const int64_t rows = given.rule.rows(), K = given.rule.coefficients;
        const int64_t wide = packing.padded_coefficients();
        for (int64_t t = 0; t < group; ++t) {
            const A mean = norms[row][t] / A(given.squares());
            inverse_rms[row * group + t] = t < tokens ? 1 / std::sqrt(mean + given.eps) : A(0);
        }
        for (int64_t k = 0; k < K; ++k)
            for (int64_t t = 0; t < group; ++t)
                raw[(row * K + k) * group + t] = totals[(t * rows + row) * wide + k];
        for (int64_t t = 0; t < tokens; ++t)
            results.inverse_rms[(first + t) * rows + row] = inverse_rms[row * group + t];
        for (int64_t k = 0; k < K; ++k) {
            A* to = results.raw + (k * given.tokens + first) * rows + row;
            for (int64_t t = 0; t < tokens; ++t) to[t * rows] = raw[(row * K + k) * group + t];
        }
    }
};

}  // namespace mhc
