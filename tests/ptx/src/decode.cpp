#include "decode.h"

#include <set>

namespace ptx {

Type parse_type(const std::string& name) {
  if (name == "pred") return {'p', 1};
  if (name == "f16" || name == "f16x2") return {'h', 16, name.size() > 3};
  if (name == "bf16" || name == "bf16x2") return {'n', 16, name.size() > 4};
  if (name.size() < 2 || !std::strchr("usbf", name[0]) || name.find_first_not_of("0123456789", 1) != std::string::npos)
    return {};
  const int bits = std::atoi(name.c_str() + 1);
  const bool exists = bits == 32 || bits == 64 || (name[0] != 'f' && (bits == 8 || bits == 16));
  return exists ? Type{name[0], bits} : Type{};
}

Decoder::Decoder(const Module& module, const Entry& entry, Program& program, std::map<std::string, uint64_t> globals)
    : module_(module), entry_(entry), program_(program), symbols_(std::move(globals)) {
  program_.entry = &entry;
  program_.registers = int(entry.registers.size());
  sink_ = program_.registers++;
  for (size_t i = 0; i < entry.registers.size(); ++i)
    if (is_special_register(entry.registers[i].name)) program_.specials.push_back({int(i), entry.registers[i].name});
}

void Decoder::run() {
  place_variables();
  program_.code.resize(entry_.code.size());
  for (size_t i = 0; i < entry_.code.size(); ++i) {
    try {
      decode(entry_.code[i], program_.code[i]);
    } catch (Error& error) {
      if (!error.line) error.line = entry_.code[i].line;
      throw;
    }
  }
}

// Static shared variables first, in the order of their use, then dynamic shared memory: as ptxas does.
void Decoder::place_variables() {
  std::set<std::string> used;
  for (const Statement& s : entry_.code)
    for (const Operand& operand : s.operands)
      if (!operand.name.empty()) used.insert(operand.name);
  std::map<std::string, const Variable*> variables;
  for (const auto& [name, variable] : module_.variables) variables[name] = &variable;
  for (const auto& [name, variable] : entry_.variables) variables[name] = &variable;

  int64_t shared = kSharedBase, local = 0, dynamic_align = 16;
  const auto align = [](int64_t offset, int64_t to) { return (offset + to - 1) / to * to; };
  for (const auto& [name, variable] : variables) {
    if (!used.count(name)) continue;
    if (variable->space == "shared" && variable->unsized) dynamic_align = std::max(dynamic_align, variable->align);
    if (variable->space == "shared" && !variable->unsized) {
      shared = align(shared, variable->align);
      symbols_[name] = uint64_t(shared);
      program_.shared_names.push_back({name, shared});
      shared += variable->size;
    }
    if (variable->space == "local") {
      local = align(local, variable->align);
      symbols_[name] = uint64_t(local);
      local += variable->size;
    }
  }
  program_.shared_bytes = shared - kSharedBase;
  program_.dynamic_base = align(shared, dynamic_align);
  program_.local_bytes = local;
  for (const auto& [name, variable] : variables)
    if (variable->space == "shared" && variable->unsized) symbols_[name] = uint64_t(program_.dynamic_base);
  for (const Variable& parameter : entry_.parameters) symbols_[parameter.name] = uint64_t(parameter.offset);
}

uint64_t Decoder::symbol(const std::string& name, int line) const {
  const auto found = symbols_.find(name);
  if (found == symbols_.end()) throw Error("unsupported", "variable '" + name + "' has no address", line);
  return found->second;
}

int Decoder::constant(uint64_t value) {
  const auto [found, added] = constants_.emplace(value, program_.registers);
  if (added) program_.constants.push_back({program_.registers++, value});
  return found->second;
}

int Decoder::carry() {
  if (program_.carry < 0) program_.carry = program_.registers++;
  return program_.carry;
}

int Decoder::slot(const Operand& operand, Type type) {
  switch (operand.kind) {
    case Operand::Register:
      return operand.index;
    case Operand::Integer:
      return constant(operand.bits + uint64_t(operand.offset));
    case Operand::Float32:
      return constant(operand.bits);
    case Operand::Float64: {
      if (type.kind != 'f' || type.bits == 64) return constant(operand.bits);
      return constant(ptx::slot(float(ptx::value<double>(operand.bits))));
    }
    case Operand::Symbol:
      return constant(symbol(operand.name, 0) + uint64_t(operand.offset));
    default:
      return sink_;
  }
}

int Decoder::register_bits(const Operand& operand) const {
  return operand.kind == Operand::Register ? entry_.registers[size_t(operand.index)].bits : 0;
}

void Decoder::bind(const Statement& s, Instruction& i, size_t count, Type type) {
  for (size_t k = 0; k < s.operands.size(); ++k) {
    std::vector<int>& slots = k < count ? i.destination : i.source;
    const Operand& operand = s.operands[k];
    if (operand.kind == Operand::Address) {
      bind_address(operand, i);
    } else if (operand.kind == Operand::Vector) {
      for (const Operand& element : operand.list) slots.push_back(slot(element, type));
    } else {
      slots.push_back(slot(operand, type));
      if (operand.negated) i.negated = true;
    }
  }
}

void Decoder::bind_address(const Operand& operand, Instruction& i, bool second) {
  if (operand.index >= 0) {
    i.source.push_back(operand.index);
    (second ? i.second_offset : i.offset) = operand.offset;
  } else {
    const uint64_t base = operand.name.empty() ? 0 : symbol(operand.name, 0);
    i.source.push_back(constant(base + uint64_t(operand.offset)));
  }
}

void Decoder::rounding_and_flags(const Statement& s, Instruction& i) const {
  for (const std::string& m : s.modifiers) {
    if (m == "rz" || m == "rzi") i.rounding = Rounding::Zero;
    if (m == "rm" || m == "rmi") i.rounding = Rounding::Down;
    if (m == "rp" || m == "rpi") i.rounding = Rounding::Up;
    if (m == "rna") i.rounding = Rounding::Away;
    if (m == "ftz") i.flush_subnormals = true;
    if (m == "sat" || m == "satfinite") i.saturate = true;
  }
}

Type Decoder::type(const Statement& s, int n) const {
  for (const std::string& m : s.modifiers) {
    const Type type = parse_type(m);
    if (type.kind && n-- == 0) return type;
  }
  return {};
}

void Decoder::unsupported(const Statement& s, const std::string& why) const {
  Error error("unsupported", "unknown instruction '" + s.full_name + "'" + (why.empty() ? "" : ": " + why), s.line);
  const auto file = module_.files.find(s.file);
  if (file != module_.files.end()) error.source = file->second + ":" + std::to_string(s.source_line);
  throw error;
}

void Decoder::decode(const Statement& s, Instruction& i) {
  i.statement = &s;
  i.guard = s.guard;
  i.guard_negated = s.guard_negated;
  rounding_and_flags(s, i);
  // Tried in turn: integer and float share opcodes, told apart by their type.
  const bool known = decode_float(*this, s, i) || decode_half(*this, s, i) || decode_integer(*this, s, i) ||
                     decode_compare(*this, s, i) || decode_convert(*this, s, i) || decode_memory(*this, s, i) ||
                     decode_control(*this, s, i) || decode_warp(*this, s, i) || decode_tensor(*this, s, i) ||
                     decode_wgmma(*this, s, i) || decode_async(*this, s, i);
  if (!known || !i.run) unsupported(s);
}

}  // namespace ptx
