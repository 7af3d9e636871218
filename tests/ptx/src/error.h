// What the emulator reports: a kind (for tests), a sentence, and the place.
#pragma once
#include <exception>
#include <string>
#include <utility>

namespace ptx {

struct Error : std::exception {
  std::string kind, message;
  int line = 0;        // of the PTX text
  std::string source;  // "file.cu:12", where the PTX was compiled with -lineinfo
  std::string tensor;

  Error(std::string kind, std::string message, int line = 0)
      : kind(std::move(kind)), message(std::move(message)), line(line) {}
  const char* what() const noexcept override { return message.c_str(); }
};

}  // namespace ptx
