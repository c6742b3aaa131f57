// Mixing the streams of one token and writing a sub-layer's output to them, and back.
#pragma once

#include "compiled_support/views.h"

namespace mhc {

// `residual` is [n, n] and `post` [n]: those of the token.
template <typename A>
void merge_token(
    int64_t n, const View& streams, const View& output, const A* residual, const A* post,
    const View& merged, int64_t width, int64_t t
);

// Where the gradients of merging go, null where not wanted. `residual` and `post` come together.
template <typename A>
struct MergeGrads {
    const View* streams;
    const View* output;
    A* residual;
    A* post;
};

// `grad_token` is the token's place in `grad`, which may hold a group of tokens alone.
template <typename A>
void merge_token_backward(
    int64_t n, const View& grad, int64_t grad_token, const View& streams, const View& output,
    const A* residual, const A* post, const MergeGrads<A>& grads, int64_t width, int64_t t
);

}  // namespace mhc
