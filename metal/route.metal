// Routing after the router's matrix product: scores, selection bias, groups, top-k, normalisation and scaling of a token
// in one simdgroup. The rule, and what happens among equals, is mlxmoe/router.py; names and values are the same there.
//
// E experts, lane l holds experts l, l + 32, l + 64, ...
#include <metal_stdlib>
using namespace metal;

constant constexpr int SOFTMAX = 0;
constant constexpr int SIGMOID = 1;
constant constexpr int SOFTMAX_CHOSEN = 2;
constant constexpr int SPARSEMIXER = 3;

// logits [T, E], bias [E], parameters: epsilon (of SPARSEMIXER the jitter) and scaling. experts, weights [T, TOP_K].
// `values` holds E floats.
// Grid: one threadgroup of 32 threads per token.
template <int E, int TOP_K, int SCORE, bool BIAS, int GROUPS, int TOP_GROUPS, bool TOP2, bool NORMALISE,
          typename Logits, typename Bias>
METAL_FUNC void route(
    Logits logits,
    Bias bias,
    const constant float* parameters,
    device uint32_t* experts,
    device float* weights,
    threadgroup float* values,
    uint token,
    uint lane) {
  constexpr int EACH = (E + 31) / 32;
  float score[EACH];
  float choose_by[EACH];

  float largest = -INFINITY;
#pragma clang loop unroll(full)
  for (int i = 0; i < EACH; i++) {
    const int e = int(lane) + 32 * i;
    score[i] = e < E ? float(logits[int(token) * E + e]) : -INFINITY;
    choose_by[i] = score[i];
    largest = max(largest, score[i]);
  }
  if (SCORE == SOFTMAX) {
    largest = simd_max(largest);
    float sum = 0.0f;
#pragma clang loop unroll(full)
    for (int i = 0; i < EACH; i++) {
      score[i] = exp(score[i] - largest);
      sum += score[i];
    }
    sum = simd_sum(sum);
#pragma clang loop unroll(full)
    for (int i = 0; i < EACH; i++) {
      score[i] /= sum;
    }
  }
  if (SCORE == SIGMOID) {
#pragma clang loop unroll(full)
    for (int i = 0; i < EACH; i++) {
      score[i] = 1.0f / (1.0f + exp(-score[i]));
    }
  }
  if (BIAS) {
#pragma clang loop unroll(full)
    for (int i = 0; i < EACH; i++) {
      const int e = int(lane) + 32 * i;
      choose_by[i] = e < E ? score[i] + float(bias[e]) : -INFINITY;
    }
  }

  if (TOP_GROUPS < GROUPS) {  // lane g judges group g
    constexpr int SIZE = E / GROUPS;
#pragma clang loop unroll(full)
    for (int i = 0; i < EACH; i++) {
      const int e = int(lane) + 32 * i;
      if (e < E) {
        values[e] = choose_by[i];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float best = -INFINITY;
    float second = -INFINITY;
    if (int(lane) < GROUPS) {
      for (int j = 0; j < SIZE; j++) {
        const float value = values[int(lane) * SIZE + j];
        second = max(second, min(best, value));
        best = max(best, value);
      }
    }
    const float group = TOP2 ? best + second : best;
    int before = 0;
#pragma clang loop unroll(full)
    for (int g = 0; g < GROUPS; g++) {
      const float other = simd_shuffle(group, ushort(g));
      before += int(other > group || (other == group && g < int(lane)));
    }
    const uint kept = simd_or(int(lane) < GROUPS && before < TOP_GROUPS ? 1u << lane : 0u);
#pragma clang loop unroll(full)
    for (int i = 0; i < EACH; i++) {
      const int e = int(lane) + 32 * i;
      choose_by[i] = e < E && ((kept >> (e / SIZE)) & 1u) != 0u ? choose_by[i] : -INFINITY;
    }
  }

  // One expert after the other; lane k keeps the k-th. `taken` marks what this lane gave away.
  uint taken = 0;
  int chosen = 0;
  float weight = SCORE == SOFTMAX_CHOSEN ? -INFINITY : 0.0f;
  for (int k = 0; k < TOP_K; k++) {
    float best = -INFINITY;
    int best_expert = E;
    float best_score = 0.0f;
#pragma clang loop unroll(full)
    for (int i = 0; i < EACH; i++) {
      const int e = int(lane) + 32 * i;
      if (e < E && ((taken >> i) & 1u) == 0u && (choose_by[i] > best || best_expert == E)) {
        best = choose_by[i];
        best_expert = e;
        best_score = score[i];
      }
    }
    const float top = simd_max(best);
    // a row of NaN has no winner: expert 0 then, so that nothing is read out of bounds
    const int winner = simd_min(best == top ? best_expert : E);
    const int expert = winner < E ? winner : 0;
    float winner_score = simd_shuffle(best_score, ushort(expert % 32));
    if (SCORE == SPARSEMIXER) {
      float near = 0.0f;
#pragma clang loop unroll(full)
      for (int i = 0; i < EACH; i++) {
        const int e = int(lane) + 32 * i;
        const bool left = e < E && ((taken >> i) & 1u) == 0u;
        if (left && winner_score - score[i] <= 2.0f * parameters[0] * max(abs(score[i]), winner_score)) {
          near += exp(score[i] - winner_score);
        }
      }
      winner_score = 1.0f / simd_sum(near);
    }
    if (int(lane) == expert % 32) {
      taken |= 1u << (expert / 32);
    }
    if (int(lane) == k) {
      chosen = expert;
      weight = winner_score;
    }
  }
  if (SCORE == SOFTMAX_CHOSEN) {
    weight = exp(weight - simd_max(weight));
    weight /= simd_sum(weight);
  }
  if (NORMALISE) {
    weight /= simd_sum(weight) + parameters[0];
  }
  if (int(lane) < TOP_K) {
    experts[int(token) * TOP_K + int(lane)] = uint32_t(chosen);
    weights[int(token) * TOP_K + int(lane)] = weight * parameters[1];
  }
}
