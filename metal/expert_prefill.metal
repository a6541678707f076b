// Prefill: the product of many rows with the expert that each was sent to, expert by expert. Owns the tiles. What a Bank
// is, with find_expert, load_codes and group_scale, is planes.h or stock.h; the order of the rows and the launch are
// mlxmoe/kernels.py.
//
// A threadgroup computes BM rows of one expert times BN outputs: BK columns of codes are unpacked into threadgroup memory
// once and used by all rows. An expert of at most BM rows has its weights read once. Codes of up to 8 bits are exact
// in 16 bits (longer ones are rounded, as weights of type T would be) and scales are not, so a group's products are summed unscaled and then multiplied, in float32, by the diagonal matrix of
// its scales. Affine codes also need sum(x) * bias: the eight partial sums of x in a chunk times eight equal rows of
// biases, one more product of 8 x 8 matrices.
#include "planes.h"
#include "stock.h"

#include <metal_simdgroup_matrix>

constant constexpr int BN = 32;
constant constexpr int PAD = 8;  // elements between rows of a tile, against bank conflicts
constant constexpr int ROWS_PER_SIMDGROUP = 16;

// Rows of one expert: `first` in the sorted order, `count` of at most BM.
struct RowTile {
  int expert;
  int first;
  int count;
};

// The tile-th tile of BM rows, no tile spanning two experts; count 0 beyond the last. offsets [E + 1]: each expert's
// first row. A lane counts the tiles of one expert in 32.
template <int E, int BM, typename Offsets>
METAL_FUNC RowTile find_tile(Offsets offsets, int tile, uint lane) {
  RowTile found;
  found.expert = 0;
  found.first = 0;
  found.count = 0;
  int tiles_before = 0;
  for (int e = 0; e < E; e += 32) {
    const int expert = e + int(lane);
    const int start = offsets[min(expert, E)];
    const int end = offsets[min(expert + 1, E)];
    const int tiles = (end - start + BM - 1) / BM;
    const int tiles_through = tiles_before + simd_prefix_inclusive_sum(tiles);
    const int owner = simd_sum(int(tiles_through <= tile));
    if (owner < 32) {
      const int first = start + (tile - (tiles_through - tiles)) * BM;
      found.expert = e + owner;
      found.first = simd_shuffle(first, ushort(owner));
      found.count = min(BM, simd_shuffle(end, ushort(owner)) - found.first);
      return found;
    }
    tiles_before = simd_shuffle(tiles_through, ushort(31));
  }
  return found;
}

// out [M, N]: row m = x[rows[m]] times the transposed matrix of the expert that owns m, plus its bias.
// Grid: BM / 16 simdgroups per tile of BN outputs (x) and per tile of rows (y, see find_tile).
template <typename T, int E, int N, int K, int G, int BM, int BK, bool AFFINE, bool BIAS,
          typename Bank, typename Rows, typename Offsets, typename Bias>
