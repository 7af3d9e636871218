// mbarrier: a barrier in shared memory whose phase ends when as many arrivals were seen as it was made for. Threads
// that produce arrive, threads that consume wait; neither holds up its own kind.
#pragma once
#include <cstdint>

namespace rfkernels::cuda {

__device__ __forceinline__ void init_mbarrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives when every cp.async of this thread so far has landed; the thread goes on at once.
__device__ __forceinline__ void arrive_when_copied(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Waits for the end of the phase of this parity; the one before the first counts as ended, with parity 1.
__device__ __forceinline__ void wait_mbarrier(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

}  // namespace rfkernels::cuda
