// Vectors of a CPU's register size, and the few functions of them that the operators need.
//
// GCC's and Clang's vector extensions: the same source for AVX2, AVX-512 and others.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace mhc {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#else
constexpr int vector_bytes = 32;
#endif

template <typename A>
struct Vectors;
template <>
struct Vectors<float> {
    typedef float Type __attribute__((vector_size(vector_bytes)));
    typedef int32_t Bits __attribute__((vector_size(vector_bytes)));
};
template <>
struct Vectors<double> {
    typedef double Type __attribute__((vector_size(vector_bytes)));
    typedef int64_t Bits __attribute__((vector_size(vector_bytes)));
};

template <typename A>
using Vector = typename Vectors<A>::Type;
template <typename A>
using Bits = typename Vectors<A>::Bits;
template <typename A>
constexpr int lanes = vector_bytes / sizeof(A);

template <typename A>
inline Vector<A> load(const A* from) {
    Vector<A> value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

template <typename A>
inline void store(A* to, Vector<A> value) {
    std::memcpy(to, &value, sizeof(value));
}

template <typename A>
inline Vector<A> broadcast(A value) {
    return value - Vector<A>{};
}

template <typename A>
inline A sum(Vector<A> value) {
    A total = 0;
    for (int k = 0; k < lanes<A>; ++k) total += value[k];
    return total;
}

// The larger of two; NaN if either is NaN.
template <typename A>
inline Vector<A> larger(Vector<A> a, Vector<A> b) {
    return (a > b) | (a != a) ? a : b;
}

// exp(x) for x <= 0 to one unit in the last place; 0 below -87, NaN for NaN.
inline Vector<float> exp_of_negative(Vector<float> x) {
    const float magic = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer
    Vector<float> shifted = x * 1.44269504088896341f + magic;
    Vector<float> whole = shifted - magic;
    Vector<float> rest = x - whole * 0.693359375f;
    rest = rest - whole * -2.12194440e-4f;
    Vector<float> value = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    value = value * rest + 8.3334519073e-3f;
    value = value * rest + 4.1665795894e-2f;
    value = value * rest + 1.6666665459e-1f;
    value = value * rest + 5.0000001201e-1f;
    value = value * (rest * rest) + rest + 1.0f;
    Bits<float> power;
    std::memcpy(&power, &shifted, sizeof(power));
    power = (power << 23) + 0x3f800000;
    Vector<float> scale;
    std::memcpy(&scale, &power, sizeof(scale));
    return x < -87.0f ? Vector<float>{} : value * scale;
}

inline Vector<double> exp_of_negative(Vector<double> x) {
    for (int k = 0; k < lanes<double>; ++k) x[k] = std::exp(x[k]);
    return x;
}

// σ(x), and its derivative, both exact for x of any size.
template <typename A>
inline void sigmoid(Vector<A> x, Vector<A>& value, Vector<A>& slope) {
    Vector<A> e = exp_of_negative(x > 0 ? -x : x);
    Vector<A> larger_half = 1 / (1 + e);
    value = x < 0 ? e * larger_half : larger_half;
    slope = e * larger_half * larger_half;
}

inline Vector<float> tanh_of(Vector<float> x) {
    Vector<float> size = x < 0 ? -x : x, square = x * x;
    Vector<float> e = exp_of_negative(-2 * size);
    Vector<float> far = (1 - e) / (1 + e);
    Vector<float> near = square * -5.70498872745e-3f + 2.06390887954e-2f;
    near = near * square - 5.37397155531e-2f;
    near = near * square + 1.33314422036e-1f;
    near = near * square - 3.33332819422e-1f;
    near = near * square * x + x;
    return size < 0.625f ? near : (x < 0 ? -far : far);
}

inline Vector<double> tanh_of(Vector<double> x) {
    for (int k = 0; k < lanes<double>; ++k) x[k] = std::tanh(x[k]);
    return x;
}

}  // namespace mhc
