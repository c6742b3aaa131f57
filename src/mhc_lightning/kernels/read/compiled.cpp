// Reading, forward and backward.
#include "read/read_backward.h"
#include "read/read_forward.h"

namespace mhc {

template <typename A>
void read_forward(
    const Reading* reading, const View* read, void* pre, void* post, void* residual, void* raw,
    void* inverse_rms, int64_t threads
) {
    const ReadOperands<A> given = reading->operands<A>();
    const ReadResults<A> results{read, (A*)pre, (A*)post, (A*)residual, (A*)raw, (A*)inverse_rms};
    std::vector<A> phi(given.packing().size());
    given.packing().by_rows((const A*)reading->phi, phi.data());
    constexpr int64_t share = 4 * group;
    each_block((given.tokens + share - 1) / share, threads, [&](int64_t block) {
        ReadForward<A> forward(given, phi.data(), results);
        const int64_t last = std::min(given.tokens, (block + 1) * share);
        for (int64_t first = block * share; first < last; first += group) forward.run(first);
    });
}

template <typename A>
void read_backward(
    const Reading* reading, const void* pre, const void* raw, const void* inverse_rms,
    const View* kept_grad, const View* read_grad, const void* pre_grad, const void* post_grad,
    const void* residual_grad, const View* streams_grad, void* phi_grad, void* alpha_grad,
    void* bias_grad, void* carry_grad, int64_t threads
) {
    const ReadOperands<A> given = reading->operands<A>();
    const ReadBackwardOperands<A> more{
        (const A*)pre,       (const A*)raw,           (const A*)inverse_rms, kept_grad,
        read_grad,           (const A*)pre_grad,      (const A*)post_grad,
        (const A*)residual_grad, (A*)carry_grad,      phi_grad != nullptr,
    };
    std::vector<A> phi(given.packing().rows() * given.rule.coefficients);
    given.packing().by_tiles((const A*)reading->phi, phi.data());
    const int64_t share = block_tokens(given.tokens);
    ReadBlocks<A> blocks((given.tokens + share - 1) / share);
    each_block(blocks.size(), threads, [&](int64_t block) {
        blocks[block] = std::make_unique<ReadBackward<A>>(given, phi.data(), more);
        const int64_t last = std::min(given.tokens, (block + 1) * share);
        for (int64_t first = block * share; first < last; first += group)
            blocks[block]->run(first, streams_grad, 0);
    });
    add_up<A>(given, blocks, (A*)phi_grad, (A*)alpha_grad, (A*)bias_grad, threads);
}

}  // namespace mhc

MHC_EXPORT(
    read_forward,
    (const mhc::Reading* reading, const mhc::View* read, void* pre, void* post, void* residual,
     void* raw, void* inverse_rms, int64_t threads),
    (reading, read, pre, post, residual, raw, inverse_rms, threads)
)
MHC_EXPORT(
    read_backward,
    (const mhc::Reading* reading, const void* pre, const void* raw, const void* inverse_rms,
     const mhc::View* kept_grad, const mhc::View* read_grad, const void* pre_grad,
     const void* post_grad, const void* residual_grad, const mhc::View* streams_grad,
     void* phi_grad, void* alpha_grad, void* bias_grad, void* carry_grad, int64_t threads),
    (reading, pre, raw, inverse_rms, kept_grad, read_grad, pre_grad, post_grad, residual_grad,
     streams_grad, phi_grad, alpha_grad, bias_grad, carry_grad, threads)
)
