// Decode: the routed experts of a few tokens in two dispatches, straight from the packed weights; with planes each expert
// at its own level. Owns the work split and the activation functions. What a Bank is, with find_expert and add_unit, is
// planes.h or stock.h; the launches and the choice of LANES, ROWS and SIMDGROUPS are mlxmoe/kernels.py.
//
// T tokens, A active experts per token, D model dim, F expert dim. LANES neighbouring lanes of a simdgroup share ROWS
// rows and take the units of a row in turn; so a simdgroup has a tile of ROWS * 32 / LANES rows.
#include "hadamard.h"
#include "planes.h"
#include "stock.h"

constant constexpr int SWIGLU = 0;      // silu(gate) * up
constant constexpr int SWIGLU_OAI = 1;  // gpt-oss: gate and up clamped, (up + 1) * gate * sigmoid(alpha * gate)
constant constexpr int GEGLU = 2;       // gelu(gate) * up, in its tanh form
constant constexpr int RELU2 = 3;       // max(0, gate)^2, no up projection

METAL_FUNC float sigmoid(float x) {
  return 1.0f / (1.0f + exp(-x));
}

// `parameters`: alpha and limit of SWIGLU_OAI.
template <int ACTIVATION>
METAL_FUNC float activate(float gate, float up, const constant float* parameters) {
  if (ACTIVATION == SWIGLU_OAI) {
    const float limit = parameters[1];
    gate = min(gate, limit);
    up = min(max(up, -limit), limit);
    return (up + 1.0f) * (gate * sigmoid(parameters[0] * gate));
  }
  if (ACTIVATION == GEGLU) {
    // precise: the fast tanh of some drivers is NaN for large arguments
    const float inner = 0.7978845608f * (gate + 0.044715f * gate * gate * gate);
    return 0.5f * gate * (1.0f + precise::tanh(inner)) * up;
  }
  if (ACTIVATION == RELU2) {
    const float positive = max(gate, 0.0f);
    return positive * positive;
  }
  return gate * sigmoid(gate) * up;
}

// A lane's part of the gate and up products of an expert's rows first_row to first_row + ROWS - 1: the caller sums over the
// LANES lanes that share them and multiplies with matrix_scale. No up products for RELU2.
template <typename T, int D, int F, int G, int LANES, int ROWS, int ACTIVATION, typename Expert>
METAL_FUNC void gate_up_products(
    const device T* x,
    Expert gate,
    Expert up,
    int first_row,
    uint lane,
    thread float* gate_sums,
    thread float* up_sums) {
#pragma clang loop unroll(full)
  for (int r = 0; r < ROWS; r++) {
    gate_sums[r] = 0.0f;
    up_sums[r] = 0.0f;
  }
  for (int unit = lane % LANES; unit < D / UNIT; unit += LANES) {
    float xs[UNIT];
    const float total = load_unit(x + unit * UNIT, xs);
    add_unit<D, G, ROWS>(gate, xs, total, unit, first_row, F - 1, gate_sums);
    if (ACTIVATION != RELU2) {
      add_unit<D, G, ROWS>(up, xs, total, unit, first_row, F - 1, up_sums);
    }
  }
}

// The hidden value of a row: `index` is its place in the biases [E, F].
template <int ACTIVATION, bool BIAS, typename GateBias, typename UpBias>
METAL_FUNC float hidden_value(
    float gate_sum, float up_sum, GateBias gate_bias, UpBias up_bias, int index, const constant float* parameters) {
  if (BIAS) {
    gate_sum += float(gate_bias[index]);
    up_sum += ACTIVATION != RELU2 ? float(up_bias[index]) : 0.0f;
  }
  return activate<ACTIVATION>(gate_sum, up_sum, parameters);
}

// hidden [T * A, F] = activation of the gate and up products of every (token, chosen expert) pair.
// Grid: 32 threads per tile of rows, T * A. x [T, D], experts [T * A].
template <typename T, int D, int F, int A, int G, int LANES, int ROWS, int ACTIVATION, bool BIAS,
          typename Bank, typename Experts, typename GateBias, typename UpBias>
METAL_FUNC void expert_gate_up(
    const device T* x,
    Experts experts,
    Bank gate_bank,
    Bank up_bank,
    GateBias gate_bias,
    UpBias up_bias,
    const constant float* parameters,
    device T* hidden,
    uint3 thread_position,
    uint lane) {
  const int pair = thread_position.y;
  const int tile = thread_position.x / 32;
  const int expert = experts[pair];
  const int first_row = (tile * (32 / LANES) + lane / LANES) * ROWS;
  const auto gate = find_expert<F, D, G>(gate_bank, expert);
  const auto up = find_expert<F, D, G>(up_bank, expert);

  float gate_sums[ROWS];
  float up_sums[ROWS];
  gate_up_products<T, D, F, G, LANES, ROWS, ACTIVATION>(
      x + (pair / A) * D, gate, up, first_row, lane, gate_sums, up_sums);
#pragma clang loop unroll(full)
  for (int r = 0; r < ROWS; r++) {
    const float gate_sum = lane_sum<LANES>(gate_sums[r]) * matrix_scale(gate);
    const float up_sum = ACTIVATION != RELU2 ? lane_sum<LANES>(up_sums[r]) * matrix_scale(up) : 0.0f;
    const int row = first_row + r;
    if (lane % LANES == 0 && row < F) {
      hidden[pair * F + row] =
          T(hidden_value<ACTIVATION, BIAS>(gate_sum, up_sum, gate_bias, up_bias, expert * F + row, parameters));
    }
  }
}

