#include <cstring>

#include "error.h"
#include "lexer.h"
#include "syntax.h"

namespace ptx {
namespace {

int type_bits(const std::string& type) {
  if (type == "pred") return 1;
  if (type == "f16x2" || type == "bf16x2") return 32;
  const size_t digits = type.find_first_of("0123456789");
  return digits == std::string::npos ? 0 : std::atoi(type.c_str() + digits);
}

}  // namespace

bool is_special_register(const std::string& name) {
  static const char* const kNames[] = {"%tid.x",           "%tid.y",           "%tid.z",
                                       "%ntid.x",          "%ntid.y",          "%ntid.z",
                                       "%ctaid.x",         "%ctaid.y",         "%ctaid.z",
                                       "%nctaid.x",        "%nctaid.y",        "%nctaid.z",
                                       "%laneid",          "%warpid",          "%lanemask_eq",
                                       "%lanemask_lt",     "%lanemask_le",     "%lanemask_gt",
                                       "%lanemask_ge",     "%nwarpid",         "%dynamic_smem_size",
                                       "%total_smem_size", "%cluster_ctaid.x", "%cluster_ctarank",
                                       "%cluster_nctarank"};
  for (const char* known : kNames)
    if (name == known) return true;
  return false;
}

namespace {

class Parser {
 public:
  explicit Parser(const std::string& text) : tokens_(tokenize(text)) {}

  Module module() {
    while (peek().kind != Token::End) top_level();
    return std::move(module_);
  }

 private:
  // A `{ }` block: its names hide outer ones, and its labels are unknown outside.
  struct Scope {
    std::unordered_map<std::string, int> registers, labels;
    std::vector<std::pair<size_t, size_t>> branches;  // (statement, operand) that name a label not yet resolved
  };

  const Token& peek(int ahead = 0) const { return tokens_[std::min(at_ + ahead, tokens_.size() - 1)]; }
  const Token& next() { return tokens_[std::min(at_++, tokens_.size() - 1)]; }
  bool accept(const char* punctuation) {
    if (!peek().is(punctuation)) return false;
    ++at_;
    return true;
  }
  [[noreturn]] void fail(const std::string& message) const { throw Error("syntax", message, peek().line); }
  void expect(const char* punctuation) {
    if (!accept(punctuation)) fail("expected '" + std::string(punctuation) + "' before '" + peek().text + "'");
  }
  std::string name() {
    if (peek().kind != Token::Name) fail("expected a name before '" + peek().text + "'");
    return next().text;
  }
  int64_t integer() {
    const bool negative = accept("-");
    if (peek().kind != Token::Integer) fail("expected an integer before '" + peek().text + "'");
    const int64_t value = int64_t(next().bits);
    return negative ? -value : value;
  }
  void skip_to_semicolon() {
    while (peek().kind != Token::End && !peek().is(";")) ++at_;
    expect(";");
  }
  void skip_block() {
    expect("{");
    for (int depth = 1; depth > 0;) {
      if (peek().kind == Token::End) fail("unbalanced '{'");
      if (peek().is("{")) ++depth;
      if (peek().is("}")) --depth;
      ++at_;
    }
  }

  void top_level() {
    const Token token = peek();
    if (token.text == ".version" || token.text == ".address_size") {
      at_ += 2;
      if (peek().kind == Token::Integer) ++at_;
    } else if (token.text == ".target") {
      ++at_;
      module_.target = name();
      while (accept(",")) name();
    } else if (token.text == ".file") {
      file();
    } else if (token.text == ".section") {
      ++at_;
      name();
      skip_block();
    } else if (token.text == ".pragma") {
      skip_to_semicolon();
    } else if (token.text == ".visible" || token.text == ".extern" || token.text == ".weak" ||
               token.text == ".common") {
      ++at_;
    } else if (token.text == ".entry") {
      ++at_;
      entry();
    } else if (token.text == ".func") {
      skip_function();
    } else if (token.kind == Token::Name && token.text[0] == '.') {
      Variable variable = declaration();
      module_.variables[variable.name] = variable;
      expect(";");
    } else {
      fail("unexpected '" + token.text + "'");
    }
  }

  // Device functions are known by name only: a call to one is reported as an unknown instruction.
  void skip_function() {
    while (peek().kind != Token::End && !peek().is("{") && !peek().is(";")) ++at_;
    if (peek().is("{"))
      skip_block();
    else
      expect(";");
  }

  void file() {
    ++at_;
    const int index = int(integer());
    const std::string path = next().text;
    module_.files[index] = path.substr(path.find_last_of('/') + 1);
    while (accept(",")) integer();
  }

