// Barriers, and operations across the lanes of a simdgroup or quad.
//
// Each operation is one exchange: a lane hands its value to the runtime, waits until every lane that will come has
// come, and gets a snapshot of all values. A snapshot lives until the lane's next exchange.
#pragma once

namespace metal {
enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
};
METAL_FUNC constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((uint)a | (uint)b); }
METAL_FUNC constexpr mem_flags operator&(mem_flags a, mem_flags b) { return (mem_flags)((uint)a & (uint)b); }
METAL_FUNC void threadgroup_barrier(mem_flags flags) { msl_tgbarrier((uint)flags); }
METAL_FUNC void simdgroup_barrier(mem_flags flags) { msl_sgbarrier((uint)flags); }

// ---------------------------------------------------------------- which types

// Metal takes numbers of up to 4 bytes and their vectors. MLX adds bool, bfloat and 8-byte overloads of its own, which
// wider templates here would make ambiguous.
template <class T>
struct msl_simd_type {
  typedef typename is_vector_i<T>::elem E;
  static constexpr constant bool value =
      is_arithmetic_v<E> && sizeof(E) <= 4 && !is_same_v<E, bool> && !is_same_v<E, bfloat>;
};
// clang-format off
#define MSL_SIMD template <class T, class = enable_if_t<msl_simd_type<T>::value>> METAL_FUNC T
#define MSL_ANY template <class T> METAL_FUNC T
// clang-format on

// one number per kind of operation: lanes exchange with those that are at the same kind in the same place
enum msl_operation : uint {
  MSL_SHUFFLE = 1,
  MSL_SHUFFLE_XOR,
  MSL_SHUFFLE_DOWN,
  MSL_SHUFFLE_UP,
  MSL_ROTATE_DOWN,
  MSL_ROTATE_UP,
  MSL_FILL_DOWN,
  MSL_FILL_UP,
  MSL_BROADCAST_FIRST,
  MSL_ALL,
  MSL_ANY_LANE,
  MSL_IS_FIRST,
  MSL_BALLOT,
  MSL_ACTIVE,
  MSL_REDUCE,
  MSL_SCAN,
  MSL_QUAD_REDUCE,
  MSL_QUAD_SHUFFLE,
  MSL_QUAD_XOR,
  MSL_QUAD_DOWN,
  MSL_QUAD_UP,
  MSL_MATRIX,
  MSL_MATRIX_MULTIPLY,
  MSL_MATRIX_LOAD,
  MSL_MATRIX_STORE,
};

METAL_FUNC bool msl_present(const thread msl_snap* s, uint lane) { return lane < 32 && ((s->mask >> lane) & 1); }
MSL_ANY msl_value(const thread msl_snap* s, uint lane) { return *(const thread T*)s->slot[lane]; }

// The value of a lane; an absent lane is a finding, and then any value will do.
MSL_ANY msl_from(const thread msl_snap* s, uint lane, T own) {
  if (msl_present(s, lane)) return msl_value<T>(s, lane);
  msl_bad_lane(lane);
  return own;
}

// ---------------------------------------------------------------- shuffles

METAL_FUNC ushort __metal_get_simdgroup_size(ushort) { return 32; }
MSL_ANY __metal_simd_shuffle(T v, ushort lane) { return msl_from(msl_xch(&v, sizeof(T), MSL_SHUFFLE), lane, v); }
MSL_ANY __metal_simd_broadcast(T v, ushort lane) { return __metal_simd_shuffle(v, lane); }
MSL_ANY __metal_simd_shuffle_xor(T v, ushort mask) {
  auto s = msl_xch(&v, sizeof(T), MSL_SHUFFLE_XOR);
  return msl_from(s, s->lane ^ mask, v);
}
// beyond the simdgroup the result is undefined in Metal; here it is the lane's own value
MSL_ANY __metal_simd_shuffle_down(T v, ushort delta) {
  auto s = msl_xch(&v, sizeof(T), MSL_SHUFFLE_DOWN);
  return s->lane + delta < 32 ? msl_from(s, s->lane + delta, v) : v;
}
MSL_ANY __metal_simd_shuffle_up(T v, ushort delta) {
  auto s = msl_xch(&v, sizeof(T), MSL_SHUFFLE_UP);
  return s->lane >= delta ? msl_from(s, s->lane - delta, v) : v;
}
MSL_ANY __metal_simd_shuffle_rotate_down(T v, ushort delta) {
  auto s = msl_xch(&v, sizeof(T), MSL_ROTATE_DOWN);
  return msl_from(s, (s->lane + delta) & 31, v);
}
MSL_ANY __metal_simd_shuffle_rotate_up(T v, ushort delta) {
  auto s = msl_xch(&v, sizeof(T), MSL_ROTATE_UP);
  return msl_from(s, (s->lane - delta) & 31, v);
}
MSL_ANY __metal_simd_shuffle_and_fill_down(T v, T fill, ushort delta, ushort modulo) {
  auto s = msl_xch(&v, sizeof(T), MSL_FILL_DOWN);
  uint lane = s->lane, begin = lane / modulo * modulo, from = lane - begin + delta;
  T inside = from < modulo ? msl_from(s, begin + from, v) : v;
  auto s2 = msl_xch(&fill, sizeof(T), MSL_FILL_DOWN);
  return from < modulo ? inside : msl_from(s2, begin + from - modulo, fill);
}
MSL_ANY __metal_simd_shuffle_and_fill_up(T v, T fill, ushort delta, ushort modulo) {
  auto s = msl_xch(&v, sizeof(T), MSL_FILL_UP);
  uint lane = s->lane, begin = lane / modulo * modulo;
  int from = (int)(lane - begin) - (int)delta;
  T inside = from >= 0 ? msl_from(s, begin + from, v) : v;
  auto s2 = msl_xch(&fill, sizeof(T), MSL_FILL_UP);
  return from >= 0 ? inside : msl_from(s2, begin + from + modulo, fill);
}

