// Tiles, shared memory and registers of the attention forward for sm_80 and later (mma.sync).
//
// A block owns kTileRows queries of one head and sweeps the keys in tiles of kTileKeys. A warp owns 16 * kRowBlocks of
// the rows; with two row blocks every operand read from shared memory serves two products.
// Registers of a thread, head_dim 128, kTileKeys 64, two row blocks:
//   accumulator 2 * 16 * 4 = 128, scores 2 * 8 * 4 = 64 (packed into 32 as weights before the values' products),
//   operands of one step 8 + 4 (and of the next, loaded ahead), softmax state 8, addresses about 12.
// Queries are read again from shared memory for every tile: holding them would take 64 registers more.
// Shared memory: queries, one tile of keys, one of values. Keys of the next tile are copied while this tile's weights
// meet its values, the values while its scores are formed: a pipeline of two tiles in flight whose addresses never
// change. Half the tile keys where an SM has 100 KB, so that two blocks fit on it.
#pragma once
#include "../../element.h"
#include "../params.h"
#include "../swizzle.h"

namespace rfkernels::cuda {

template <class T, int kHeadDim_, int kTileKeys_>
struct ForwardConfig {
  using Element = T;
  static constexpr int kHeadDim = kHeadDim_, kTileKeys = kTileKeys_;
  static constexpr ForwardTiles kTiles{kHeadDim, kTileKeys};
  static constexpr int kTileRows = ForwardTiles::kRows, kRowBlocks = kTiles.row_blocks();
  static constexpr int kThreads = kTiles.threads(), kBlocksPerSM = kTiles.blocks_per_sm();

  using QTile = SharedTile<kTileRows, kHeadDim>;
  using KVTile = SharedTile<kTileKeys, kHeadDim>;
  static constexpr int kSharedQ = 0;
  static constexpr int kSharedK = QTile::kBytes;
  static constexpr int kSharedV = kSharedK + KVTile::kBytes;
  static constexpr int kSharedKept = kSharedV + KVTile::kBytes;  // six ints, see KeptInShared
  static constexpr int kSharedBytes = kSharedKept + kForwardKeptBytes;

  static_assert(kHeadDim % 16 == 0 && kHeadDim <= 256 && kTileKeys % 16 == 0);
  static_assert(kRowBlocks * (kHeadDim / 8 + kTileKeys / 8) * 4 <= 192, "accumulator and scores leave 63 registers");
  static_assert(kThreads * kBlocksPerSM * 255 <= 65536, "the register file of an SM");
  static_assert(kSharedBytes == kTiles.shared_bytes() && kSharedBytes <= 99 * 1024, "a block of sm_86 to sm_120");
  // 16-byte units of a slab's rows are shared out evenly: every thread copies as many.
  static_assert(kTileKeys * KVTile::kSlabUnits % kThreads == 0);
};

}  // namespace rfkernels::cuda
