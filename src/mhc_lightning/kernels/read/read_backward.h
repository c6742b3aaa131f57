// The way back of reading, for a group of tokens at a time.
#pragma once

#include <memory>

#include "compiled_support/sums.h"
#include "read/operands.h"

namespace mhc {

// What the backward pass takes beside the operands. Pointers are null where there is no gradient,
// or where none is wanted.
template <typename A>
struct ReadBackwardOperands {
    const A* pre;
    const A* raw;
    const A* inverse_rms;
    const View* kept_grad;
    const View* read_grad;
    const A* pre_grad;
    const A* post_grad;
    const A* residual_grad;
    A* carry_grad;
    bool wants_phi;
};

// One object per block of groups: the room that they use, and their sums over tokens.
template <typename A>
class ReadBackward {
public:
    std::vector<A> phi_grad;  // by rows
    std::vector<A> alpha_terms, bias_terms;

    ReadBackward(const ReadOperands<A>& given, const A* phi, const ReadBackwardOperands<A>& more)
        : phi_grad(more.wants_phi ? given.packing().size() : 0),
          alpha_terms(given.rule.rows() * given.rule.coefficients * group),
          bias_terms(mapping_count(given.rule) * group),
          given(given),
          phi(phi),
          more(more),
          packing(given.packing()),
          N(given.rule.n),
          rows(given.rule.rows()),
          K(given.rule.coefficients),
          raw(rows * K * group),
          raw_grad(rows * K * group),
          inverse_rms(rows * group),
          scale(rows * group),
          grads(mapping_count(given.rule) * group),
          by_token(rows * K * group),
          by_panel(rows * packing.padded_coefficients() * group),
          columns(group * chunk),
          room(given.rule) {}

    // `streams_grad` is null if not wanted; its first token is token `origin` of the streams.
    void run(int64_t first, const View* streams_grad, int64_t origin) {
        const int64_t tokens = std::min<int64_t>(group, given.tokens - first);
        coefficients(first, tokens);
        if (!streams_grad && !more.wants_phi) return;
        for (int64_t j = 0; j < N; ++j)
            for (int64_t c = 0; c < given.width; c += chunk) {
                const int64_t count = std::min<int64_t>(chunk, given.width - c);
                // A copy, since rows a power of two apart would drive one another out of the cache.
                const A* x[group];
                for (int64_t t = 0; t < tokens; ++t) {
                    A* to = columns.data() + t * chunk;
                    copy_row<A>(*given.streams, given.streams->at(first + t, j, c), count, to);
                    x[t] = to;
                }
                for (int64_t t = 0; streams_grad && t < tokens; t += together)
                    spread(first, t, tokens, j, c, count, x, *streams_grad, origin);
                if (more.wants_phi)
                    add_outer<A>(
                        packing, x, given.row(j, c), padded<A>(count),
                        by_panel.data() + given.norm(j) * packing.padded_coefficients() * group,
                        tokens, phi_grad.data()
                    );
            }
    }

private:
    const ReadOperands<A>& given;
    const A* phi;  // by tiles
    const ReadBackwardOperands<A>& more;
    const Packing<A> packing;
    const int64_t N, rows, K;
    std::vector<A> raw, raw_grad, inverse_rms, scale, grads, by_token, by_panel, columns;
    CoefficientRoom<A> room;

