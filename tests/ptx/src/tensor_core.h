// Element types of the tensor-core instructions.
#pragma once
#include <cstdint>
#include <string>

namespace ptx {

enum class Element : uint8_t { F16, BF16, TF32, E4M3, E5M2, S8, U8 };

int element_bits(Element type);
bool parse_element(const std::string& name, Element& type);
float element_value(uint32_t bits, Element type);

}  // namespace ptx
