// A parsed module: variables, entries and their instructions, names of registers and labels resolved, nothing decoded.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

struct Operand {
  enum Kind { Register, Integer, Float32, Float64, Vector, Address, Symbol, Label, Sink } kind = Sink;
  int index = -1;      // of a register, of the base register of an address, or of the target of a label
  uint64_t bits = 0;   // of an immediate
  int64_t offset = 0;  // of an address or a symbol
  bool negated = false;
  std::string name;           // of a symbol or label; the base symbol of an address
  std::vector<Operand> list;  // of a vector
};

struct Statement {
  std::string opcode;                  // "ld"
  std::vector<std::string> modifiers;  // "global", "v4", "b32"
  std::string full_name;               // "ld.global.v4.b32"
  std::vector<Operand> operands;
  int guard = -1;
  bool guard_negated = false;
  int line = 0;
  int file = 0, source_line = 0;

  bool has(const char* modifier) const {
    for (const std::string& m : modifiers)
      if (m == modifier) return true;
    return false;
  }
};

struct Variable {
  std::string name, space;  // "global", "const", "shared", "local", "param"
  int64_t align = 1, size = 0;
  bool unsized = false;  // the dynamic shared memory
  std::vector<uint8_t> initial;
  int64_t offset = 0;  // of a parameter
};

struct RegisterInfo {
  std::string name;
  int bits = 0;  // 1 for a predicate
};

struct Entry {
  std::string name;
  std::vector<Variable> parameters;
  std::map<std::string, Variable> variables;  // declared in the body
  std::vector<RegisterInfo> registers;        // special registers (%tid.x) included
  std::vector<Statement> code;
  std::map<int, std::string> labels;  // statement index to name: where basic blocks begin
  int required_threads[3] = {0, 0, 0}, max_threads[3] = {0, 0, 0};
  int min_ctas = 1, max_registers = 0;  // 0: not given
  int64_t parameter_bytes = 0;
};

struct Module {
  std::string target;
  std::map<int, std::string> files;
  std::map<std::string, Variable> variables;
  std::map<std::string, Entry> entries;
};

Module parse(const std::string& text);

bool is_special_register(const std::string& name);  // %tid.x and the like

}  // namespace ptx
