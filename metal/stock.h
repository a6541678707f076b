// Stock MLX formats as the kernels read them: affine codes (a scale and a bias per group) and MXFP4, each expert in one
// precision and rows of one width, as mx.quantize packs them. The same functions as in planes.h, for the other banks.
#pragma once

#include "units.h"

// words [E, N, K * BITS / 32], scales and biases [E, N, K / G]: value = scale * code + bias. S is their type.
template <int BITS, typename S>
struct AffineBank {
  const device uint32_t* words;
  const device S* scales;
  const device S* biases;
};

template <int N, int K, int G, int BITS, typename S>
METAL_FUNC AffineBank<BITS, S> find_expert(AffineBank<BITS, S> bank, int expert) {
  bank.words += int64_t(expert) * (N * (K / 32) * BITS);
  bank.scales += int64_t(expert) * (N * (K / G));
  bank.biases += int64_t(expert) * (N * (K / G));
  return bank;
}

// sum of code * x over a unit: BITS words.
template <int BITS>
METAL_FUNC float dot_unit(const device uint32_t* words, const thread float* x) {
  if (BITS == 2) {
    return dot_two_bit(*(const device uint2*)words, x);
  }
  if (BITS == 4) {
    return dot_four_bit(*(const device uint4*)words, x);
  }
  if (BITS == 8) {
    const device uint4* fours = (const device uint4*)words;
    return dot_eight_bit(fours[0], x) + dot_eight_bit(fours[1], x + 16);
  }
  float sum = dot_three_words<BITS>(words[0], words[1], words[2], x);
  if (BITS == 6) {
    sum += dot_three_words<BITS>(words[3], words[4], words[5], x + 16);
  }
  return sum;
}

template <int K, int G, int ROWS, int BITS, typename S>
METAL_FUNC void add_unit(
    AffineBank<BITS, S> expert,
    const thread float* x,
    float total,
    int unit,
    int first_row,
    int last_row,
    thread float* sums) {
#pragma clang loop unroll(full)
  for (int r = 0; r < ROWS; r++) {
    const int row = min(first_row + r, last_row);
    const int group = row * (K / G) + unit * UNIT / G;
    const float dot = dot_unit<BITS>(expert.words + (row * (K / UNIT) + unit) * BITS, x);
    sums[r] = fma(float(expert.scales[group]), dot, fma(float(expert.biases[group]), total, sums[r]));
  }
}

template <int BITS, typename S>
METAL_FUNC float matrix_scale(AffineBank<BITS, S>) {
  return 1.0f;
}

// Eight codes of row `row` from column 8 * eighth on: BITS bytes.
template <int K, int BITS, typename S>
METAL_FUNC void load_codes(AffineBank<BITS, S> expert, int row, int eighth, thread float* values) {
  const device uint8_t* bytes = (const device uint8_t*)expert.words + (row * (K / 8) + eighth) * BITS;
  uint64_t stream = 0;
#pragma clang loop unroll(full)
  for (int i = 0; i < BITS; i++) {
    stream |= uint64_t(bytes[i]) << (8 * i);
  }
#pragma clang loop unroll(full)
  for (int i = 0; i < 8; i++) {
    values[i] = float(uint(stream >> (BITS * i)) & ((1u << BITS) - 1u));
  }
}

template <int K, int G, int BITS, typename S>
METAL_FUNC float group_scale(AffineBank<BITS, S> expert, int row, int group) {
  return float(expert.scales[row * (K / G) + group]);
}

template <int K, int G, int BITS, typename S>
METAL_FUNC float group_bias(AffineBank<BITS, S> expert, int row, int group) {
  return float(expert.biases[row * (K / G) + group]);
}

// words [E, N, K / 8], scales [E, N, K / 32]: powers of two, the exponent of a float32.
struct Mxfp4Bank {
  const device uint32_t* words;
  const device uint8_t* scales;
};

template <int N, int K, int G>
METAL_FUNC Mxfp4Bank find_expert(Mxfp4Bank bank, int expert) {
  bank.words += int64_t(expert) * (N * (K / 8));
  bank.scales += int64_t(expert) * (N * (K / 32));
  return bank;
}

METAL_FUNC float mxfp4_scale(uint8_t exponent) {
  return as_type<float>(uint(exponent) << 23);
}

template <int K, int G, int ROWS>
METAL_FUNC void add_unit(
    Mxfp4Bank expert,
    const thread float* x,
    float total,
    int unit,
    int first_row,
    int last_row,
    thread float* sums) {
#pragma clang loop unroll(full)
  for (int r = 0; r < ROWS; r++) {
    const int row = min(first_row + r, last_row);
    const int index = row * (K / UNIT) + unit;
    const float dot = dot_mxfp4(((const device uint4*)expert.words)[index], x);
    sums[r] = fma(mxfp4_scale(expert.scales[index]) * float(1 << 14), dot, sums[r]);
  }
}

METAL_FUNC float matrix_scale(Mxfp4Bank) {
  return 1.0f;
}

// Eight values of row `row` from column 8 * eighth on, without their scale: exact in half and bfloat.
template <int K>
METAL_FUNC void load_codes(Mxfp4Bank expert, int row, int eighth, thread float* values) {
  const uint word = expert.words[row * (K / 8) + eighth];
#pragma clang loop unroll(full)
  for (int i = 0; i < 8; i++) {
    const uint code = word >> (4 * i);
    const uint bits = ((code & 7u) << 9) | ((code & 8u) << 12);
    values[i] = float(as_type<half2>(bits).x) * float(1 << 14);
  }
}

template <int K, int G>
METAL_FUNC float group_scale(Mxfp4Bank expert, int row, int group) {
  return mxfp4_scale(expert.scales[row * (K / G) + group]);
}

template <int K, int G>
METAL_FUNC float group_bias(Mxfp4Bank, int, int) {
  return 0.0f;
}
