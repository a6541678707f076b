// The fast Hadamard transform of what a lane or a simdgroup holds, unscaled.
#pragma once

#include <metal_stdlib>
using namespace metal;

// N values, N a power of two.
template <int N>
METAL_FUNC void hadamard_in_registers(thread float* values) {
#pragma clang loop unroll(full)
  for (int stride = 1; stride < N; stride *= 2) {
#pragma clang loop unroll(full)
    for (int i = 0; i < N; i++) {
      if ((i & stride) == 0) {
        const float a = values[i];
        const float b = values[i + stride];
        values[i] = a + b;
        values[i + stride] = a - b;
      }
    }
  }
}

// 32 * EACH values, EACH neighbours per lane.
template <int EACH>
METAL_FUNC void hadamard_in_simdgroup(thread float* values, uint lane) {
  hadamard_in_registers<EACH>(values);
#pragma clang loop unroll(full)
  for (int step = 1; step < 32; step *= 2) {
    const bool upper = (lane & step) != 0;
#pragma clang loop unroll(full)
    for (int i = 0; i < EACH; i++) {
      const float other = simd_shuffle_xor(values[i], ushort(step));
      values[i] = upper ? other - values[i] : values[i] + other;
    }
  }
}
