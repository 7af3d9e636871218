// runtime.h for ctypes. A call returns what it did, line by line, or "error: " and the text that was thrown.
#include "cuda_runtime_api.h"
#include "dlfcn.h"
#include "host/cuda/runtime.h"

using namespace rfkernels::cuda;

template <class Function>
static const char* record(const char* failing, Function&& function) {
  static std::string said;
  fake::failing = failing;
  fake::log.clear();
  try {
    function();
    said = fake::log;
  } catch (const std::exception& error) {
    said = "error: " + std::string(error.what());
  }
  return said.c_str();
}

extern "C" {

const char* launch_it(int device, int64_t x, int64_t y, int shared_bytes, int parameter, const char* failing) {
  return record(failing, [&] {
    const Kernel kernel{"rf_kernel", reinterpret_cast<const void*>(intptr_t(77))};
    launch(kernel, {x, y}, 128, shared_bytes, parameter, {torch::stable::Tensor{device}});
  });
}

void without_cuda(bool yes) { fake::no_cuda = yes; }

const char* ask(int device, const char* failing) {
  return record(failing, [&] {
    const torch::stable::Tensor x{device};
    const int shared = shared_memory(x), count = processors(x);
    fake::note(count, " processors, ", shared, " bytes, compute capability ", capability(x));
  });
}
}
