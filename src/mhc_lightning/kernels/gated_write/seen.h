// What gated writes take, and what their convolution sees from a place.
//
// Places are positions counted through all rows.
#pragma once

#include "compiled_support/sums.h"

namespace mhc {

constexpr double conv_eps = 1e-5;  // CONV_EPS of operands.py

struct WriteSize {
    int64_t rows, positions, n, width;
    int64_t count;  // taps, 0 without a convolution
    int64_t dilation;
};

template <typename A>
struct Written {
    const View& value;  // [places, width]
    const A* gate;      // [places, n]
    const WriteSize size;
    const int64_t wide;  // the width, padded
    std::vector<A> taps;            // [n, count, padded width]
    std::vector<A> scale, inverse;  // [places, n], of `scale · value`; empty without taps

    Written(
        const View& value, const A* gate, const A* dense_taps, const WriteSize& size,
        int64_t threads
    )
        : value(value), gate(gate), size(size), wide(padded<A>(size.width)),
          taps(size.n * size.count * wide) {
        if (!size.count) return;
        for (int64_t k = 0; k < size.count; ++k)
            for (int64_t i = 0; i < size.n; ++i)
                std::copy_n(
                    dense_taps + (k * size.n + i) * size.width, size.width, &taps[tap_at(i, k)]
                );
        scale.resize(places() * size.n);
        inverse.resize(places() * size.n);
        each_block((places() + group - 1) / group, threads, [&](int64_t block) {
            const int64_t last = std::min(places(), (block + 1) * group);
            for (int64_t place = block * group; place < last; ++place) find_scales(place);
        });
    }

    int64_t places() const { return size.rows * size.positions; }
    // Places before the present one that a tap sees, and those that the first one does.
    int64_t back(int64_t tap) const { return (size.count - 1 - tap) * size.dilation; }
    int64_t reach() const { return size.count ? back(0) : 0; }
    int64_t tap_at(int64_t i, int64_t k) const { return (i * size.count + k) * wide; }
    const A* tap(int64_t i, int64_t k) const { return &taps[tap_at(i, k)]; }

private:
    void find_scales(int64_t place) {
        alignas(vector_bytes) A buffer[chunk];
        Vector<A> total{};
        for (int64_t c = 0; c < size.width; c += chunk) {
            const int64_t columns = std::min<int64_t>(chunk, size.width - c);
            const A* x = fetch<A>(value, value.at(place, 0, c), columns, buffer);
            for (int64_t s = 0; s < padded<A>(columns); s += lanes<A>)
                total += load<A>(x + s) * load<A>(x + s);
        }
        const A square = sum<A>(total) / size.width;
        for (int64_t at = place * size.n; at < (place + 1) * size.n; ++at) {
            inverse[at] = 1 / std::sqrt(gate[at] * gate[at] * square + A(conv_eps));
            scale[at] = gate[at] * inverse[at];
        }
    }
};

// The values and scales that the taps see from a place. Without taps, the place's own value.
template <typename A>
class Seen {
public:
    int64_t earliest = 0;  // tap: those before it would see what is before the row

    explicit Seen(const Written<A>& given)
        : given(given), taps(std::max<int64_t>(given.size.count, 1)), rows(taps),
          buffers(taps * chunk), scales(given.size.n * taps) {}

    void look_from(int64_t from) {
        place = from;
        const int64_t position = place % given.size.positions, n = given.size.n;
        earliest = taps - 1;
        if (!given.size.count) return;
        while (earliest > 0 && given.back(earliest - 1) <= position) --earliest;
        for (int64_t k = earliest; k < taps; ++k)
            for (int64_t i = 0; i < n; ++i)
                scales[i * taps + k] = given.scale[(place - given.back(k)) * n + i];
    }

    void fetch_columns(int64_t c, int64_t columns) {
        for (int64_t k = earliest; k < taps; ++k) {
            const int64_t from = place - (given.size.count ? given.back(k) : 0);
            const int64_t at = given.value.at(from, 0, c);
            rows[k] = fetch<A>(given.value, at, columns, &buffers[k * chunk]);
        }
    }

    const A* now() const { return rows[taps - 1]; }
    const A* row(int64_t k) const { return rows[k]; }
    A scale(int64_t i, int64_t k) const { return scales[i * taps + k]; }

    // The convolution's sums for stream i at the columns from `c + s`.
    Vector<A> mixed(int64_t i, int64_t c, int64_t s) const {
        Vector<A> total{};
        const A* tap = given.tap(i, 0) + c + s;
        for (int64_t k = earliest; k < taps; ++k)
            total += load<A>(tap + k * given.wide) * (scale(i, k) * load<A>(rows[k] + s));
        return total;
    }

private:
    const Written<A>& given;
    const int64_t taps;
    int64_t place = 0;
    std::vector<const A*> rows;
    std::vector<A> buffers, scales;
};

}  // namespace mhc
