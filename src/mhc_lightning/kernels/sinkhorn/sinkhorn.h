// Sinkhorn-Knopp (arXiv 2512.24880, eq. 9) on a group of tokens, and its exact gradient.
#pragma once

#include "compiled_support/views.h"

namespace mhc {

// Matrices of logits, both [n², group]; in place as well.
template <typename A>
void sinkhorn_group(int64_t n, const A* logits, A* matrices, int64_t iterations);

// Gradient of the logits, in the place of that of the matrices, both [n², group]. `history` has
// room for 2 · n² · iterations vectors: the iterates of a few tokens, which stay in the cache.
template <typename A>
void sinkhorn_group_backward(
    int64_t n, const A* logits, A* grads, int64_t iterations, Vector<A>* history
);

}  // namespace mhc
