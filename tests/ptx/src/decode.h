// From parsed statements to executable instructions. Each decode_* function knows the opcodes of one subject and
// returns false for others; what none of them knows is an error.
#pragma once
#include <map>

#include "machine.h"

namespace ptx {

struct Type {
  char kind = 0;  // 'u', 's', 'b', 'f', 'h' (half), 'n' (bfloat16), 'p' (predicate)
  int bits = 0;
  bool packed = false;  // f16x2, bf16x2
  bool is_float() const { return kind == 'f' || kind == 'h' || kind == 'n'; }
};

Type parse_type(const std::string& name);  // kind 0: not a type

class Decoder {
 public:
  Decoder(const Module& module, const Entry& entry, Program& program, std::map<std::string, uint64_t> globals);
  void run();

  // The register slot that holds an operand. Floating-point literals take the type of the instruction.
  int slot(const Operand& operand, Type type = {});
  int constant(uint64_t value);
  int register_bits(const Operand& operand) const;
  // The first count operands become destinations, the others sources; vectors are spread.
  void bind(const Statement& s, Instruction& i, size_t count, Type type = {});
  void bind_address(const Operand& operand, Instruction& i, bool second = false);
  void rounding_and_flags(const Statement& s, Instruction& i) const;
  // The nth modifier that is a type.
  Type type(const Statement& s, int n = 0) const;
  int carry();
  [[noreturn]] void unsupported(const Statement& s, const std::string& why = "") const;

 private:
  void place_variables();
  void decode(const Statement& s, Instruction& i);
  uint64_t symbol(const std::string& name, int line) const;

  const Module& module_;
  const Entry& entry_;
  Program& program_;
  std::map<std::string, uint64_t> symbols_;
  std::map<uint64_t, int> constants_;
  int sink_;
};

bool decode_integer(Decoder& d, const Statement& s, Instruction& i);
bool decode_float(Decoder& d, const Statement& s, Instruction& i);
bool decode_half(Decoder& d, const Statement& s, Instruction& i);
bool decode_compare(Decoder& d, const Statement& s, Instruction& i);
bool decode_convert(Decoder& d, const Statement& s, Instruction& i);
bool decode_memory(Decoder& d, const Statement& s, Instruction& i);
bool decode_control(Decoder& d, const Statement& s, Instruction& i);
bool decode_warp(Decoder& d, const Statement& s, Instruction& i);
bool decode_tensor(Decoder& d, const Statement& s, Instruction& i);
bool decode_wgmma(Decoder& d, const Statement& s, Instruction& i);
bool decode_async(Decoder& d, const Statement& s, Instruction& i);

}  // namespace ptx
