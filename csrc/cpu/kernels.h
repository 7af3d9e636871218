// The CPU operations. Their arguments are the plain structs of ../kernels.h.
#pragma once
#include "../kernels.h"
#include "rows.h"

namespace rfkernels::cpu {

void begin_chunk(const BeginChunk& args);
void write(const Write& args);
void rotate(const Rotate& args);
void redmd_loss(const ReDMDLoss& args);

}  // namespace rfkernels::cpu
