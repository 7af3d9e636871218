// wgmma.mma_async: D[64 x N] += A[64 x K] B[K x N] by a warpgroup; each warp computes its 16 rows at issue. B, and A
// unless it comes from registers, lie in shared memory as a 64-bit descriptor says.
#include <algorithm>

#include "decode.h"
#include "tensor_core.h"

namespace ptx {
namespace {

// Shared-memory matrix with 16-byte units. Strides in bytes; "major" is the direction that is contiguous.
struct Matrix {
  int64_t start, leading, stride;
  int swizzle;  // bytes of a swizzled row: 16 (none), 32, 64, 128

  explicit Matrix(uint64_t descriptor)
      : start(int64_t(descriptor & 0x3fff) << 4),
        leading(int64_t(descriptor >> 16 & 0x3fff) << 4),
        stride(int64_t(descriptor >> 32 & 0x3fff) << 4) {
    static constexpr int kSwizzles[] = {16, 128, 64, 32};
    swizzle = kSwizzles[descriptor >> 62];
  }

  // The XOR acts on the absolute address: bits 7.. choose how the 16-byte units of a row are permuted.
  int64_t permute(int64_t address) const { return address ^ ((address >> 7) & (swizzle / 16 - 1)) << 4; }

  // K-major: rows of K bytes, eight to a group. Without swizzle LBO steps along K, from one 16-byte column to the next.
  int64_t k_major(int row, int k_bytes) const {
    if (swizzle == 16) return start + row / 8 * stride + row % 8 * 16 + k_bytes / 16 * leading + k_bytes % 16;
    return permute(start + row / 8 * stride + row % 8 * swizzle + k_bytes);
  }
  // MN-major: rows of MN bytes, eight k to a group. LBO steps along MN from one swizzled row to the next, SBO from one
  // group of eight k to the next; without swizzle they change places.
  int64_t mn_major(int mn_bytes, int k) const {
    const int64_t row = start + k % 8 * swizzle + mn_bytes % swizzle;
    if (swizzle == 16) return row + mn_bytes / 16 * stride + k / 8 * leading;
    return permute(row + mn_bytes / swizzle * leading + k / 8 * stride);
  }
};

// Reads size x depth elements and notes the 16-byte units they lie in. Element (row, k) goes to
// out[row * row_step + k * k_step].
void read_matrix(Warp& w, const Instruction& i, uint64_t descriptor, int size, int depth, bool mn_major, Element type,
                 int row_step, int k_step, std::vector<float>& out, std::vector<int64_t>& units) {
  if (descriptor >> 49 & 7) fail(w, i, "unsupported", "wgmma descriptor with a base offset");
  const Matrix matrix(descriptor);
  const int bytes = element_bits(type) / 8;
  SharedMemory& shared = w.block->shared;
  out.resize(size_t(size) * depth);
  const size_t first = units.size();
  for (int row = 0; row < size; ++row)
    for (int k = 0; k < depth; ++k) {
      const int64_t address = mn_major ? matrix.mn_major(row * bytes, k) : matrix.k_major(row, k * bytes);
      shared.bounds(address, bytes);
      uint32_t bits = 0;
      std::memcpy(&bits, shared.at(address), size_t(bytes));
      out[size_t(row) * row_step + size_t(k) * k_step] = element_value(bits, type);
      if (units.size() == first || units.back() != address / 16) units.push_back(address / 16);
    }
  std::sort(units.begin() + long(first), units.end());
  units.erase(std::unique(units.begin() + long(first), units.end()), units.end());
  for (size_t u = first; u < units.size(); ++u)
    shared.begin_tensor_read(w.who(0), units[u] * 16, 16, w.proxy_seen.data());
}

// how: 1 may be read but not written, 2 neither.
void hold(Warp& w, int slot, uint8_t how) {
  if (how == 0) return;
  w.busy_count += w.busy[size_t(slot)] == 0;
  w.busy[size_t(slot)] = std::max(w.busy[size_t(slot)], how);
  w.wgmma_open.accumulators.push_back(slot);
}

// mode: N; width: K; submode: element type; second_offset: bits 0 A in registers, 1 f16 accumulators.
// source: A (descriptor or 4 registers), B, scale-d, scale-a, scale-b [, trans-a] [, trans-b]
void multiply(Warp& w, const Instruction& i, Mask) {
  const bool a_in_registers = i.second_offset & 1, half = i.second_offset & 2;
  const Element type = Element(i.submode);
  const int n = i.mode, depth = i.width, per_register = 32 / element_bits(type);
  const size_t b_at = a_in_registers ? 4 : 1, options = b_at + 4;
  const auto option = [&](size_t k) { return k < i.source.size() ? int32_t(w.lanes(i.source[k])[0]) : 0; };
  const bool accumulate = w.lanes(i.source[b_at + 1])[0] & 0xffffffff;
  const float sign = float(option(b_at + 2)) * float(option(b_at + 3));
  const bool trans_a = !a_in_registers && option(options), trans_b = option(options + (a_in_registers ? 0 : 1));

  const auto check_clean = [&](int slot) {
    if (w.dirty[size_t(slot)])
      fail(w, i, "wgmma-fence", "a register of wgmma was accessed with no wgmma.fence after it");
  };
  for (const int slot : i.destination) check_clean(slot);

  std::vector<float> a, b;
  const int first_row = w.index % 4 * 16;
  if (a_in_registers) {
    a.resize(size_t(64) * depth);
    for (int r = 0; r < 4; ++r) {
      check_clean(i.source[size_t(r)]);
      hold(w, i.source[size_t(r)], 1);
      const uint64_t* lanes = w.lanes(i.source[size_t(r)]);
      for (int l = 0; l < kLanes; ++l)
        for (int e = 0; e < per_register; ++e)
          a[size_t(first_row + l / 4 + 8 * (r & 1)) * depth + per_register * (l % 4) + 4 * per_register * (r >> 1) +
            e] = element_value(uint32_t(lanes[l]) >> (e * 32 / per_register), type);
    }
  } else {
    read_matrix(w, i, w.lanes(i.source[0])[0], 64, depth, trans_a, type, depth, 1, a, w.wgmma_open.units);
  }
  read_matrix(w, i, w.lanes(i.source[b_at])[0], n, depth, trans_b, type, 1, n, b, w.wgmma_open.units);

  for (int row = 0; row < 16; ++row) {
    float sums[256] = {};
    for (int k = 0; k < depth; ++k) {
      const float x = a[size_t(first_row + row) * depth + k], *y = &b[size_t(k) * n];
      for (int column = 0; column < n; ++column) sums[column] += x * y[column];
    }
    for (int column = 0; column < n; ++column) {
      const int lane = row % 8 * 4 + column % 8 / 2, r = column / 8 * 4 + row / 8 * 2 + column % 2;
      if (half) {
        uint64_t& d = w.lanes(i.destination[size_t(r / 2)])[lane];
        const int shift = 16 * (r % 2);
        const double old = accumulate ? to_float(value<Half>(d >> shift)) : 0.0;
        d = (d & ~(uint64_t(0xffff) << shift) & 0xffffffff) | uint64_t(encode(sign * sums[column] + old, kF16))
                                                                  << shift;
      } else {
        uint64_t& d = w.lanes(i.destination[size_t(r)])[lane];
        d = slot(sign * sums[column] + (accumulate ? value<float>(d) : 0.0f));
      }
    }
  }
  for (const int slot : i.destination) hold(w, slot, w.launch->serialised_accumulators ? 0 : 2);
  w.launch->counters.tensor_operations += uint64_t(2) * 16 * n * depth;
}

void fence(Warp& w, const Instruction&, Mask) { std::fill(w.dirty.begin(), w.dirty.end(), 0); }

void commit(Warp& w, const Instruction&, Mask) {
  w.wgmma_committed.push_back(std::move(w.wgmma_open));
  w.wgmma_open = WgmmaGroup();
}

void wait(Warp& w, const Instruction& i, Mask) {
  const size_t keep = w.lanes(i.source[0])[0];
  if (w.wgmma_committed.size() <= keep) return;
  const size_t finished = w.wgmma_committed.size() - keep;
  for (size_t g = 0; g < finished; ++g)
    for (const int64_t unit : w.wgmma_committed[g].units) w.block->shared.end_tensor_read(w.who(0), unit * 16, 16);
  w.wgmma_committed.erase(w.wgmma_committed.begin(), w.wgmma_committed.begin() + long(finished));
  // A register may belong to several groups: those still in flight hold it.
  const auto held = w.wgmma_committed;
  std::vector<uint8_t> before = std::move(w.busy);
  w.busy.assign(before.size(), 0);
  w.busy_count = 0;
  const auto keep_busy = [&](const WgmmaGroup& group) {
    for (const int slot : group.accumulators) {
      w.busy_count += w.busy[size_t(slot)] == 0 && before[size_t(slot)] != 0;
      w.busy[size_t(slot)] = before[size_t(slot)];
    }
  };
  for (const WgmmaGroup& group : held) keep_busy(group);
  keep_busy(w.wgmma_open);
}

}  // namespace

bool decode_wgmma(Decoder& d, const Statement& s, Instruction& i) {
  if (s.opcode != "wgmma" || s.modifiers.empty()) return false;
  i.sync = Sync::Full;
  i.is_wgmma = true;
  i.category = "barrier";
  if (s.modifiers[0] == "fence") i.run = fence;
  if (s.modifiers[0] == "commit_group") i.run = commit;
  if (s.modifiers[0] == "wait_group") i.run = wait;
  if (!i.run) {
    // mma_async.sync.aligned.m64n64k16.f32.bf16.bf16
    Element a, b;
    int n = 0, k = 0;
    if (s.modifiers.size() != 7 || s.modifiers[0] != "mma_async" ||
        std::sscanf(s.modifiers[3].c_str(), "m64n%dk%d", &n, &k) != 2 || !parse_element(s.modifiers[5], a) ||
        !parse_element(s.modifiers[6], b) || a != b || (s.modifiers[4] != "f32" && s.modifiers[4] != "f16"))
      return false;
    i.mode = n;
    i.width = k;
    i.submode = int(a);
    i.second_offset = (s.operands.at(1).kind == Operand::Vector ? 1 : 0) | (s.modifiers[4] == "f16" ? 2 : 0);
    i.category = "tensor";
    i.run = multiply;
    if (k * element_bits(a) != 256 || s.operands[0].list.size() != size_t(n / (s.modifiers[4] == "f16" ? 4 : 2)))
      d.unsupported(s, "wrong shape");
  }
  d.bind(s, i, i.run == multiply ? 1 : 0);
  return true;
}

}  // namespace ptx
