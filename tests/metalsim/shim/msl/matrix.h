// 8x8 matrices spread over a simdgroup: two neighbouring elements of a row per lane.
//
// Which lane holds which element is private to Apple; this is the layout that MLX's steel kernels rely on.
#pragma once

namespace metal {
METAL_FUNC constexpr uint msl_matrix_row(uint lane) { return ((lane / 4) & 4) + ((lane / 2) % 4); }
METAL_FUNC constexpr uint msl_matrix_column(uint lane) { return ((lane / 4) & 2) * 2 + (lane % 2) * 2; }
METAL_FUNC constexpr uint msl_matrix_lane(uint row, uint column) {
  return ((row & 4) << 2) | ((column & 4) << 1) | ((row & 3) << 1) | ((column >> 1) & 1);
}
// All lanes must come to a matrix operation. Returns this lane's index.
METAL_FUNC uint msl_matrix_gather(uint operation) {
  uint nothing = 0;
  auto s = msl_xch(&nothing, 4, operation);
  if (s->mask != 0xffffffffu) msl_bad_lane(__builtin_ctz(~s->mask));
  return s->lane;
}

template <class T, int R, int C>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "Metal has 8x8 matrices only");
  vec<T, 2> e;
  thread vec<T, 2>& thread_elements() thread { return e; }
  const thread vec<T, 2>& thread_elements() const thread { return e; }
  simdgroup_matrix() {}
  explicit simdgroup_matrix(T diagonal) {
    uint lane = msl_matrix_gather(MSL_MATRIX);
    e[0] = msl_matrix_row(lane) == msl_matrix_column(lane) ? diagonal : T(0);
    e[1] = msl_matrix_row(lane) == msl_matrix_column(lane) + 1 ? diagonal : T(0);
  }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int R, int C>
METAL_FUNC simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, R, C> m;
  m.e[0] = value;
  m.e[1] = value;
  return m;
}

// Products are summed in float, in the order of k. Apple's precision and order are not published.
template <class TD, class TA, class TB, class TC>
METAL_FUNC void simdgroup_multiply_accumulate(thread simdgroup_matrix<TD, 8, 8>& D,
                                              thread simdgroup_matrix<TA, 8, 8>& A,
                                              thread simdgroup_matrix<TB, 8, 8>& B,
                                              thread simdgroup_matrix<TC, 8, 8>& C) {
  struct Pair {
    vec<TA, 2> a;
    vec<TB, 2> b;
  } pair;
  pair.a = A.e;
  pair.b = B.e;
  auto s = msl_xch(&pair, sizeof(Pair), MSL_MATRIX_MULTIPLY);
  if (s->mask != 0xffffffffu) msl_bad_lane(__builtin_ctz(~s->mask));
  uint row = msl_matrix_row(s->lane), column = msl_matrix_column(s->lane);
  float left = (float)C.e[0], right = (float)C.e[1];
  for (uint k = 0; k < 8; k++) {
    float a = (float)((const thread Pair*)s->slot[msl_matrix_lane(row, k)])->a[k & 1];
    auto b = ((const thread Pair*)s->slot[msl_matrix_lane(k, column)])->b;
    left += a * (float)b[0];
    right += a * (float)b[1];
  }
  D.e[0] = (TD)left;
  D.e[1] = (TD)right;
}
template <class TD, class TA, class TB>
METAL_FUNC void simdgroup_multiply(thread simdgroup_matrix<TD, 8, 8>& D, thread simdgroup_matrix<TA, 8, 8>& A,
                                   thread simdgroup_matrix<TB, 8, 8>& B) {
  simdgroup_matrix<float, 8, 8> zero;
  zero.e = (vec<float, 2>)(0.0f);
  simdgroup_multiply_accumulate(D, A, B, zero);
}
template <class T>
METAL_FUNC simdgroup_matrix<T, 8, 8> operator*(simdgroup_matrix<T, 8, 8> a, simdgroup_matrix<T, 8, 8> b) {
  simdgroup_matrix<T, 8, 8> d;
  simdgroup_multiply(d, a, b);
  return d;
}

#define MSL_MATRIX_MEMORY(SPACE)                                                                           \
  template <class T>                                                                                       \
  METAL_FUNC void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& m, const SPACE T* p, ulong stride = 8,  \
                                 ulong2 origin = ulong2{0, 0}, bool transpose = false) {                   \
    uint lane = msl_matrix_gather(MSL_MATRIX_LOAD);                                                        \
    ulong row = msl_matrix_row(lane), column = msl_matrix_column(lane);                                    \
    p += origin.y * stride + origin.x;                                                                     \
    m.e[0] = transpose ? p[column * stride + row] : p[row * stride + column];                              \
    m.e[1] = transpose ? p[(column + 1) * stride + row] : p[row * stride + column + 1];                    \
  }                                                                                                        \
  template <class T>                                                                                       \
  METAL_FUNC void simdgroup_store(thread const simdgroup_matrix<T, 8, 8>& m, SPACE T* p, ulong stride = 8, \
                                  ulong2 origin = ulong2{0, 0}, bool transpose = false) {                  \
    uint lane = msl_matrix_gather(MSL_MATRIX_STORE);                                                       \
    ulong row = msl_matrix_row(lane), column = msl_matrix_column(lane);                                    \
    p += origin.y * stride + origin.x;                                                                     \
    p[transpose ? column * stride + row : row * stride + column] = m.e[0];                                 \
    p[transpose ? (column + 1) * stride + row : row * stride + column + 1] = m.e[1];                       \
  }
MSL_MATRIX_MEMORY(device)
MSL_MATRIX_MEMORY(threadgroup)
}  // namespace metal
