// Gated writes, forward and backward: each stream-sized operand is read or written once.
//
// The convolution sees `scale · value`, with a scale for each stream: it is never written.
#include "gated_write/seen.h"

namespace mhc {

template <typename A>
void gated_write_forward(
    const View* streams, const View* value, const void* gate, const void* taps, const View* made,
    int64_t rows, int64_t positions, int64_t length, int64_t n, int64_t width, int64_t count,
    int64_t dilation, int64_t threads
) {
    const Written<A> given(
        *value, (const A*)gate, (const A*)taps, {rows, positions, n, width, count, dilation},
        threads
    );
    const int64_t tokens = rows * length;
    each_block((tokens + group - 1) / group, threads, [&](int64_t block) {
        alignas(vector_bytes) A buffer[chunk], result[chunk];
        Seen<A> seen(given);
        const int64_t last = std::min<int64_t>(tokens, (block + 1) * group);
        for (int64_t t = block * group; t < last; ++t) {
            const int64_t place = t / length * positions + positions - length + t % length;
            seen.look_from(place);
            for (int64_t c = 0; c < width; c += chunk) {
                const int64_t columns = std::min<int64_t>(chunk, width - c);
                const int64_t whole = padded<A>(columns);
                seen.fetch_columns(c, columns);
                for (int64_t i = 0; i < n; ++i) {
                    const A* h = fetch<A>(*streams, streams->at(t, i, c), columns, buffer);
                    A* out = target<A>(*made, made->at(t, i, c), columns, result);
                    const Vector<A> of_gate = broadcast<A>(given.gate[place * n + i]);
                    for (int64_t s = 0; s < whole; s += lanes<A>) {
                        Vector<A> total = load<A>(h + s) + of_gate * load<A>(seen.now() + s);
                        if (count) {
                            const Vector<A> mixed = seen.mixed(i, c, s);
                            Vector<A> squashed, slope;
                            sigmoid<A>(mixed, squashed, slope);
                            total += mixed * squashed;
                        }
                        store<A>(out + s, total);
                    }
                    finish<A>(*made, made->at(t, i, c), columns, out);
                }
            }
        }
    });
}

// Gradients of the places [first, last), from all outputs that see them. The sums of the latest
// places, which outputs still to come may see, are kept in turn in a few slots.
template <typename A>
class WriteBackward {
public:
    std::vector<A> taps_grad;  // [n, count, padded width], of the outputs at these places

    WriteBackward(
        const Written<A>& given, const View& grad, int64_t length, const View& value_grad,
        A* gate_grad, int64_t first, int64_t last
    )
        : taps_grad(given.taps.size()), given(given), grad(grad), value_grad(value_grad),
          gate_grad(gate_grad), length(length), first(first), last(last), wide(given.wide),
          slots(given.reach() + 1), seen(given), value_sums(slots * wide),
          gate_sums(slots * given.size.n), scale_sums(slots * given.size.n) {}

    void run() {
        const int64_t positions = given.size.positions, reach = given.reach();
        const int64_t end = std::min(given.places(), last + reach);
        for (int64_t place = first; place < end; ++place) {
            const int64_t position = place % positions;
            if (place >= last && position == 0) return;  // another row
            clear(place);
            if (position >= positions - length) take(place);
            if (position >= reach) complete(place - reach);
            if (position < positions - 1) continue;
            for (int64_t p = place - std::min(position, reach - 1); p <= place; ++p) complete(p);
        }
    }

private:
    const Written<A>& given;
    const View &grad, &value_grad;
    A* gate_grad;
    const int64_t length, first, last, wide, slots;
    Seen<A> seen;
    std::vector<A> value_sums, gate_sums, scale_sums;  // [slots, padded width], [slots, n] twice
    alignas(vector_bytes) A of_grad[chunk], of_value[chunk], mixed_grad[chunk], result[chunk];

    void clear(int64_t place) {
        const int64_t slot = place % slots, n = given.size.n;
        std::fill_n(&value_sums[slot * wide], wide, A(0));
        std::fill_n(&gate_sums[slot * n], n, A(0));
        std::fill_n(&scale_sums[slot * n], n, A(0));
    }

    // What the output at a place sends back.
    void take(int64_t place) {
        const int64_t positions = given.size.positions, width = given.size.width;
        const int64_t output = place % positions - (positions - length);
        const int64_t t = place / positions * length + output;
        seen.look_from(place);
        for (int64_t c = 0; c < width; c += chunk) {
            const int64_t columns = std::min<int64_t>(chunk, width - c);
            seen.fetch_columns(c, columns);
            for (int64_t i = 0; i < given.size.n; ++i) {
                const A* g = fetch<A>(grad, grad.at(t, i, c), columns, of_grad);
                take_written(place, i, c, padded<A>(columns), g);
                if (given.size.count) take_convolved(place, i, c, padded<A>(columns), g);
            }
        }
    }

    void take_written(int64_t place, int64_t i, int64_t c, int64_t whole, const A* g) {
        const int64_t slot = place % slots, n = given.size.n;
        const Vector<A> gate = broadcast<A>(given.gate[place * n + i]);
        A* to = &value_sums[slot * wide + c];
        Vector<A> total{};
        for (int64_t s = 0; s < whole; s += lanes<A>) {
            const Vector<A> sent = load<A>(g + s);
            total += sent * load<A>(seen.now() + s);
            store<A>(to + s, load<A>(to + s) + gate * sent);
        }
        gate_sums[slot * n + i] += sum<A>(total);
    }

