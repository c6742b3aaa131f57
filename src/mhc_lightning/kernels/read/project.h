// Projecting rows of streams by phi, and the way back: products of tall and narrow matrices.
//
// A row is what is normalised together: all streams of a token (mHC), or one stream (HC). phi is
// copied once per call into an order that every product reads from beginning to end.
#pragma once

#include "compiled_support/views.h"

namespace mhc {

// Vectors of coefficients that one product takes: with four tokens, they fill the registers.
constexpr int panel_vectors = vector_bytes == 64 ? 2 : 3;
template <typename A>
constexpr int panel = panel_vectors * lanes<A>;
constexpr int together = 4;  // tokens of one product

// The order of phi [rows, K] in memory, where each stream's columns are padded.
template <typename A>
struct Packing {
    int64_t streams;  // that phi has rows for: n, or 1 for HC
    int64_t width;
    int64_t coefficients;

    int64_t padded_width() const { return padded<A>(width); }
    int64_t rows() const { return streams * padded_width(); }
    int64_t panels() const { return (coefficients + panel<A> - 1) / panel<A>; }
    int64_t padded_coefficients() const { return panels() * panel<A>; }
    int64_t size() const { return rows() * padded_coefficients(); }

    // [panel][row][column of the panel]
    void by_rows(const A* phi, A* packed) const {
        std::fill(packed, packed + size(), A(0));
        each_piece([&](int64_t at, int64_t place, int64_t count) {
            std::memcpy(packed + place, phi + at, count * sizeof(A));
        });
    }

    void from_rows(const A* packed, A* phi) const {
        each_piece([&](int64_t at, int64_t place, int64_t count) {
            std::memcpy(phi + at, packed + place, count * sizeof(A));
        });
    }

