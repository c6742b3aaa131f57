// Merging and reading in one pass over the streams, and one pass back.
#include "merge/merge.h"
#include "read/read_backward.h"
#include "read/read_forward.h"

namespace mhc {

// `reading` reads the merged streams.
template <typename A>
void merge_read_forward(
    const View* streams, const View* output, const void* residual, const void* post,
    const View* merged, const Reading* reading, const View* read, void* pre, void* next_post,
    void* next_residual, void* raw, void* inverse_rms, int64_t threads
) {
    const ReadOperands<A> given = reading->operands<A>();
    const int64_t n = reading->n, width = reading->width;
    const ReadResults<A> results{
        read, (A*)pre, (A*)next_post, (A*)next_residual, (A*)raw, (A*)inverse_rms
    };
    std::vector<A> phi(given.packing().size());
    given.packing().by_rows((const A*)reading->phi, phi.data());
    constexpr int64_t share = 4 * group;
    each_block((given.tokens + share - 1) / share, threads, [&](int64_t block) {
        ReadForward<A> forward(given, phi.data(), results);
        const int64_t last = std::min(given.tokens, (block + 1) * share);
        for (int64_t first = block * share; first < last; first += group) {
            for (int64_t t = first; t < std::min(last, first + group); ++t)
                merge_token<A>(
                    n, *streams, *output, (const A*)residual + t * n * n, (const A*)post + t * n,
                    *merged, width, t
                );
            forward.run(first);
        }
    });
}

// The gradient of the merged streams stays in the cache, a group of tokens at a time.
template <typename A>
void merge_read_backward(
    const View* streams, const View* output, const void* residual, const void* post,
    const Reading* reading, const void* pre, const void* raw, const void* inverse_rms,
    const View* merged_grad, const View* read_grad, const void* pre_grad, const void* next_post_grad,
    const void* next_residual_grad, const View* streams_grad, const View* output_grad,
    void* residual_grad, void* post_grad, void* phi_grad, void* alpha_grad, void* bias_grad,
    void* carry_grad, int64_t threads
) {
    const ReadOperands<A> given = reading->operands<A>();
    const int64_t n = reading->n, width = reading->width, wide = padded<A>(width);
    const ReadBackwardOperands<A> more{
        (const A*)pre,      (const A*)raw,      (const A*)inverse_rms,
        merged_grad,        read_grad,          (const A*)pre_grad,
        (const A*)next_post_grad, (const A*)next_residual_grad, (A*)carry_grad,
        true,
    };
    const MergeGrads<A> grads{streams_grad, output_grad, (A*)residual_grad, (A*)post_grad};
    std::vector<A> phi(given.packing().rows() * given.rule.coefficients);
    given.packing().by_tiles((const A*)reading->phi, phi.data());
    const int64_t share = block_tokens(given.tokens);
    ReadBlocks<A> blocks((given.tokens + share - 1) / share);
    each_block(blocks.size(), threads, [&](int64_t block) {
        blocks[block] = std::make_unique<ReadBackward<A>>(given, phi.data(), more);
        std::vector<A> room(group * n * wide);
        const View total{(char*)room.data(), type_of<A>, n * wide, wide, 1};
        const int64_t last = std::min(given.tokens, (block + 1) * share);
        for (int64_t first = block * share; first < last; first += group) {
            blocks[block]->run(first, &total, first);
            for (int64_t t = first; t < std::min(last, first + group); ++t)
                merge_token_backward<A>(
                    n, total, t - first, *streams, *output, (const A*)residual + t * n * n,
                    (const A*)post + t * n, grads, width, t
                );
        }
    });
    add_up<A>(given, blocks, (A*)phi_grad, (A*)alpha_grad, (A*)bias_grad, threads);
}

}  // namespace mhc

MHC_EXPORT(
    merge_read_forward,
    (const mhc::View* streams, const mhc::View* output, const void* residual, const void* post,
     const mhc::View* merged, const mhc::Reading* reading, const mhc::View* read, void* pre,
     void* next_post, void* next_residual, void* raw, void* inverse_rms, int64_t threads),
    (streams, output, residual, post, merged, reading, read, pre, next_post, next_residual, raw,
     inverse_rms, threads)
)
MHC_EXPORT(
    merge_read_backward,
    (const mhc::View* streams, const mhc::View* output, const void* residual, const void* post,
     const mhc::Reading* reading, const void* pre, const void* raw, const void* inverse_rms,
     const mhc::View* merged_grad, const mhc::View* read_grad, const void* pre_grad,
     const void* next_post_grad, const void* next_residual_grad, const mhc::View* streams_grad,
     const mhc::View* output_grad, void* residual_grad, void* post_grad, void* phi_grad,
     void* alpha_grad, void* bias_grad, void* carry_grad, int64_t threads),
    (streams, output, residual, post, reading, pre, raw, inverse_rms, merged_grad, read_grad,
     pre_grad, next_post_grad, next_residual_grad, streams_grad, output_grad, residual_grad,
     post_grad, phi_grad, alpha_grad, bias_grad, carry_grad, threads)
)