// The same with a signed block-Hadamard transform of the hidden values as epilogue, which saves a dispatch and a rounding:
// BLOCK is 64 or 128, a multiple of the tile, and divides F; signs [F].
// Grid: 32 * SIMDGROUPS threads per block, T * A. `values` holds BLOCK values.
template <typename T, int D, int F, int A, int G, int LANES, int ROWS, int ACTIVATION, bool BIAS,
          int BLOCK, int SIMDGROUPS,
          typename Bank, typename Experts, typename GateBias, typename UpBias, typename Signs>
METAL_FUNC void expert_gate_up_rotated(
    const device T* x,
    Experts experts,
    Bank gate_bank,
    Bank up_bank,
    GateBias gate_bias,
    UpBias up_bias,
    const constant float* parameters,
    Signs signs,
    device T* hidden,
    threadgroup float* values,
    uint3 threadgroup_position,
    uint simdgroup,
    uint lane) {
  constexpr int TILE = ROWS * (32 / LANES);
  constexpr int EACH = BLOCK / 32;
  const int pair = threadgroup_position.y;
  const int block_row = int(threadgroup_position.x) * BLOCK;
  const int expert = experts[pair];
  const auto gate = find_expert<F, D, G>(gate_bank, expert);
  const auto up = find_expert<F, D, G>(up_bank, expert);

  for (int tile = simdgroup; tile < BLOCK / TILE; tile += SIMDGROUPS) {
    const int local_row = tile * TILE + int(lane / LANES) * ROWS;
    float gate_sums[ROWS];
    float up_sums[ROWS];
    gate_up_products<T, D, F, G, LANES, ROWS, ACTIVATION>(
        x + (pair / A) * D, gate, up, block_row + local_row, lane, gate_sums, up_sums);
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
      const float gate_sum = lane_sum<LANES>(gate_sums[r]) * matrix_scale(gate);
      const float up_sum = ACTIVATION != RELU2 ? lane_sum<LANES>(up_sums[r]) * matrix_scale(up) : 0.0f;
      const int row = block_row + local_row + r;
      if (lane % LANES == 0) {
        values[local_row + r] = float(signs[row]) *
            hidden_value<ACTIVATION, BIAS>(gate_sum, up_sum, gate_bias, up_bias, expert * F + row, parameters);
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup != 0) {
    return;
  }
  const float scale = 1.0f / sqrt(float(BLOCK));
  float mine[EACH];
#pragma clang loop unroll(full)
  for (int i = 0; i < EACH; i++) {
    mine[i] = values[int(lane) * EACH + i];
  }
  hadamard_in_simdgroup<EACH>(mine, lane);
#pragma clang loop unroll(full)
  for (int i = 0; i < EACH; i++) {
    hidden[pair * F + block_row + int(lane) * EACH + i] = T(mine[i] * scale);
  }
}

// out [T, D] = sum over a token's experts of weight * (down product + bias), in one fixed order: a simdgroup takes the
// experts simdgroup, simdgroup + SIMDGROUPS, ... of the token, and the simdgroups' sums are added in their order.
// Grid: 32 * SIMDGROUPS threads per tile of rows, T. `partial` holds SIMDGROUPS tiles.
template <typename T, int D, int F, int A, int G, int LANES, int ROWS, int SIMDGROUPS, bool BIAS,
          typename Bank, typename Experts, typename Weights, typename Bias>
METAL_FUNC void expert_down(
    const device T* hidden,
    Experts experts,
    Weights weights,
    Bank bank,
    Bias bias,
    device T* out,
    threadgroup float* partial,
    uint3 threadgroup_position,
    uint simdgroup,
    uint lane) {
  constexpr int TILE = ROWS * (32 / LANES);
  const int token = threadgroup_position.y;
  const int tile_row = int(threadgroup_position.x) * TILE;
  const int local_row = (lane / LANES) * ROWS;
  const int first_row = tile_row + local_row;

  float totals[ROWS];
#pragma clang loop unroll(full)
  for (int r = 0; r < ROWS; r++) {
    totals[r] = 0.0f;
  }
  for (int a = simdgroup; a < A; a += SIMDGROUPS) {
    const int pair = token * A + a;
    const int expert = experts[pair];
    const float weight = float(weights[pair]);
    const auto packed = find_expert<D, F, G>(bank, expert);
    float sums[ROWS];
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
      sums[r] = 0.0f;
    }
    for (int unit = lane % LANES; unit < F / UNIT; unit += LANES) {
      float xs[UNIT];
      const float total = load_unit(hidden + pair * F + unit * UNIT, xs);
      add_unit<F, G, ROWS>(packed, xs, total, unit, first_row, D - 1, sums);
    }
    const float share = weight * matrix_scale(packed);
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
      totals[r] = fma(share, sums[r], totals[r]);
      // one lane of those that share the row adds the bias
      if (BIAS && lane % LANES == 0 && first_row + r < D) {
        totals[r] = fma(weight, float(bias[expert * D + first_row + r]), totals[r]);
      }
    }
  }
#pragma clang loop unroll(full)
  for (int r = 0; r < ROWS; r++) {
    const float total = lane_sum<LANES>(totals[r]);
    if (lane % LANES == 0) {
      partial[simdgroup * TILE + local_row + r] = total;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int row = simdgroup * 32 + lane; row < TILE && tile_row + row < D; row += 32 * SIMDGROUPS) {
    float total = partial[row];
#pragma clang loop unroll(full)
    for (int s = 1; s < SIMDGROUPS; s++) {
      total += partial[s * TILE + row];
    }
    out[token * D + tile_row + row] = T(total);
  }
}