    // [tile of rows][coefficient][row of the tile]
    void by_tiles(const A* phi, A* packed) const {
        std::fill(packed, packed + rows() * coefficients, A(0));
        for (int64_t j = 0; j < streams; ++j)
            for (int64_t c = 0; c < width; ++c) {
                const A* from = phi + (j * width + c) * coefficients;
                const int64_t row = j * padded_width() + c;
                A* to = packed + row / tile<A> * coefficients * tile<A> + row % tile<A>;
                for (int64_t k = 0; k < coefficients; ++k) to[k * tile<A>] = from[k];
            }
    }

private:
    // f(place in phi, place in the order by rows, how many coefficients lie there together).
    template <typename F>
    void each_piece(const F& f) const {
        for (int64_t p = 0; p < panels(); ++p) {
            const int64_t count = std::min<int64_t>(panel<A>, coefficients - p * panel<A>);
            for (int64_t j = 0; j < streams; ++j)
                for (int64_t c = 0; c < width; ++c)
                    f((j * width + c) * coefficients + p * panel<A>,
                      (p * rows() + j * padded_width() + c) * panel<A>, count);
        }
    }
};

// Adds the products of four rows with P vectors of a panel's columns.
template <typename A, int P>
inline void project_by(const A* const* x, const A* phi, int64_t count, A* const* totals) {
    Vector<A> sums[together][P] = {};
    for (int64_t r = 0; r < count; ++r, phi += panel<A>) {
        Vector<A> column[P];
        for (int v = 0; v < P; ++v) column[v] = load<A>(phi + v * lanes<A>);
        for (int q = 0; q < together; ++q) {
            Vector<A> value = broadcast<A>(x[q][r]);
            for (int v = 0; v < P; ++v) sums[q][v] += value * column[v];
        }
    }
    for (int q = 0; q < together; ++q)
        for (int v = 0; v < P; ++v) {
            A* to = totals[q] + v * lanes<A>;
            store<A>(to, load<A>(to) + sums[q][v]);
        }
}

// Four rows from `row` of phi on; totals [padded coefficients] of each.
template <typename A>
inline void project_rows(
    const Packing<A>& packing, const A* phi, const A* const* x, int64_t row, int64_t count,
    A* const* totals
) {
    for (int64_t p = 0; p < packing.panels(); ++p) {
        const A* from = phi + (p * packing.rows() + row) * panel<A>;
        A* to[together];
        for (int q = 0; q < together; ++q) to[q] = totals[q] + p * panel<A>;
        const int64_t rest = packing.coefficients - p * panel<A>;
        if (rest <= lanes<A>) project_by<A, 1>(x, from, count, to);
        else if (rest <= 2 * lanes<A>) project_by<A, 2>(x, from, count, to);
        else project_by<A, panel_vectors>(x, from, count, to);
    }
}

template <typename A>
inline A squares(const A* x, int64_t count) {
    Vector<A> low{}, high{};
    for (int64_t c = 0; c < count; c += tile<A>) {
        Vector<A> a = load<A>(x + c), b = load<A>(x + c + lanes<A>);
        low += a * a;
        high += b * b;
    }
    return sum<A>(low + high);
}

// What the gradient of a chunk of four tokens' streams is a sum of.
template <typename A>
struct RowGrads {
    const A* raw[together];    // gradients of the raw coefficients, times phi
    const A* x[together];      // the streams themselves, times `scale`
    const A* kept[together];   // gradient that comes back through the merge
    const A* read[together];   // gradient of the sub-layer's input, times `weight`
    A scale[together];
    A weight[together];
    A* out[together];
};

template <typename A>
inline void project_rows_backward(
    const A* tiles, int64_t coefficients, int64_t count, const RowGrads<A>& grads
) {
    for (int64_t c = 0; c < count; c += tile<A>, tiles += coefficients * tile<A>) {
        Vector<A> sums[together][2] = {};
        for (int64_t k = 0; k < coefficients; ++k) {
            Vector<A> low = load<A>(tiles + k * tile<A>);
            Vector<A> high = load<A>(tiles + k * tile<A> + lanes<A>);
            for (int q = 0; q < together; ++q) {
                Vector<A> value = broadcast<A>(grads.raw[q][k]);
                sums[q][0] += value * low;
                sums[q][1] += value * high;
            }
        }
        for (int q = 0; q < together; ++q)
            for (int v = 0; v < 2; ++v) {
                const int64_t at = c + v * lanes<A>;
                Vector<A> total = sums[q][v] + load<A>(grads.kept[q] + at);
                total += broadcast<A>(grads.scale[q]) * load<A>(grads.x[q] + at);
                total += broadcast<A>(grads.weight[q]) * load<A>(grads.read[q] + at);
                store<A>(grads.out[q] + at, total);
            }
    }
}

// Adds to R rows and P vectors of a panel of phi's gradient: Σ_t x[t][row] · raw[t]. The registers
// hold the sums of eight vectors; with more of them compilers keep some in memory.
template <typename A, int P, int R>
inline void add_outer_by(
    const A* const* x, int64_t rows, const A* raw, int64_t tokens, A* grad
) {
    for (int64_t row = 0; row < rows; row += R, grad += R * panel<A>) {
        Vector<A> sums[R][P];
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < P; ++v) sums[r][v] = load<A>(grad + r * panel<A> + v * lanes<A>);
        for (int64_t t = 0; t < tokens; ++t) {
            Vector<A> given[P];
            for (int v = 0; v < P; ++v) given[v] = load<A>(raw + t * panel<A> + v * lanes<A>);
            for (int r = 0; r < R; ++r) {
                Vector<A> value = broadcast<A>(x[t][row + r]);
                for (int v = 0; v < P; ++v) sums[r][v] += value * given[v];
            }
        }
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < P; ++v) store<A>(grad + r * panel<A> + v * lanes<A>, sums[r][v]);
    }
}

// `raw` is [panel][token of the group][column of the panel], `grad` in the order of `by_rows`.
// `count` is a multiple of `tile`, which is one of 8.
template <typename A>
inline void add_outer(
    const Packing<A>& packing, const A* const* x, int64_t row, int64_t count, const A* raw,
    int64_t tokens, A* grad
) {
    static_assert(tile<A> % 8 == 0);
    for (int64_t p = 0; p < packing.panels(); ++p) {
        A* to = grad + (p * packing.rows() + row) * panel<A>;
        const A* from = raw + p * group * panel<A>;
        const int64_t rest = packing.coefficients - p * panel<A>;
        if (rest > lanes<A>) add_outer_by<A, 2, 4>(x, count, from, tokens, to);
        else add_outer_by<A, 1, 8>(x, count, from, tokens, to);
        if (panel_vectors > 2 && rest > 2 * lanes<A>)
            add_outer_by<A, 1, 8>(
                x, count, from + 2 * lanes<A>, tokens, to + 2 * lanes<A>
            );
    }
}

}  // namespace mhc
