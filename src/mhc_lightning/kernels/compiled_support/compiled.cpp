// Memory of results.
#include <sys/mman.h>

#include <cstdint>

// Asks the operating system for large pages. Fresh memory in pages of 4 KiB takes several times as
// long to come as the kernels take to fill it. A system that has no large pages does without.
extern "C" void ask_for_large_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = uintptr_t(1) << 21;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}
