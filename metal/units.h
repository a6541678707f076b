// Units: 32 neighbouring columns of a row, what one lane takes at a time. The dot product of 32 packed codes with 32
// activations in the widths that formats have, and the sum over lanes. Formats are planes.h and stock.h.
//
// N rows and K columns of a projection, G group size: a multiple of 32, so that a unit never spans two groups.
#pragma once

#include <metal_stdlib>
using namespace metal;

constant constexpr int UNIT = 32;

// A field that lies in the ten mantissa bits of a half, all other bits cleared, is the subnormal code * 2^(p - 24),
// p its lowest bit: two fields are converted by one AND, with no shift and no integer-to-float conversion, which Apple
// GPUs issue at a quarter of the rate. Fields of one position share a partial sum and pay for the factor 2^(24 - p)
// once. Products are exact in the float32 they are summed in; half subnormals are not flushed (MLX's fp4 kernels rely
// on that too).

// sum of code * x over 32 codes of 2 bits: code i in bits 2 (i mod 16) of word i / 16.
METAL_FUNC float dot_two_bit(uint2 words, const thread float* x) {
  const uint2 high = words >> 10;  // codes 5, 6, 7 and 13, 14, 15 move to positions 0, 1, 2
  float sum = 0.0f;
#pragma clang loop unroll(full)
  for (int p = 0; p < 5; p++) {
    const uint mask = 0x00030003u << (2 * p);
    const float2 a = float2(as_type<half2>(words.x & mask));
    const float2 b = float2(as_type<half2>(words.y & mask));
    float part = x[p] * a.x;
    part = fma(x[p + 8], a.y, part);
    part = fma(x[p + 16], b.x, part);
    part = fma(x[p + 24], b.y, part);
    if (p < 3) {
      const float2 c = float2(as_type<half2>(high.x & mask));
      const float2 d = float2(as_type<half2>(high.y & mask));
      part = fma(x[p + 5], c.x, part);
      part = fma(x[p + 13], c.y, part);
      part = fma(x[p + 21], d.x, part);
      part = fma(x[p + 29], d.y, part);
    }
    sum = fma(part, float(1 << (24 - 2 * p)), sum);
  }
  return sum;
}

// sum of code * x over 32 codes of 1 bit: code i in bit i of the word.
METAL_FUNC float dot_one_bit(uint word, const thread float* x) {
  const uint high = word >> 10;  // codes 10 to 15 and 26 to 31 move to positions 0 to 5
  float sum = 0.0f;
#pragma clang loop unroll(full)
  for (int p = 0; p < 10; p++) {
    const uint mask = 0x00010001u << p;
    const float2 a = float2(as_type<half2>(word & mask));
    float part = x[p] * a.x;
    part = fma(x[p + 16], a.y, part);
    if (p < 6) {
      const float2 b = float2(as_type<half2>(high & mask));
      part = fma(x[p + 10], b.x, part);
      part = fma(x[p + 26], b.y, part);
    }
    sum = fma(part, float(1 << (24 - p)), sum);
  }
  return sum;
}

// sum of code * x over 32 codes of 4 bits: code i in bits 4 (i mod 8) of word i / 8.
METAL_FUNC float dot_four_bit(uint4 words, const thread float* x) {
  const uint4 high = words >> 8;  // codes 2, 3 and 6, 7 of each word move to positions 0, 1
  float even = 0.0f;
  float odd = 0.0f;
#pragma clang loop unroll(full)
  for (int w = 0; w < 4; w++) {
    const float2 a = float2(as_type<half2>(words[w] & 0x000F000Fu));
    const float2 b = float2(as_type<half2>(words[w] & 0x00F000F0u));
    const float2 c = float2(as_type<half2>(high[w] & 0x000F000Fu));
    const float2 d = float2(as_type<half2>(high[w] & 0x00F000F0u));
    even = fma(x[8 * w + 0], a.x, even);
    even = fma(x[8 * w + 4], a.y, even);
    even = fma(x[8 * w + 2], c.x, even);
    even = fma(x[8 * w + 6], c.y, even);
    odd = fma(x[8 * w + 1], b.x, odd);
    odd = fma(x[8 * w + 5], b.y, odd);
    odd = fma(x[8 * w + 3], d.x, odd);
    odd = fma(x[8 * w + 7], d.y, odd);
  }
  return fma(even, float(1 << 24), odd * float(1 << 20));
}

