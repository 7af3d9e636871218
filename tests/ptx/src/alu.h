// Lane loops shared by the arithmetic files.
#pragma once
#include "decode.h"

namespace ptx {

template <class Op, class T>
void unary(Warp& w, const Instruction& i, Mask mask) {
  const uint64_t* a = w.lanes(i.source[0]);
  uint64_t* d = w.lanes(i.destination[0]);
  for_lanes(mask, [&](int l) { d[l] = slot(Op::apply(value<T>(a[l]), i)); });
}

template <class Op, class T>
void binary(Warp& w, const Instruction& i, Mask mask) {
  const uint64_t *a = w.lanes(i.source[0]), *b = w.lanes(i.source[1]);
  uint64_t* d = w.lanes(i.destination[0]);
  for_lanes(mask, [&](int l) { d[l] = slot(Op::apply(value<T>(a[l]), value<T>(b[l]), i)); });
}

template <class Op, class T>
void ternary(Warp& w, const Instruction& i, Mask mask) {
  const uint64_t *a = w.lanes(i.source[0]), *b = w.lanes(i.source[1]), *c = w.lanes(i.source[2]);
  uint64_t* d = w.lanes(i.destination[0]);
  for_lanes(mask, [&](int l) { d[l] = slot(Op::apply(value<T>(a[l]), value<T>(b[l]), value<T>(c[l]), i)); });
}

// F<T>::run for the integer type T of an instruction; bits count as unsigned.
template <template <class> class F>
Handler for_integer(Type type) {
  const bool is_signed = type.kind == 's';
  switch (type.bits) {
    case 8:
      return is_signed ? F<int8_t>::run : F<uint8_t>::run;
    case 16:
      return is_signed ? F<int16_t>::run : F<uint16_t>::run;
    case 32:
      return is_signed ? F<int32_t>::run : F<uint32_t>::run;
    case 64:
      return is_signed ? F<int64_t>::run : F<uint64_t>::run;
    default:
      return nullptr;
  }
}

}  // namespace ptx