METAL_FUNC void expert_gemm(
    const device T* x,
    Rows rows,
    Offsets offsets,
    Bank bank,
    Bias bias,
    device T* out,
    threadgroup T* x_tile,
    threadgroup T* code_tile,
    threadgroup float* scale_tile,
    threadgroup float* bias_tile,
    threadgroup float* scratch,
    uint3 threadgroup_position,
    uint simdgroup,
    uint lane) {
  constexpr int PITCH = BK + PAD;
  constexpr int THREADS = BM / ROWS_PER_SIMDGROUP * 32;
  constexpr int EIGHTHS = BK / 8;
  const RowTile tile = find_tile<E, BM>(offsets, threadgroup_position.y, lane);
  if (tile.count == 0) {
    return;
  }
  const int thread_index = int(simdgroup) * 32 + int(lane);
  const int first_output = int(threadgroup_position.x) * BN;
  const int local_row = int(simdgroup) * ROWS_PER_SIMDGROUP;
  const bool busy = local_row < tile.count;
  const auto expert = find_expert<N, K, G>(bank, tile.expert);

  simdgroup_matrix<float, 8, 8> sums[2][BN / 8];   // scaled
  simdgroup_matrix<float, 8, 8> parts[2][BN / 8];  // of this group, unscaled
#pragma clang loop unroll(full)
  for (int i = 0; i < 2; i++) {
#pragma clang loop unroll(full)
    for (int j = 0; j < BN / 8; j++) {
      sums[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      parts[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
  }

  for (int k = 0; k < K; k += BK) {
    for (int i = thread_index; i < BM * EIGHTHS; i += THREADS) {
      const int row = i / EIGHTHS;
      const int column = i % EIGHTHS * 8;
      threadgroup T* to = x_tile + row * PITCH + column;
      float sum = 0.0f;
      if (row < tile.count) {
        // 16-byte aligned: rows are multiples of 32 values, columns here of 8
        const device vec<T, 4>* from = (const device vec<T, 4>*)(x + int64_t(rows[tile.first + row]) * K + k + column);
#pragma clang loop unroll(full)
        for (int j = 0; j < 8; j++) {
          const T value = from[j / 4][j % 4];
          to[j] = value;
          sum += float(value);
        }
      } else {
#pragma clang loop unroll(full)
        for (int j = 0; j < 8; j++) {
          to[j] = T(0.0f);
        }
      }
      if (AFFINE) {
        scratch[row * 8 + i % EIGHTHS] = sum;
        if (EIGHTHS == 4) {
          scratch[row * 8 + 4 + i % EIGHTHS] = 0.0f;
        }
      }
    }
    for (int i = thread_index; i < BN * EIGHTHS; i += THREADS) {
      const int row = min(first_output + i / EIGHTHS, N - 1);
      float values[8];
      load_codes<K>(expert, row, k / 8 + i % EIGHTHS, values);
      threadgroup T* to = code_tile + (i / EIGHTHS) * PITCH + i % EIGHTHS * 8;
#pragma clang loop unroll(full)
      for (int j = 0; j < 8; j++) {
        to[j] = T(values[j]);
      }
    }
    if (k % G == 0) {
      for (int i = thread_index; i < 8 * BN; i += THREADS) {
        const int row = min(first_output + i % BN, N - 1);
        scale_tile[i] = i % 8 == i / BN ? group_scale<K, G>(expert, row, k / G) : 0.0f;
        if (AFFINE) {
          bias_tile[i] = group_bias<K, G>(expert, row, k / G);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (busy) {
#pragma clang loop unroll(full)
      for (int step = 0; step < BK; step += 8) {
        simdgroup_matrix<T, 8, 8> a[2];
        simdgroup_matrix<T, 8, 8> b;
        simdgroup_load(a[0], x_tile + local_row * PITCH + step, PITCH);
        simdgroup_load(a[1], x_tile + (local_row + 8) * PITCH + step, PITCH);
#pragma clang loop unroll(full)
        for (int j = 0; j < BN / 8; j++) {
          simdgroup_load(b, code_tile + j * 8 * PITCH + step, PITCH, ulong2(0, 0), true);
          simdgroup_multiply_accumulate(parts[0][j], a[0], b, parts[0][j]);
          simdgroup_multiply_accumulate(parts[1][j], a[1], b, parts[1][j]);
        }
      }
      if (AFFINE) {
        simdgroup_matrix<float, 8, 8> x_sums[2];
        simdgroup_load(x_sums[0], scratch + local_row * 8, 8);
        simdgroup_load(x_sums[1], scratch + (local_row + 8) * 8, 8);
#pragma clang loop unroll(full)
        for (int j = 0; j < BN / 8; j++) {
          simdgroup_matrix<float, 8, 8> biases;
          simdgroup_load(biases, bias_tile + j * 8, BN);
          simdgroup_multiply_accumulate(sums[0][j], x_sums[0], biases, sums[0][j]);
          simdgroup_multiply_accumulate(sums[1][j], x_sums[1], biases, sums[1][j]);
        }
      }
      if ((k + BK) % G == 0) {
#pragma clang loop unroll(full)
        for (int j = 0; j < BN / 8; j++) {
          simdgroup_matrix<float, 8, 8> scales;
          simdgroup_load(scales, scale_tile + j * 8, BN);
#pragma clang loop unroll(full)
          for (int i = 0; i < 2; i++) {
            simdgroup_multiply_accumulate(sums[i][j], parts[i][j], scales, sums[i][j]);
            parts[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
          }
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (!busy) {
    return;
  }
  // 8 x 8 results at a time through threadgroup memory: which lane holds which element is the hardware's business
  threadgroup float* staged = scratch + int(simdgroup) * 64;
#pragma clang loop unroll(full)
  for (int i = 0; i < 2; i++) {
#pragma clang loop unroll(full)
    for (int j = 0; j < BN / 8; j++) {
      simdgroup_store(sums[i][j], staged, 8);
      simdgroup_barrier(mem_flags::mem_threadgroup);
#pragma clang loop unroll(full)
      for (int element = 0; element < 2; element++) {
        const int at = 2 * int(lane) + element;
        const int row = local_row + 8 * i + at / 8;
        const int output = first_output + 8 * j + at % 8;
        if (row < tile.count && output < N) {
          float value = staged[at];
          if (BIAS) {
            value += float(bias[tile.expert * N + output]);
          }
          out[int64_t(tile.first + row) * N + output] = T(value);
        }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
  }
}
