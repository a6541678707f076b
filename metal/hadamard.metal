// Signed block-Hadamard transform of activations: y = H (signs * x) / sqrt(BLOCK) per block of neighbouring columns.
// The signs come before the transform: behind it, two differently signed copies would be mirror images of each other.
//
// BLOCK is a power of two from 64 to 4096. A simdgroup transforms up to 512 values, CHUNK / 32 neighbours per lane;
// larger blocks exchange the simdgroups' parts through threadgroup memory.
#include "hadamard.h"

// x, y [R, COLUMNS], signs [COLUMNS]. Grid: one threadgroup of SIMDGROUPS * 32 threads per block of x.
// `exchange` holds BLOCK values when there is more than one simdgroup.
template <typename T, int COLUMNS, int BLOCK, int SIMDGROUPS, typename Signs>
METAL_FUNC void hadamard_blocks(
    const device T* x,
    Signs signs,
    device T* y,
    threadgroup float* exchange,
    uint block,
    uint simdgroup,
    uint lane) {
  constexpr int CHUNK = BLOCK / SIMDGROUPS;
  constexpr int EACH = CHUNK / 32;
  constexpr int THREADS = 32 * SIMDGROUPS;
  const float scale = 1.0f / sqrt(float(BLOCK));
  const int64_t start = int64_t(block) * BLOCK;
  const int first = int(simdgroup) * CHUNK + int(lane) * EACH;
  const int column = int(start % COLUMNS) + first;

  float values[EACH];
#pragma clang loop unroll(full)
  for (int i = 0; i < EACH; i++) {
    values[i] = float(x[start + first + i]) * float(signs[column + i]);
  }
  hadamard_in_simdgroup<EACH>(values, lane);
  if (SIMDGROUPS == 1) {
#pragma clang loop unroll(full)
    for (int i = 0; i < EACH; i++) {
      y[start + first + i] = T(values[i] * scale);
    }
    return;
  }
#pragma clang loop unroll(full)
  for (int i = 0; i < EACH; i++) {
    exchange[first + i] = values[i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int c = int(simdgroup) * 32 + int(lane); c < CHUNK; c += THREADS) {
    float parts[SIMDGROUPS];
#pragma clang loop unroll(full)
    for (int s = 0; s < SIMDGROUPS; s++) {
      parts[s] = exchange[s * CHUNK + c];
    }
    hadamard_in_registers<SIMDGROUPS>(parts);
#pragma clang loop unroll(full)
    for (int s = 0; s < SIMDGROUPS; s++) {
      y[start + s * CHUNK + c] = T(parts[s] * scale);
    }
  }
}
