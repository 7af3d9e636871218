// Ordinary kernels for the emulator's tests: vector add, block reduction, transpose through shared memory.
#include <cstdint>

extern "C" __global__ void vector_add(const float* a, const float* b, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = a[i] + b[i];
}

// One partial sum per block is added to *total; the order of the atomic additions is the order of the blocks.
extern "C" __global__ void reduce_sum(const float* x, float* total, int n) {
  __shared__ float partial[32];
  float sum = 0.0f;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) partial[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    sum = lane < blockDim.x / 32 ? partial[lane] : 0.0f;
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
    if (lane == 0) atomicAdd(total, sum);
  }
}

// 32 x 32 tile, 8 rows of threads. Padding = 0 has bank conflicts, padding = 1 has none.
template <int kPadding>
__device__ void transpose_tile(const float* in, float* out, int rows, int columns) {
  __shared__ float tile[32][32 + kPadding];
  const int x = blockIdx.x * 32 + threadIdx.x, y = blockIdx.y * 32;
  for (int j = threadIdx.y; j < 32; j += 8)
    if (x < columns && y + j < rows) tile[j][threadIdx.x] = in[int64_t(y + j) * columns + x];
  __syncthreads();
  const int out_x = blockIdx.y * 32 + threadIdx.x, out_y = blockIdx.x * 32;
  for (int j = threadIdx.y; j < 32; j += 8)
    if (out_x < rows && out_y + j < columns) out[int64_t(out_y + j) * rows + out_x] = tile[threadIdx.x][j];
}

extern "C" __global__ void transpose(const float* in, float* out, int rows, int columns) {
  transpose_tile<1>(in, out, rows, columns);
}

extern "C" __global__ void transpose_conflicts(const float* in, float* out, int rows, int columns) {
  transpose_tile<0>(in, out, rows, columns);
}

struct AxpyParams {
  const float* x;
  float* y;
  double scale;
  int n;
};

// A plain struct by value, and a library function whose slow path needs a table in global memory.
extern "C" __global__ void scaled_sine(AxpyParams p) {
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) p.y[i] = float(p.scale) * sinf(p.x[i]) + expf(-p.x[i] * p.x[i]);
}

// Divergent loop with a different trip count per lane.
extern "C" __global__ void collatz(const int* start, int* steps, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  long long value = start[i];
  int count = 0;
  while (value != 1) {
    value = value % 2 ? 3 * value + 1 : value / 2;
    ++count;
  }
  steps[i] = count;
}
