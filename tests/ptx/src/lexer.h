// PTX text into tokens. Dotted names (add.s32, %tid.x, .shared::cta) are one token.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace ptx {

struct Token {
  enum Kind { Name, Integer, Float32, Float64, String, Punctuation, End } kind = End;
  std::string text;
  uint64_t bits = 0;  // the value of a number: an integer, or the bits of a float
  int line = 0;

  bool is(const char* punctuation) const { return kind == Punctuation && text == punctuation; }
};

std::vector<Token> tokenize(const std::string& text);
std::vector<std::string> split(const std::string& text, char separator);

}  // namespace ptx
