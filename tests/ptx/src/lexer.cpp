#include "lexer.h"

#include <cctype>
#include <cstdlib>
#include <cstring>

#include "error.h"

namespace ptx {
namespace {

bool starts_name(char c) { return std::isalpha(uint8_t(c)) || c == '_' || c == '$' || c == '%' || c == '.'; }
bool continues_name(char c) { return starts_name(c) || std::isdigit(uint8_t(c)); }

Token number(const char*& p, int line) {
  Token token;
  token.line = line;
  const char* begin = p;
  const char second = *p == '0' ? char(std::tolower(p[1])) : ' ';
  if (second == 'f' || second == 'd') {  // 0f3F800000, 0d3FF0000000000000: the bits of the float
    token.kind = second == 'f' ? Token::Float32 : Token::Float64;
    const std::string digits(p + 2, second == 'f' ? 8 : 16);
    token.bits = std::strtoull(digits.c_str(), nullptr, 16);
    p += 2 + digits.size();
  } else {
    char* end;
    token.kind = Token::Integer;
    token.bits = second == 'b' ? std::strtoull(p + 2, &end, 2) : std::strtoull(p, &end, 0);
    if (*end == '.' || ((*end == 'e' || *end == 'E') && second != 'x')) {
      const double value = std::strtod(p, &end);
      token.kind = Token::Float64;
      std::memcpy(&token.bits, &value, 8);
    } else if (*end == 'U') {
      ++end;
    }
    p = end;
  }
  token.text.assign(begin, p);
  return token;
}

}  // namespace

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == separator)
      parts.emplace_back();
    else
      parts.back() += c;
  }
  return parts;
}

std::vector<Token> tokenize(const std::string& text) {
  std::vector<Token> tokens;
  tokens.reserve(text.size() / 4);
  int line = 1;
  const char* p = text.c_str();
  while (*p) {
    if (*p == '\n') ++line;
    if (std::isspace(uint8_t(*p))) {
      ++p;
    } else if (p[0] == '/' && p[1] == '/') {
      while (*p && *p != '\n') ++p;
    } else if (p[0] == '/' && p[1] == '*') {
      for (p += 2; *p && !(p[0] == '*' && p[1] == '/'); ++p) line += *p == '\n';
      if (*p) p += 2;
    } else if (std::isdigit(uint8_t(*p))) {
      tokens.push_back(number(p, line));
    } else {
      Token token;
      token.line = line;
      const char* begin = p;
      if (starts_name(*p)) {
        token.kind = Token::Name;
        const bool directive = *p++ == '.';  // ".reg.b32" is two, "add.s32" is one
        while ((continues_name(*p) && !(directive && *p == '.')) || (p[0] == ':' && (p[1] == ':' || p[-1] == ':'))) ++p;
        token.text.assign(begin, p);
      } else if (*p == '"') {
        token.kind = Token::String;
        const char* end = std::strchr(p + 1, '"');
        if (!end) throw Error("syntax", "unterminated string", line);
        token.text.assign(p + 1, end);
        p = end + 1;
      } else {
        token.kind = Token::Punctuation;
        token.text.assign(1, *p++);
      }
      tokens.push_back(std::move(token));
    }
  }
  Token end;
  end.line = line;
  tokens.push_back(end);
  return tokens;
}

}  // namespace ptx
