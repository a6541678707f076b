// Bit operations on integers.
#pragma once

namespace metal {
#define MSL_BITS(T, U, pc, cz, tz, W)                                     \
  METAL_FUNC constexpr T popcount(T x) { return (T)pc((U)x); }            \
  METAL_FUNC constexpr T clz(T x) { return x == 0 ? (T)W : (T)cz((U)x); } \
  METAL_FUNC constexpr T ctz(T x) { return x == 0 ? (T)W : (T)tz((U)x); } \
  METAL_FUNC T extract_bits(T x, uint o, uint b) {                        \
    if (b == 0) return 0;                                                 \
    return (T)((T)(((U)x) << (W - o - b)) >> (W - b));                    \
  }                                                                       \
  METAL_FUNC T insert_bits(T x, T ins, uint o, uint b) {                  \
    U m = (b == W ? ~(U)0 : (((U)1 << b) - 1)) << o;                      \
    return (T)(((U)x & ~m) | (((U)ins << o) & m));                        \
  }                                                                       \
  METAL_FUNC T rotate(T x, T s) {                                         \
    U k = (U)s % W;                                                       \
    return k ? (T)(((U)x << k) | ((U)x >> (W - k))) : x;                  \
  }
MSL_BITS(int, uint, __builtin_popcount, __builtin_clz, __builtin_ctz, 32)
MSL_BITS(uint, uint, __builtin_popcount, __builtin_clz, __builtin_ctz, 32)
MSL_BITS(long, ulong, __builtin_popcountl, __builtin_clzl, __builtin_ctzl, 64)
MSL_BITS(ulong, ulong, __builtin_popcountl, __builtin_clzl, __builtin_ctzl, 64)
METAL_FUNC uint mulhi(uint a, uint b) { return (uint)(((ulong)a * b) >> 32); }
METAL_FUNC int mulhi(int a, int b) { return (int)(((long)a * b) >> 32); }
METAL_FUNC uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }
METAL_FUNC int mad24(int a, int b, int c) { return a * b + c; }
METAL_FUNC int mul24(int a, int b) { return a * b; }
}  // namespace metal