    void take_convolved(int64_t place, int64_t i, int64_t c, int64_t whole, const A* g) {
        for (int64_t s = 0; s < whole; s += lanes<A>) {
            const Vector<A> mixed = seen.mixed(i, c, s);
            Vector<A> squashed, slope;
            sigmoid<A>(mixed, squashed, slope);
            store<A>(mixed_grad + s, load<A>(g + s) * (squashed + mixed * slope));
        }
        const bool of_these = place < last;
        for (int64_t k = seen.earliest; k < given.size.count; ++k) {
            const int64_t slot = (place - given.back(k)) % slots;
            const Vector<A> scale = broadcast<A>(seen.scale(i, k));
            const A *tap = given.tap(i, k) + c, *x = seen.row(k);
            A* to = &value_sums[slot * wide + c];
            A* taps_to = &taps_grad[given.tap_at(i, k) + c];
            Vector<A> total{};
            for (int64_t s = 0; s < whole; s += lanes<A>) {
                const Vector<A> back = load<A>(mixed_grad + s), through_tap = load<A>(tap + s) * back;
                total += through_tap * load<A>(x + s);
                store<A>(to + s, load<A>(to + s) + scale * through_tap);
                if (of_these)
                    store<A>(taps_to + s, load<A>(taps_to + s) + scale * back * load<A>(x + s));
            }
            scale_sums[slot * given.size.n + i] += sum<A>(total);
        }
    }

    // Writes the gradients of a place that all outputs have been taken for.
    void complete(int64_t place) {
        if (place < first || place >= last) return;
        const int64_t slot = place % slots, n = given.size.n, width = given.size.width;
        A square_grad = 0;
        for (int64_t i = 0; i < n; ++i) {
            A total = gate_sums[slot * n + i];
            if (given.size.count) {
                const A gate = given.gate[place * n + i], inverse = given.inverse[place * n + i];
                const A cubed = scale_sums[slot * n + i] * inverse * inverse * inverse;
                total += A(conv_eps) * cubed;
                square_grad -= cubed * gate * gate * gate / 2;
            }
            gate_grad[place * n + i] = total;
        }
        const Vector<A> factor = broadcast<A>(square_grad * 2 / width);
        for (int64_t c = 0; c < width; c += chunk) {
            const int64_t columns = std::min<int64_t>(chunk, width - c), whole = padded<A>(columns);
            const A* x = fetch<A>(given.value, given.value.at(place, 0, c), columns, of_value);
            const A* sums = &value_sums[slot * wide + c];
            const int64_t at = value_grad.at(place, 0, c);
            A* out = target<A>(value_grad, at, columns, result);
            for (int64_t s = 0; s < whole; s += lanes<A>) {
                Vector<A> total = load<A>(sums + s);
                if (given.size.count) total += factor * load<A>(x + s);
                store<A>(out + s, total);
            }
            finish<A>(value_grad, at, columns, out);
        }
    }
};

template <typename A>
void gated_write_backward(
    const View* grad, const View* value, const void* gate, const void* taps,
    const View* value_grad, void* gate_grad, void* taps_grad, int64_t rows, int64_t positions,
    int64_t length, int64_t n, int64_t width, int64_t count, int64_t dilation, int64_t threads
) {
    const Written<A> given(
        *value, (const A*)gate, (const A*)taps, {rows, positions, n, width, count, dilation},
        threads
    );
    // What lies beyond a block is computed once more: it stays less than the block.
    const int64_t places = given.places(), share = std::max(block_tokens(places), given.reach());
    std::vector<std::vector<A>> sums((places + share - 1) / share);
    each_block(sums.size(), threads, [&](int64_t block) {
        const int64_t last = std::min(places, (block + 1) * share);
        WriteBackward<A> part(
            given, *grad, length, *value_grad, (A*)gate_grad, block * share, last
        );
        part.run();
        sums[block] = std::move(part.taps_grad);
    });
    if (!count) return;
    add_parts(sums.size(), given.taps.size(), threads, [&](int64_t block) {
        return sums[block].data();
    });
    for (int64_t k = 0; k < count; ++k)
        for (int64_t i = 0; i < n; ++i)
            std::copy_n(&sums[0][given.tap_at(i, k)], width, (A*)taps_grad + (k * n + i) * width);
}

}  // namespace mhc

MHC_EXPORT(
    gated_write_forward,
    (const mhc::View* streams, const mhc::View* value, const void* gate, const void* taps,
     const mhc::View* made, int64_t rows, int64_t positions, int64_t length, int64_t n,
     int64_t width, int64_t count, int64_t dilation, int64_t threads),
    (streams, value, gate, taps, made, rows, positions, length, n, width, count, dilation, threads)
)
MHC_EXPORT(
    gated_write_backward,
    (const mhc::View* grad, const mhc::View* value, const void* gate, const void* taps,
     const mhc::View* value_grad, void* gate_grad, void* taps_grad, int64_t rows,
     int64_t positions, int64_t length, int64_t n, int64_t width, int64_t count, int64_t dilation,
     int64_t threads),
    (grad, value, gate, taps, value_grad, gate_grad, taps_grad, rows, positions, length, n, width,
     count, dilation, threads)
)
