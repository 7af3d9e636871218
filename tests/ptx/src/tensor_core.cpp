// mma.sync, ldmatrix, stmatrix, movmatrix. Fragments, with g = lane / 4 and t = lane % 4 and e elements to a register:
//   A register r: row g + 8 (r & 1), columns e t + 4 e (r >> 1) ...      B register r: rows e t + 4 e r ..., column g
//   C: row g + 8 (r >> 1), column 2 t + (r & 1)
#include "tensor_core.h"

#include "counting.h"
#include "decode.h"

namespace ptx {

int element_bits(Element type) {
  return type == Element::TF32 ? 32 : type == Element::F16 || type == Element::BF16 ? 16 : 8;
}

bool parse_element(const std::string& name, Element& type) {
  static const std::map<std::string, Element> kNames = {
      {"f16", Element::F16},   {"bf16", Element::BF16}, {"tf32", Element::TF32}, {"e4m3", Element::E4M3},
      {"e5m2", Element::E5M2}, {"s8", Element::S8},     {"u8", Element::U8}};
  const auto found = kNames.find(name);
  if (found != kNames.end()) type = found->second;
  return found != kNames.end();
}

float element_value(uint32_t bits, Element type) {
  switch (type) {
    case Element::F16:
      return to_float(Half{uint16_t(bits)});
    case Element::BF16:
      return to_float(BFloat{uint16_t(bits)});
    case Element::TF32:
      return value<float>(bits & ~0x1fffu);  // the hardware reads 19 bits
    case Element::E4M3:
      return float(decode(bits & 0xff, kE4M3));
    case Element::E5M2:
      return float(decode(bits & 0xff, kE5M2));
    case Element::S8:
      return float(int8_t(bits));
    default:
      return float(uint8_t(bits));
  }
}

namespace {

// width: K; mode, submode: element types of A and B; second_offset: accumulators (0 f32, 1 f16, 2 s32).
void multiply(Warp& w, const Instruction& i, Mask) {
  const int depth = i.width;
  const Element a_type = Element(i.mode), b_type = Element(i.submode);
  const int per_a = 32 / element_bits(a_type), per_b = 32 / element_bits(b_type);
  const int a_count = 16 * depth / 32 / per_a, b_count = 8 * depth / 32 / per_b;
  const bool half = i.second_offset == 1;
  float a[16][64], b[64][8];
  for (int r = 0; r < a_count; ++r) {
    const uint64_t* lanes = w.lanes(i.source[size_t(r)]);
    for (int l = 0; l < kLanes; ++l)
      for (int e = 0; e < per_a; ++e)
        a[l / 4 + 8 * (r & 1)][per_a * (l % 4) + 4 * per_a * (r >> 1) + e] =
            element_value(uint32_t(lanes[l]) >> (e * 32 / per_a), a_type);
  }
  for (int r = 0; r < b_count; ++r) {
    const uint64_t* lanes = w.lanes(i.source[size_t(a_count + r)]);
    for (int l = 0; l < kLanes; ++l)
      for (int e = 0; e < per_b; ++e)
        b[per_b * (l % 4) + 4 * per_b * r + e][l / 4] = element_value(uint32_t(lanes[l]) >> (e * 32 / per_b), b_type);
  }
  const int* c = &i.source[size_t(a_count + b_count)];
  uint64_t results[4][kLanes];
  for (int row = 0; row < 16; ++row) {
    float sums[8] = {};
    for (int k = 0; k < depth; ++k)
      for (int column = 0; column < 8; ++column) sums[column] += a[row][k] * b[k][column];
    for (int column = 0; column < 8; ++column) {
      const int lane = row % 8 * 4 + column / 2, r = (row / 8) * 2 + column % 2;
      if (half) {
        const double x = to_float(value<Half>(w.lanes(c[r / 2])[lane] >> (16 * (r % 2))));
        results[r][lane] = encode(sums[column] + x, kF16);
      } else if (i.second_offset == 2) {  // integers up to 2^24 are exact in float: K <= 64 products of 8 bits
        results[r][lane] = uint32_t(int32_t(sums[column])) + uint32_t(w.lanes(c[r])[lane]);
        results[r][lane] &= 0xffffffff;
      } else {
        results[r][lane] = slot(sums[column] + value<float>(w.lanes(c[r])[lane]));
      }
    }
  }
  for (int l = 0; l < kLanes; ++l) {
    for (int r = 0; r < (half ? 2 : 4); ++r)
      w.lanes(i.destination[size_t(r)])[l] = half ? results[2 * r][l] | results[2 * r + 1][l] << 16 : results[r][l];
  }
  w.launch->counters.tensor_operations += uint64_t(2) * 16 * 8 * depth;
}

// Lane 8 m + r holds the address of row r of the mth 8 x 8 matrix. flag: transposed; access: load or store.
void move_matrices(Warp& w, const Instruction& i, Mask) {
  const bool is_store = i.access == Access::Write;
  const int count = i.mode;
  const uint64_t* base = w.lanes(i.source[0]);
  const Mask rows = count == 4 ? kAllLanes : (1u << (8 * count)) - 1;
  count_access(w, i, rows, base, 16, is_store);
  uint64_t loaded[4][kLanes];  // kept until all is read: the address register may also be a destination
  for (int m = 0; m < count; ++m) {
    uint16_t matrix[8][8];
    if (is_store) {
      const uint64_t* lanes = w.lanes(i.source[size_t(m) + 1]);
      for (int l = 0; l < kLanes; ++l)
        for (int e = 0; e < 2; ++e) {
          const uint16_t x = uint16_t(lanes[l] >> (16 * e));
          (i.flag ? matrix[l % 4 * 2 + e][l / 4] : matrix[l / 4][l % 4 * 2 + e]) = x;
        }
    }
    for (int r = 0; r < 8; ++r) {
      const uint64_t address = base[8 * m + r] + uint64_t(i.offset);
      if (is_store)
        std::memcpy(access(w, i, 8 * m + r, address, 16, i.access, matrix[r]), matrix[r], 16);
      else
        std::memcpy(matrix[r], access(w, i, 8 * m + r, address, 16, i.access), 16);
    }
    for (int l = 0; l < kLanes; ++l) {
      const int row = l / 4, column = l % 4 * 2;
      loaded[m][l] = i.flag ? matrix[column][row] | uint64_t(matrix[column + 1][row]) << 16
                            : matrix[row][column] | uint64_t(matrix[row][column + 1]) << 16;
    }
  }
  for (int m = 0; m < count && !is_store; ++m)
    std::memcpy(w.lanes(i.destination[size_t(m)]), loaded[m], sizeof loaded[m]);
}

void transpose_matrix(Warp& w, const Instruction& i, Mask) {  // movmatrix
  uint16_t matrix[8][8];
  for (int l = 0; l < kLanes; ++l)
    for (int e = 0; e < 2; ++e) matrix[l / 4][l % 4 * 2 + e] = uint16_t(w.lanes(i.source[0])[l] >> (16 * e));
  for (int l = 0; l < kLanes; ++l)
    w.lanes(i.destination[0])[l] = matrix[l % 4 * 2][l / 4] | uint64_t(matrix[l % 4 * 2 + 1][l / 4]) << 16;
}

bool decode_mma(Decoder& d, const Statement& s, Instruction& i) {
  // sync.aligned.m16n8k16.row.col[.satfinite].f32.bf16.bf16.f32
  if (s.modifiers.size() < 9 || s.modifiers[2].rfind("m16n8k", 0) || !s.has("row") || !s.has("col")) return false;
  if (s.has("satfinite") || s.has("sp") || s.has("xor")) return false;
  const size_t types = s.modifiers.size() - 4;
  const std::string &accumulator = s.modifiers[types], &c_type = s.modifiers[types + 3];
  Element a, b;
  if (!parse_element(s.modifiers[types + 1], a) || !parse_element(s.modifiers[types + 2], b) || accumulator != c_type)
    return false;
  i.width = std::atoi(s.modifiers[2].c_str() + 6);
  i.mode = int(a);
  i.submode = int(b);
  i.second_offset = accumulator == "f16" ? 1 : accumulator == "s32" ? 2 : 0;
  if (i.width > 32 || (i.second_offset == 0 && accumulator != "f32")) return false;
  i.category = "tensor";
  i.run = multiply;
  d.bind(s, i, 1);
  const int registers = 16 * i.width * element_bits(a) / 1024 + 8 * i.width * element_bits(b) / 1024;
  const size_t accumulators = i.second_offset == 1 ? 2 : 4;
  if (i.destination.size() != accumulators || i.source.size() != size_t(registers) + accumulators)
    d.unsupported(s, "wrong number of registers");
  return true;
}

}  // namespace

bool decode_tensor(Decoder& d, const Statement& s, Instruction& i) {
  i.sync = Sync::Full;
  if (s.opcode == "mma" && decode_mma(d, s, i)) return true;
  if ((s.opcode == "ldmatrix" || s.opcode == "stmatrix") && s.has("m8n8") && s.has("b16")) {
    i.category = "shared";
    i.space = s.has("shared") || s.has("shared::cta") ? Space::Shared : Space::Generic;
    i.access = s.opcode == "stmatrix" ? Access::Write : Access::Read;
    i.mode = s.has("x4") ? 4 : s.has("x2") ? 2 : 1;
    i.flag = s.has("trans");
    i.run = move_matrices;
    d.bind(s, i, s.opcode == "ldmatrix" ? 1 : 0);
    return true;
  }
  if (s.opcode == "movmatrix") {
    i.category = "warp";
    i.run = transpose_matrix;
    d.bind(s, i, 1);
    return true;
  }
  i.sync = Sync::None;
  return false;
}

}  // namespace ptx
