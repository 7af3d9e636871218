// What csrc/host/cuda/runtime.cpp takes from torch's stable headers, writing down what is done with it.
#pragma once
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace fake {
inline std::string log;

template <class... Parts>
void note(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  log += text.str() + "\n";
}
}  // namespace fake

#define STD_TORCH_CHECK(condition, ...)    \
  do {                                     \
    if (!(condition)) {                    \
      fake::log.clear();                   \
      fake::note(__VA_ARGS__);             \
      throw std::runtime_error(fake::log); \
    }                                      \
  } while (0)

namespace torch::stable {

struct Tensor {
  int32_t device;
  int32_t get_device_index() const { return device; }
  bool is_cuda() const { return true; }
};

namespace accelerator {

struct DeviceGuard {
  explicit DeviceGuard(int32_t device) { fake::note("guard ", device); }
  ~DeviceGuard() { fake::note("guard ends"); }
};

}  // namespace accelerator
}  // namespace torch::stable