// sum of code * x over 16 codes of 8 bits: code i in byte i.
METAL_FUNC float dot_eight_bit(uint4 words, const thread float* x) {
  const uint4 high = words >> 8;
  float sum = 0.0f;
#pragma clang loop unroll(full)
  for (int w = 0; w < 4; w++) {
    const float2 a = float2(as_type<half2>(words[w] & 0x00FF00FFu));
    const float2 b = float2(as_type<half2>(high[w] & 0x00FF00FFu));
    sum = fma(x[4 * w + 0], a.x, sum);
    sum = fma(x[4 * w + 2], a.y, sum);
    sum = fma(x[4 * w + 1], b.x, sum);
    sum = fma(x[4 * w + 3], b.y, sum);
  }
  return sum * float(1 << 24);
}

// sum of code * x over the COUNT codes of BITS bits (3 or 6) in the low bits of a word.
template <int BITS, int COUNT>
METAL_FUNC float dot_low_fields(uint word, const thread float* x) {
  constexpr int AT_ONCE = 9 / BITS;  // fields that lie in the mantissa before the next shift
  float sum = 0.0f;
#pragma clang loop unroll(full)
  for (int p = 0; p < AT_ONCE; p++) {
    float part = 0.0f;
#pragma clang loop unroll(full)
    for (int i = p; i < COUNT; i += AT_ONCE) {
      const uint field = (word >> (BITS * (i - p))) & (((1u << BITS) - 1u) << (BITS * p));
      part = fma(x[i], float(as_type<half2>(field).x), part);
    }
    sum = fma(part, float(1 << (24 - BITS * p)), sum);
  }
  return sum;
}

// sum of code * x over 96 / BITS codes of BITS bits (3 or 6) in three words, each field where the last one ends.
template <int BITS>
METAL_FUNC float dot_three_words(uint a, uint b, uint c, const thread float* x) {
  constexpr int COUNT = 30 / BITS;  // codes in 30 bits
  return dot_low_fields<BITS, COUNT>(a, x) + dot_low_fields<BITS, COUNT>((a >> 30) | (b << 2), x + COUNT) +
      dot_low_fields<BITS, COUNT>((b >> 28) | (c << 4), x + 2 * COUNT) +
      dot_low_fields<BITS, 96 / BITS - 3 * COUNT>(c >> 26, x + 3 * COUNT);
}

// sum of value * x over 32 values of MXFP4 (e2m1), times 2^-14: sign and exponent-mantissa are moved to where a half has
// them.
METAL_FUNC float dot_mxfp4(uint4 words, const thread float* x) {
  float sum = 0.0f;
#pragma clang loop unroll(full)
  for (int w = 0; w < 4; w++) {
    const uint word = words[w];
    const float2 a = float2(as_type<half2>(((word << 9) & 0x0E000E00u) | ((word << 12) & 0x80008000u)));
    const float2 b = float2(as_type<half2>(((word << 5) & 0x0E000E00u) | ((word << 8) & 0x80008000u)));
    const float2 c = float2(as_type<half2>(((word << 1) & 0x0E000E00u) | ((word << 4) & 0x80008000u)));
    const float2 d = float2(as_type<half2>(((word >> 3) & 0x0E000E00u) | (word & 0x80008000u)));
    sum = fma(x[8 * w + 0], a.x, sum);
    sum = fma(x[8 * w + 4], a.y, sum);
    sum = fma(x[8 * w + 1], b.x, sum);
    sum = fma(x[8 * w + 5], b.y, sum);
    sum = fma(x[8 * w + 2], c.x, sum);
    sum = fma(x[8 * w + 6], c.y, sum);
    sum = fma(x[8 * w + 3], d.x, sum);
    sum = fma(x[8 * w + 7], d.y, sum);
  }
  return sum;
}

// Reads a unit of activations as float32 and returns their sum. x is 8-byte aligned: rows are multiples of 32 values.
template <typename T>
METAL_FUNC float load_unit(const device T* x, thread float* unit) {
  const device vec<T, 4>* fours = (const device vec<T, 4>*)x;
  float total = 0.0f;
#pragma clang loop unroll(full)
  for (int i = 0; i < UNIT / 4; i++) {
    const vec<T, 4> four = fours[i];
#pragma clang loop unroll(full)
    for (int j = 0; j < 4; j++) {
      unit[4 * i + j] = float(four[j]);
      total += unit[4 * i + j];
    }
  }
  return total;
}

// Sum over the LANES neighbouring lanes that share rows, in every one of them.
template <int LANES>
METAL_FUNC float lane_sum(float value) {
  if (LANES == 32) {
    return simd_sum(value);
  }
#pragma clang loop unroll(full)
  for (int step = LANES / 2; step > 0; step /= 2) {
    value += simd_shuffle_xor(value, ushort(step));
  }
  return value;
}