// ---------------------------------------------------------------- reductions and scans

MSL_ANY msl_xor(T a, T b) {
  if constexpr (is_same_v<T, float>) {
    return as_type<float>(as_type<uint>(a) ^ as_type<uint>(b));
  } else {
    return a ^ b;
  }
}
template <class T>
METAL_FUNC constexpr T msl_highest() {
  using E = typename is_vector_i<T>::elem;
  return (T)(is_floating_point_v<E> ? (E)numeric_limits<E>::infinity() : numeric_limits<E>::max());
}
template <class T>
METAL_FUNC constexpr T msl_lowest() {
  using E = typename is_vector_i<T>::elem;
  return (T)(is_floating_point_v<E> ? (E)-numeric_limits<E>::infinity() : numeric_limits<E>::min());
}

// A butterfly over lanes 16, 8, 4, 2, 1 apart. Apple's order is not published; this one is fixed.
// The first lane computes, the others take its result.
#define MSL_REDUCTION(name, neutral, combined)                                                    \
  MSL_ANY __metal_##name(T v) {                                                                   \
    auto s = msl_xch(&v, sizeof(T), MSL_REDUCE);                                                  \
    if (!s->done) {                                                                               \
      T t[32];                                                                                    \
      for (uint i = 0; i < 32; i++) t[i] = msl_present(s, i) ? msl_value<T>(s, i) : (T)(neutral); \
      for (uint half_of = 16; half_of; half_of >>= 1) {                                           \
        for (uint i = 0; i < half_of; i++) {                                                      \
          T a = t[i], b = t[i + half_of];                                                         \
          t[i] = combined;                                                                        \
        }                                                                                         \
      }                                                                                           \
      *(thread T*)s->result[0] = t[0];                                                            \
      s->done = 1;                                                                                \
    }                                                                                             \
    return *(const thread T*)s->result[0];                                                        \
  }
MSL_REDUCTION(simd_sum, 0, a + b)
MSL_REDUCTION(simd_product, 1, a* b)
MSL_REDUCTION(simd_min, msl_highest<T>(), min(a, b))
MSL_REDUCTION(simd_max, msl_lowest<T>(), max(a, b))
MSL_REDUCTION(simd_and, ~(T)0, a& b)
MSL_REDUCTION(simd_or, 0, a | b)
MSL_REDUCTION(simd_xor, 0, msl_xor(a, b))

#define MSL_PREFIX(name, neutral, combined, own) \
  MSL_ANY __metal_##name(T v) {                  \
    auto s = msl_xch(&v, sizeof(T), MSL_SCAN);   \
    T a = (T)(neutral);                          \
    for (uint i = 0; i < s->lane + own; i++) {   \
      if (!msl_present(s, i)) continue;          \
      T b = msl_value<T>(s, i);                  \
      a = combined;                              \
    }                                            \
    return a;                                    \
  }
MSL_PREFIX(simd_prefix_inclusive_sum, 0, a + b, 1)
MSL_PREFIX(simd_prefix_exclusive_sum, 0, a + b, 0)
MSL_PREFIX(simd_prefix_inclusive_product, 1, a* b, 1)
MSL_PREFIX(simd_prefix_exclusive_product, 1, a* b, 0)

// ---------------------------------------------------------------- the names that kernels use

