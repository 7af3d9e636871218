// A [kRows, kColumns] tile of 16-bit elements in shared memory, without bank conflicts for rows of any head size.
//
// The tile is cut into slabs of columns, the widest power of two up to 64 that divides kColumns (128 bytes, all banks);
// a slab holds its rows one after another. Within a slab the 16-byte units of a row are permuted by XOR with the row,
// so that eight rows of one unit (a matrix of ldmatrix) lie in different banks: for 8 units a row by row % 8, for 4
// units, two rows to 128 bytes, by row / 2 % 4, and so on.
#pragma once
#include <cstdint>

namespace rfkernels::cuda {

// A comment in the kernel's PTX, and no instruction: how much dynamic shared memory a launch must ask for.
template <int kBytes>
__device__ __forceinline__ void state_shared_bytes() {
  asm volatile("// dynamic shared memory: %0 bytes" ::"n"(kBytes));
}

template <int kRows_, int kColumns_>
struct SharedTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kUnits = kColumns / 8;  // of 16 bytes, in a row
  static constexpr int kSlabUnits = kUnits % 8 == 0 ? 8 : kUnits % 4 == 0 ? 4 : 2;
  static constexpr int kSlabs = kUnits / kSlabUnits;
  static constexpr int kRowBytes = kSlabUnits * 16;
  static constexpr int kSlabBytes = kRows * kRowBytes;
  static constexpr int kBytes = kSlabs * kSlabBytes;
  static_assert(kColumns % 16 == 0 && kRows % 8 == 0);

  // Of a unit within its slab. Adding a multiple of 8 to the row adds that many times kRowBytes.
  static __device__ __forceinline__ uint32_t slab_offset(int row, int unit) {
    return row * kRowBytes + ((unit ^ (row / (8 / kSlabUnits) % kSlabUnits)) << 4);
  }
  static __device__ __forceinline__ uint32_t offset(int row, int unit) {
    return unit / kSlabUnits * kSlabBytes + slab_offset(row, unit % kSlabUnits);
  }
};

// Addresses of ldmatrix for 16 x 16 blocks of a tile. By columns, matrices come as (top left, bottom left, top right,
// bottom right): an `a` of mma, or, transposed, two `b`. By rows as (top left, top right, bottom left, bottom right):
// two `b` whose two registers are neighbours, as mma wants them (else each costs a move). One register a tile: another
// column of a slab is an XOR away (the tile begins at a multiple of 128 bytes), rows and slabs are constant offsets.
template <class Tile, bool kByRows>
struct BlockAddresses {
  static constexpr int kSlabBlocks = Tile::kSlabUnits / 2;
  uint32_t first;

  __device__ __forceinline__ BlockAddresses(uint32_t tile, int lane)
      : first(tile + (kByRows ? Tile::slab_offset(lane / 16 * 8 + lane % 8, lane / 8 % 2)
                              : Tile::slab_offset(lane % 16, lane / 16))) {}

  // row: a multiple of 16; column_block: columns 16 * column_block onwards.
  __device__ __forceinline__ uint32_t at(int row, int column_block) const {
    return (first ^ column_block % kSlabBlocks * 32) + row * Tile::kRowBytes +
           column_block / kSlabBlocks * Tile::kSlabBytes;
  }
};

}  // namespace rfkernels::cuda
