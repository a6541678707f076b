// The plane format (docs/formats.md) as the kernels read it: which words belong to an expert, and the products of its
// rows. What a kernel does with the sums is its own file's business.
#pragma once

#include "units.h"

constant constexpr int TABLE_WIDTH = 12;  // level, word offset of each of up to 5 planes, and:
constant constexpr int TABLE_SCALES = 6;  // word offset of the scales
constant constexpr int TABLE_FACTOR = 7;  // float32 factor on them
constant constexpr int TABLE_BEYOND = 8;  // word offset of each plane above 8 bits

// One projection of all experts of a layer: see PlaneBank in mlxmoe/kernels.py.
struct PlaneBank {
  const device uint32_t* words;  // planes and scales of all experts, each at the word offset that the table gives
  const device int32_t* table;   // [E, TABLE_WIDTH]
};

// The same projection of one expert. A 2-bit plane has width 2, 1-bit planes are the second and the third.
struct ExpertPlanes {
  const device uint32_t* words;
  const device half* scales;  // [N, K / G] as they are written
  float factor;               // on the scales, at the resident level
  int num_planes;
  float centre;  // (2^level - 1) / 2: what a code is counted from
  int offset0, offset1, offset2, offset3, offset4;
  // Word offsets of the planes behind those. They stay in memory: registers are dear, and such levels are rare.
  const device int32_t* beyond;
};

METAL_FUNC int plane_offset(ExpertPlanes expert, int plane) {
  return plane == 0 ? expert.offset0
      : plane == 1  ? expert.offset1
      : plane == 2  ? expert.offset2
      : plane == 3  ? expert.offset3
      : plane == 4  ? expert.offset4
                    : expert.beyond[plane - 5];
}

template <int N, int K, int G>
METAL_FUNC ExpertPlanes find_expert(PlaneBank bank, int expert) {
  const device int4* entry = (const device int4*)(bank.table + expert * TABLE_WIDTH);
  const int4 first = entry[0];
  const int4 second = entry[1];
  ExpertPlanes planes;
  const int level = first.x;
  planes.words = bank.words;
  planes.scales = (const device half*)(bank.words + second[TABLE_SCALES - 4]);
  planes.factor = as_type<float>(second[TABLE_FACTOR - 4]);
  planes.num_planes = level < 5 ? level - 1 : level / 2 + 1;  // 2, 3, 4, 6, 8, ..., 16 -> 1, 2, 3, 4, 5, ..., 9
  planes.centre = 0.5f * float((1 << level) - 1);
  planes.offset0 = first.y;
  planes.offset1 = first.z;
  planes.offset2 = first.w;
  planes.offset3 = second.x;
  planes.offset4 = second.y;
  planes.beyond = bank.table + expert * TABLE_WIDTH + TABLE_BEYOND;
  return planes;
}

// Adds to sums[r] the product of one unit of activations (`x`, their sum `total`) with rows first_row + r of an expert,
// but for matrix_scale, which is the same in all of a matrix: the caller multiplies with it once.
// Rows beyond the last are read as the last one, so that no lane leaves the loop; the caller drops them.
//
// The loop over planes stays a loop: its body holds each width once, so that all levels fit the instruction cache.
template <int K, int G, int ROWS>
METAL_FUNC void add_unit(
    ExpertPlanes expert,
    const thread float* x,
    float total,
    int unit,
    int first_row,
    int last_row,
    thread float* sums) {
  float dots[ROWS];
#pragma clang loop unroll(full)
  for (int r = 0; r < ROWS; r++) {
    dots[r] = 0.0f;
  }
#pragma clang loop unroll(disable)
  for (int p = 0; p < expert.num_planes; p++) {
    const device uint32_t* plane = expert.words + plane_offset(expert, p);
    if (p == 1 || p == 2) {
#pragma clang loop unroll(full)
      for (int r = 0; r < ROWS; r++) {
        const int row = min(first_row + r, last_row);
        const uint word = plane[row * (K / UNIT) + unit];
        dots[r] = fma(dots[r], 2.0f, dot_one_bit(word, x));
      }
    } else {
      const device uint2* pairs = (const device uint2*)plane;
#pragma clang loop unroll(full)
      for (int r = 0; r < ROWS; r++) {
        const int row = min(first_row + r, last_row);
        const uint2 words = pairs[row * (K / UNIT) + unit];
        dots[r] = fma(dots[r], 4.0f, dot_two_bit(words, x));
      }
    }
  }
  const float centre = expert.centre * total;
#pragma clang loop unroll(full)
  for (int r = 0; r < ROWS; r++) {
    const int row = min(first_row + r, last_row);
    const float scale = float(expert.scales[row * (K / G) + unit * UNIT / G]);
    sums[r] = fma(scale, dots[r] - centre, sums[r]);
  }
}

// Eight codes of row `row` from column 8 * eighth on, counted from the centre: up to 8 bits exact in half and bfloat, above
// that rounded to them by the caller, as weights of the activations' type are. Planes are read as 16 bits (2-bit planes) or
// 8 bits (1-bit planes), which both hold eight codes.
template <int K>
METAL_FUNC void load_codes(ExpertPlanes expert, int row, int eighth, thread float* values) {
  const int index = row * (K / 8) + eighth;
  uint codes[8];
#pragma clang loop unroll(full)
  for (int i = 0; i < 8; i++) {
    codes[i] = 0;
  }
#pragma clang loop unroll(disable)
  for (int p = 0; p < expert.num_planes; p++) {
    const bool one_bit = p == 1 || p == 2;
    const device uint32_t* plane = expert.words + plane_offset(expert, p);
    const uint fields =
        one_bit ? uint(((const device uint8_t*)plane)[index]) : uint(((const device uint16_t*)plane)[index]);
    const uint width = one_bit ? 1 : 2;
    const uint mask = one_bit ? 1 : 3;
#pragma clang loop unroll(full)
    for (int i = 0; i < 8; i++) {
      codes[i] = (codes[i] << width) | ((fields >> (uint(i) * width)) & mask);
    }
  }
#pragma clang loop unroll(full)
  for (int i = 0; i < 8; i++) {
    values[i] = float(codes[i]) - expert.centre;
  }
}

METAL_FUNC float matrix_scale(ExpertPlanes expert) {
  return expert.factor;
}

// The whole factor on the codes of a group.
template <int K, int G>
METAL_FUNC float group_scale(ExpertPlanes expert, int row, int group) {
  return float(expert.scales[row * (K / G) + group]) * expert.factor;
}

// Codes are counted from their centre: nothing is added.
template <int K, int G>
METAL_FUNC float group_bias(ExpertPlanes, int, int) {
  return 0.0f;
}