#define MSL_UNARY(name) \
  MSL_SIMD name(T v) { return __metal_##name(v); }
#define MSL_BINARY(name) \
  MSL_SIMD name(T v, ushort a) { return __metal_##name(v, a); }
MSL_UNARY(simd_sum)
MSL_UNARY(simd_product)
MSL_UNARY(simd_min)
MSL_UNARY(simd_max)
MSL_UNARY(simd_and)
MSL_UNARY(simd_or)
MSL_UNARY(simd_xor)
MSL_UNARY(simd_prefix_inclusive_sum)
MSL_UNARY(simd_prefix_exclusive_sum)
MSL_UNARY(simd_prefix_inclusive_product)
MSL_UNARY(simd_prefix_exclusive_product)
MSL_BINARY(simd_shuffle)
MSL_BINARY(simd_broadcast)
MSL_BINARY(simd_shuffle_xor)
MSL_BINARY(simd_shuffle_down)
MSL_BINARY(simd_shuffle_up)
MSL_BINARY(simd_shuffle_rotate_down)
MSL_BINARY(simd_shuffle_rotate_up)

MSL_SIMD simd_broadcast_first(T v) {
  auto s = msl_xch(&v, sizeof(T), MSL_BROADCAST_FIRST);
  return msl_value<T>(s, __builtin_ctz(s->mask));
}
MSL_SIMD simd_shuffle_and_fill_down(T v, T fill, ushort delta, ushort modulo = 32) {
  return __metal_simd_shuffle_and_fill_down(v, fill, delta, modulo);
}
MSL_SIMD simd_shuffle_and_fill_up(T v, T fill, ushort delta, ushort modulo = 32) {
  return __metal_simd_shuffle_and_fill_up(v, fill, delta, modulo);
}

// The lanes that are here and brought something other than zero, as bits.
METAL_FUNC uint msl_votes(const thread msl_snap* s) {
  uint votes = 0;
  for (uint i = 0; i < 32; i++) votes |= msl_present(s, i) && msl_value<uint>(s, i) ? 1u << i : 0;
  return votes;
}
METAL_FUNC bool simd_all(bool b) {
  uint v = b;
  auto s = msl_xch(&v, 4, MSL_ALL);
  return msl_votes(s) == s->mask;
}
METAL_FUNC bool simd_any(bool b) {
  uint v = b;
  return msl_votes(msl_xch(&v, 4, MSL_ANY_LANE)) != 0;
}
METAL_FUNC bool simd_is_first() {
  uint v = 0;
  auto s = msl_xch(&v, 4, MSL_IS_FIRST);
  return (uint)__builtin_ctz(s->mask) == s->lane;
}
struct simd_vote {
  typedef ulong vote_t;
  ulong v;
  explicit operator ulong() const { return v; }
  bool all() const { return v == 0xffffffffu; }
  bool any() const { return v != 0; }
};
METAL_FUNC simd_vote simd_ballot(bool b) {
  uint v = b;
  return simd_vote{msl_votes(msl_xch(&v, 4, MSL_BALLOT))};
}
METAL_FUNC simd_vote simd_active_threads_mask() {
  uint v = 0;
  return simd_vote{msl_xch(&v, 4, MSL_ACTIVE)->mask};
}

// ---------------------------------------------------------------- quads

#define MSL_QUAD_REDUCTION(name, combined)             \
  MSL_SIMD name(T v) {                                 \
    auto s = msl_qxch(&v, sizeof(T), MSL_QUAD_REDUCE); \
    uint quad = s->lane & ~3u;                         \
    T a = msl_from(s, quad, v);                        \
    for (uint i = quad + 1; i < quad + 4; i++) {       \
      if (!msl_present(s, i)) continue;                \
      T b = msl_value<T>(s, i);                        \
      a = combined;                                    \
    }                                                  \
    return a;                                          \
  }
MSL_QUAD_REDUCTION(quad_sum, a + b)
MSL_QUAD_REDUCTION(quad_max, max(a, b))
MSL_QUAD_REDUCTION(quad_min, min(a, b))
MSL_QUAD_REDUCTION(quad_product, a* b)
MSL_SIMD quad_shuffle(T v, ushort lane) {
  auto s = msl_qxch(&v, sizeof(T), MSL_QUAD_SHUFFLE);
  return msl_from(s, (s->lane & ~3u) + lane, v);
}
MSL_SIMD quad_broadcast(T v, ushort lane) { return quad_shuffle(v, lane); }
MSL_SIMD quad_shuffle_xor(T v, ushort mask) {
  auto s = msl_qxch(&v, sizeof(T), MSL_QUAD_XOR);
  return msl_from(s, s->lane ^ mask, v);
}
MSL_SIMD quad_shuffle_down(T v, ushort delta) {
  auto s = msl_qxch(&v, sizeof(T), MSL_QUAD_DOWN);
  return (s->lane & 3) + delta < 4 ? msl_from(s, s->lane + delta, v) : v;
}
MSL_SIMD quad_shuffle_up(T v, ushort delta) {
  auto s = msl_qxch(&v, sizeof(T), MSL_QUAD_UP);
  return (s->lane & 3) >= delta ? msl_from(s, s->lane - delta, v) : v;
}
}  // namespace metal