  // .space .align 4 .b8 name[24] = {1, 2, ...}, without the semicolon
  Variable declaration() {
    Variable variable;
    int element = 0;
    variable.space = name().substr(1);
    while (peek().kind == Token::Name && peek().text[0] == '.') {
      const std::string word = name();
      if (word == ".align")
        variable.align = integer();
      else if (word == ".v2" || word == ".v4")
        fail("vector variables are not supported");
      else if (word != ".ptr" && type_bits(word.substr(1)))
        element = type_bits(word.substr(1)) / 8;
      else if (word == ".ptr") {  // what follows describes the pointee: .ptr .global .align 16
        if (peek().text == ".global" || peek().text == ".shared" || peek().text == ".const" || peek().text == ".local")
          ++at_;
        if (peek().text == ".align") at_ += 2;
      }
    }
    if (!element) fail("a variable without a type");
    variable.name = name();
    variable.size = element;
    variable.align = std::max<int64_t>(variable.align, element);
    while (accept("[")) {
      if (accept("]")) {
        variable.unsized = true;
        variable.size = 0;
      } else {
        variable.size *= integer();
        expect("]");
      }
    }
    if (accept("=")) initialiser(variable, element);
    return variable;
  }

  void initialiser(Variable& variable, int element) {
    variable.initial.assign(size_t(variable.size), 0);
    const bool list = accept("{");
    size_t offset = 0;
    do {
      uint64_t bits;
      if (peek().kind == Token::Float32 || peek().kind == Token::Float64)
        bits = next().bits;
      else
        bits = uint64_t(integer());
      if (offset + element > variable.initial.size()) fail("too many initial values");
      std::memcpy(variable.initial.data() + offset, &bits, size_t(element));
      offset += element;
    } while (list && accept(","));
    if (list) expect("}");
  }

  void entry() {
    entry_ = Entry();
    entry_.name = name();
    if (accept("(")) {
      while (!accept(")")) {
        Variable parameter = declaration();
        parameter.offset = (entry_.parameter_bytes + parameter.align - 1) / parameter.align * parameter.align;
        entry_.parameter_bytes = parameter.offset + parameter.size;
        entry_.parameters.push_back(parameter);
        accept(",");
      }
    }
    while (!peek().is("{")) {
      const std::string directive = name();
      int* counts = directive == ".reqntid" ? entry_.required_threads : entry_.max_threads;
      if (directive == ".reqntid" || directive == ".maxntid") {
        for (int i = 0; i < 3; ++i) counts[i] = 1;
        int i = 0;
        do {
          counts[i++] = int(integer());
        } while (i < 3 && accept(","));
      } else if (peek().kind == Token::Integer) {
        const int count = int(integer());
        if (directive == ".minnctapersm") entry_.min_ctas = count;
        if (directive == ".maxnreg") entry_.max_registers = count;
        while (accept(",")) integer();
      }
    }
    file_ = source_line_ = 0;
    block();
    module_.entries[entry_.name] = std::move(entry_);
  }

  void block() {
    expect("{");
    scopes_.emplace_back();
    while (!accept("}")) statement();
    Scope closed = std::move(scopes_.back());
    scopes_.pop_back();
    for (const auto& [statement, operand] : closed.branches) {
      Operand& target = entry_.code[statement].operands[operand];
      const auto found = closed.labels.find(target.name);
      if (found != closed.labels.end()) {
        target.index = found->second;
        entry_.labels.emplace(found->second, target.name);
      } else if (!scopes_.empty()) {
        scopes_.back().branches.push_back({statement, operand});
      } else if (entry_.code[statement].opcode == "bra") {
        throw Error("syntax", "unknown label '" + target.name + "'", entry_.code[statement].line);
      }
    }
  }

  void statement() {
    const Token token = peek();
    if (token.is("{")) {
      block();
    } else if (token.is(";")) {
      ++at_;
    } else if (token.text == ".reg") {
      registers();
    } else if (token.text == ".loc") {
      location();
    } else if (token.text == ".file") {
      file();
    } else if (token.text == ".pragma" || token.text == ".branchtargets") {
      skip_to_semicolon();
    } else if (token.kind == Token::Name && token.text[0] == '.') {
      Variable variable = declaration();
      expect(";");
      entry_.variables[variable.name] = variable;
    } else if (token.kind == Token::Name && peek(1).is(":")) {
      scopes_.back().labels[token.text] = int(entry_.code.size());
      at_ += 2;
    } else {
      instruction();
    }
  }

