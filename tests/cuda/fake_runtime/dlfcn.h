// As much of dlfcn.h as csrc/host/cuda/runtime.cpp uses to find torch's current stream.
#pragma once
#include <cstdint>
#include <string>

constexpr int RTLD_LAZY = 1, RTLD_NOLOAD = 4;

namespace fake {
inline bool no_cuda = false;  // as beside a torch without CUDA

inline int32_t current_stream(int32_t device, void** stream) {
  *stream = reinterpret_cast<void*>(intptr_t(1000 + device));
  return device < 0;
}
}  // namespace fake

inline void* dlopen(const char* name, int flags) {
  const bool known = std::string(name) == "libtorch_cuda.so" && (flags & RTLD_NOLOAD) != 0;
  return known && !fake::no_cuda ? &fake::no_cuda : nullptr;
}

inline void* dlsym(void* library, const char* name) {
  const bool known = library == &fake::no_cuda && std::string(name) == "aoti_torch_get_current_cuda_stream";
  return known ? reinterpret_cast<void*>(&fake::current_stream) : nullptr;
}
