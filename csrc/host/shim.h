// Calls of torch's C shim, for which its stable headers have nothing that every version from 2.10 on knows.
#pragma once
#include <torch/csrc/stable/library.h>

#include <array>
#ifndef _WIN32
#include <dlfcn.h>
#endif

namespace rfkernels {

// Throws, with torch's own text where the torch that runs keeps it (from 2.13 on; older ones print it).
inline void check_shim(AOTITorchError code, const char* call) {
  if (code == TORCH_SUCCESS) return;
  const char* text = nullptr;
#ifndef _WIN32
  using Text = const char* (*)();
  if (const auto said = reinterpret_cast<Text>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace")))
    text = said();
#endif
  STD_TORCH_CHECK(false, text == nullptr ? "failed" : text, " (in ", call, ")");
}

// Calls one of torch's operators: before, the stack holds its arguments, afterwards its results.
template <size_t kSize>
void call_operator(const char* name, std::array<StableIValue, kSize>& stack) {
  check_shim(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION), name);
}

}  // namespace rfkernels