  void registers() {
    ++at_;
    const std::string type = name().substr(1);
    const int bits = type_bits(type);
    if (!bits || bits > 64) fail("registers of type ." + type + " are not supported");
    do {
      const std::string base = name();
      if (accept("<")) {
        const int64_t count = integer();
        expect(">");
        for (int64_t i = 0; i < count; ++i) declare_register(base + std::to_string(i), bits);
      } else {
        declare_register(base, bits);
      }
    } while (accept(","));
    expect(";");
  }

  int declare_register(const std::string& name, int bits) {
    const int index = int(entry_.registers.size());
    scopes_.back().registers[name] = index;
    entry_.registers.push_back({name, bits});
    return index;
  }

  // .loc file line column [, function_name label, inlined_at file line column]
  void location() {
    ++at_;
    file_ = int(integer());
    source_line_ = int(integer());
    integer();
    while (accept(",")) {
      const std::string what = name();
      if (what == "function_name") {
        name();
        if (accept("+")) integer();
      } else
        for (int i = 0; i < 3; ++i) integer();
    }
  }

  int find_register(const std::string& name) {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->registers.find(name);
      if (found != scope->registers.end()) return found->second;
    }
    if (!is_special_register(name)) return -1;
    const int index = int(entry_.registers.size());
    scopes_.front().registers[name] = index;
    entry_.registers.push_back({name, 32});
    return index;
  }

  void instruction() {
    Statement statement;
    statement.line = peek().line;
    statement.file = file_;
    statement.source_line = source_line_;
    if (accept("@")) {
      statement.guard_negated = accept("!");
      statement.guard = find_register(name());
      if (statement.guard < 0) fail("unknown guard predicate");
    }
    statement.full_name = name();
    statement.modifiers = split(statement.full_name, '.');
    statement.opcode = statement.modifiers.front();
    statement.modifiers.erase(statement.modifiers.begin());
    while (!accept(";")) {
      statement.operands.push_back(operand());
      if (!accept(",") && !accept("|") && !peek().is(";")) fail("unexpected '" + peek().text + "' after an operand");
    }
    for (size_t i = 0; i < statement.operands.size(); ++i)
      if (statement.operands[i].kind == Operand::Label) scopes_.back().branches.push_back({entry_.code.size(), i});
    entry_.code.push_back(std::move(statement));
  }

  Operand operand() {
    Operand result;
    if (accept("!")) {
      result = operand();
      result.negated = true;
    } else if (accept("{")) {
      result.kind = Operand::Vector;
      while (!accept("}")) {
        result.list.push_back(operand());
        accept(",");
      }
    } else if (accept("(")) {  // of a call, which the decoder refuses by name
      result.kind = Operand::Vector;
      while (!accept(")")) {
        result.list.push_back(operand());
        accept(",");
      }
    } else if (accept("[")) {
      result = base_and_offset();
      result.kind = Operand::Address;
      expect("]");
    } else if (peek().kind == Token::Float32 || peek().kind == Token::Float64) {
      result.kind = peek().kind == Token::Float32 ? Operand::Float32 : Operand::Float64;
      result.bits = next().bits;
    } else if (peek().is("-") && peek(1).kind == Token::Float64) {
      ++at_;
      result.kind = Operand::Float64;
      result.bits = next().bits ^ (uint64_t(1) << 63);
    } else if (peek().is("-") || peek().kind == Token::Integer) {
      result.kind = Operand::Integer;
      result.bits = uint64_t(integer());
    } else {
      result = base_and_offset();
    }
    return result;
  }

  // %rd1, %rd1+16, name, name+-8, 1024
  Operand base_and_offset() {
    Operand result;
    if (peek().kind == Token::Integer) {
      result.kind = Operand::Integer;
      result.offset = integer();
    } else {
      const std::string word = name();
      if (word == "_") return result;
      result.index = find_register(word);
      result.kind = result.index >= 0 ? Operand::Register : is_variable(word) ? Operand::Symbol : Operand::Label;
      if (result.index < 0) result.name = word;
      if (result.kind == Operand::Label && word[0] == '%') fail("unknown register '" + word + "'");
    }
    if (accept("+"))
      result.offset += integer();
    else if (peek().is("-"))
      result.offset += integer();
    return result;
  }

  bool is_variable(const std::string& name) const {
    for (const Variable& parameter : entry_.parameters)
      if (parameter.name == name) return true;
    return entry_.variables.count(name) || module_.variables.count(name);
  }

  std::vector<Token> tokens_;
  size_t at_ = 0;
  Module module_;
  Entry entry_;
  std::vector<Scope> scopes_;
  int file_ = 0, source_line_ = 0;
};

}  // namespace

Module parse(const std::string& text) { return Parser(text).module(); }

}  // namespace ptx
