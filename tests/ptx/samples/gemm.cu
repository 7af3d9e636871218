// C = A * B^T with mma.sync and a cp.async pipeline of two stages; A [M, K], B [N, K] and C [M, N] row-major, bf16 in,
// float out. M and N multiples of 64, K a multiple of 32. Four warps of 32 x 32.
#include <cstdint>

constexpr int kTile = 64, kDepth = 32, kRowBytes = kDepth * 2;
constexpr int kStageBytes = 2 * kTile * kRowBytes;

// 16-byte units of a 64-byte row, permuted by the row pair: eight rows of one ldmatrix hit all 32 banks once.
__device__ uint32_t unit_offset(int row, int unit) { return row * kRowBytes + ((unit ^ ((row >> 1) & 3)) << 4); }

__device__ void copy16(uint32_t destination, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(destination), "l"(source) : "memory");
}

__device__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ void load_tile(uint32_t destination, const uint16_t* source, int K, int k) {
  for (int i = threadIdx.x; i < kTile * 4; i += 128) {
    const int row = i / 4, unit = i % 4;
    copy16(destination + unit_offset(row, unit), source + int64_t(row) * K + k + unit * 8);
  }
}

extern "C" __global__ void __launch_bounds__(128)
    gemm_bf16(const uint16_t* a, const uint16_t* b, float* c, int N, int K) {
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t stages = uint32_t(__cvta_generic_to_shared(shared));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row0 = (warp / 2) * 32, column0 = (warp % 2) * 32;
  a += int64_t(blockIdx.y) * kTile * K;
  b += int64_t(blockIdx.x) * kTile * K;

  auto load_stage = [&](int k) {
    const uint32_t stage = stages + (k / kDepth % 2) * kStageBytes;
    load_tile(stage, a, K, k);
    load_tile(stage + kTile * kRowBytes, b, K, k);
    asm volatile("cp.async.commit_group;" ::: "memory");
  };

  float acc[2][4][4] = {};
  load_stage(0);
  for (int k = 0; k < K; k += kDepth) {
    if (k + kDepth < K) {
      load_stage(k + kDepth);
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
    __syncthreads();
    const uint32_t stage_a = stages + (k / kDepth % 2) * kStageBytes, stage_b = stage_a + kTile * kRowBytes;
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
      uint32_t left[2][4], right[2][4];
      for (int i = 0; i < 2; ++i) {
        load_matrices(left[i], stage_a + unit_offset(row0 + i * 16 + lane % 16, step * 2 + lane / 16));
        load_matrices(right[i],
                      stage_b + unit_offset(column0 + i * 16 + (lane / 16) * 8 + lane % 8, step * 2 + lane / 8 % 2));
      }
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 4; ++j) multiply(acc[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
    }
    __syncthreads();
  }

  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 4; ++j)
      for (int half = 0; half < 2; ++half) {
        const int row = blockIdx.y * kTile + row0 + i * 16 + half * 8 + lane / 4;
        const int column = blockIdx.x * kTile + column0 + j * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(c + int64_t(row) * N + column) =
            make_float2(acc[i][j][half * 2], acc[i][j][half * 2 + 1]);
      }
}