    void coefficients(int64_t first, int64_t tokens) {
        A* lanes_of = grads.data();
        to_lanes(more.pre_grad, first, tokens, N, lanes_of);
        to_lanes(more.post_grad, first, tokens, N, lanes_of + N * group);
        to_lanes(
            more.residual_grad, first, tokens, given.rule.residuals(), lanes_of + 2 * N * group
        );
        for (int64_t t = 0; more.read_grad && t < tokens; ++t) {
            A dots[most_streams];
            if (given.carry && !more.carry_grad) break;
            dot_token<A>(*given.streams, *more.read_grad, N, given.width, first + t, dots);
            for (int64_t j = 0; j < N; ++j) {
                if (given.carry) more.carry_grad[(first + t) * N + j] = dots[j];
                else grads[j * group + t] += dots[j];
            }
        }
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t t = 0; t < group; ++t) {
                const int64_t at = (first + t) * rows + row;
                inverse_rms[row * group + t] = t < tokens ? more.inverse_rms[at] : A(0);
                for (int64_t k = 0; k < K; ++k)
                    raw[(row * K + k) * group + t] =
                        t < tokens ? more.raw[k * given.tokens * rows + at] : A(0);
            }
        mappings_backward<A>(
            given.rule, raw.data(), inverse_rms.data(), given.squares(), grads.data(),
            raw_grad.data(), scale.data(), alpha_terms.data(), bias_terms.data(), room
        );
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t k = 0; k < K; ++k)
                for (int64_t t = 0; t < tokens; ++t) {
                    const A value = raw_grad[(row * K + k) * group + t];
                    const int64_t p = row * packing.panels() + k / panel<A>;
                    by_token[(t * rows + row) * K + k] = value;
                    by_panel[(p * group + t) * panel<A> + k % panel<A>] = value;
                }
    }

    // The streams' gradient in a chunk of columns of four tokens.
    void spread(
        int64_t first, int64_t t, int64_t tokens, int64_t j, int64_t c, int64_t count,
        const A* const* x, const View& streams_grad, int64_t origin
    ) {
        alignas(vector_bytes) A of_kept[together][chunk], of_read[together][chunk];
        alignas(vector_bytes) A results[together][chunk];
        static const A zeros[chunk] = {};
        const A* weights = given.carry ? given.carry : more.pre;
        RowGrads<A> sums;
        for (int64_t q = 0; q < together; ++q) {
            const int64_t at = t + q < tokens ? t + q : t;  // the last ones are computed for nothing
            const int64_t token = first + at;
            const int64_t norm = at * rows + given.norm(j);
            sums.raw[q] = by_token.data() + norm * K;
            sums.x[q] = x[at];
            sums.scale[q] = scale[given.norm(j) * group + at];
            sums.weight[q] = weights[token * N + j];
            sums.kept[q] = sums.read[q] = zeros;
            if (more.kept_grad)
                sums.kept[q] =
                    fetch<A>(*more.kept_grad, more.kept_grad->at(token, j, c), count, of_kept[q]);
            if (more.read_grad)
                sums.read[q] =
                    fetch<A>(*more.read_grad, more.read_grad->at(token, 0, c), count, of_read[q]);
            sums.out[q] = results[q];
            if (t + q < tokens)
                sums.out[q] = target<A>(
                    streams_grad, streams_grad.at(token - origin, j, c), count, results[q]
                );
        }
        project_rows_backward<A>(
            phi + given.row(j, c) * K, K, padded<A>(count), sums
        );
        for (int64_t q = 0; q < together && t + q < tokens; ++q)
            finish<A>(streams_grad, streams_grad.at(first + t + q - origin, j, c), count, sums.out[q]);
    }
};

template <typename A>
using ReadBlocks = std::vector<std::unique_ptr<ReadBackward<A>>>;

// Adds up what blocks of tokens have found, always in the same order.
template <typename A>
inline void add_up(
    const ReadOperands<A>& given, const ReadBlocks<A>& blocks, A* phi_grad, A* alpha_grad,
    A* bias_grad, int64_t threads
) {
    const int64_t rows = given.rule.rows(), K = given.rule.coefficients;
    std::vector<double> alpha(given.rule.gates()), bias(mapping_count(given.rule));
    for (const auto& block : blocks) {
        for (int64_t k = 0; k < rows * K; ++k)
            for (int64_t t = 0; t < group; ++t)
                alpha[given.rule.gate_of(k % K)] += block->alpha_terms[k * group + t];
        for (size_t k = 0; k < bias.size(); ++k)
            for (int64_t t = 0; t < group; ++t) bias[k] += block->bias_terms[k * group + t];
    }
    std::copy(alpha.begin(), alpha.end(), alpha_grad);
    std::copy(bias.begin(), bias.end(), bias_grad);
    if (!phi_grad) return;
    add_parts(blocks.size(), given.packing().size(), threads, [&](int64_t block) {
        return blocks[block]->phi_grad.data();
    });
    given.packing().from_rows(blocks[0]->phi_grad.data(), phi_grad);
}

}  // namespace mhc
