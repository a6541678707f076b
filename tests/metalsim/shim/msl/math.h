// Mathematics: explicit overloads per type, never templates, so that a call that is ambiguous in Metal is ambiguous
// here.
#pragma once

namespace metal {
#define MSL_BUILTIN1(name, expr)                                          \
  METAL_FUNC float __metal_##name(float x, bool = false) { return expr; } \
  METAL_FUNC half __metal_##name(half x, bool = false) { return (half)__metal_##name((float)x); }
#define MSL_BUILTIN2(name, expr)                                                   \
  METAL_FUNC float __metal_##name(float x, float y, bool = false) { return expr; } \
  METAL_FUNC half __metal_##name(half x, half y, bool = false) { return (half)__metal_##name((float)x, (float)y); }
#define MSL_BUILTIN3(name, expr)                                                            \
  METAL_FUNC float __metal_##name(float x, float y, float z, bool = false) { return expr; } \
  METAL_FUNC half __metal_##name(half x, half y, half z, bool = false) {                    \
    return (half)__metal_##name((float)x, (float)y, (float)z);                              \
  }
#define MSL_MAP1(name, T, N)                          \
  METAL_FUNC vec<T, N> name(vec<T, N> x) {            \
    vec<T, N> r;                                      \
    for (int i = 0; i < N; i++) r[i] = name((T)x[i]); \
    return r;                                         \
  }
#define MSL_MAP2(name, T, N)                                   \
  METAL_FUNC vec<T, N> name(vec<T, N> x, vec<T, N> y) {        \
    vec<T, N> r;                                               \
    for (int i = 0; i < N; i++) r[i] = name((T)x[i], (T)y[i]); \
    return r;                                                  \
  }
#define MSL_MAP3(name, T, N)                                            \
  METAL_FUNC vec<T, N> name(vec<T, N> x, vec<T, N> y, vec<T, N> z) {    \
    vec<T, N> r;                                                        \
    for (int i = 0; i < N; i++) r[i] = name((T)x[i], (T)y[i], (T)z[i]); \
    return r;                                                           \
  }
#define MSL_WIDTHS(M, name, T) M(name, T, 2) M(name, T, 3) M(name, T, 4)
// bfloat arguments convert to float (lower-priority template so that MLX's bf16_math.h overloads win)
#define MSL_NAME1(name)                                                 \
  METAL_FUNC float name(float x) { return ::metal::__metal_##name(x); } \
  METAL_FUNC half name(half x) { return ::metal::__metal_##name(x); }   \
  MSL_WIDTHS(MSL_MAP1, name, float)                                     \
  MSL_WIDTHS(MSL_MAP1, name, half)                                      \
  template <class B, class = enable_if_t<is_same_v<B, bfloat>>>         \
  METAL_FUNC float name(B x) {                                          \
    return name((float)x);                                              \
  }
#define MSL_NAME2(name)                                                             \
  METAL_FUNC float name(float x, float y) { return ::metal::__metal_##name(x, y); } \
  METAL_FUNC half name(half x, half y) { return ::metal::__metal_##name(x, y); }    \
  MSL_WIDTHS(MSL_MAP2, name, float)                                                 \
  MSL_WIDTHS(MSL_MAP2, name, half)
#define MSL_NAME3(name)                                                                         \
  METAL_FUNC float name(float x, float y, float z) { return ::metal::__metal_##name(x, y, z); } \
  METAL_FUNC half name(half x, half y, half z) { return ::metal::__metal_##name(x, y, z); }     \
  MSL_WIDTHS(MSL_MAP3, name, float)                                                             \
  MSL_WIDTHS(MSL_MAP3, name, half)
MSL_BUILTIN1(fabs, __builtin_fabsf(x))
MSL_BUILTIN1(acos, msl_acosf(x))
MSL_BUILTIN1(acosh, msl_acoshf(x))
MSL_BUILTIN1(asin, msl_asinf(x))
MSL_BUILTIN1(asinh, msl_asinhf(x))
MSL_BUILTIN1(atan, msl_atanf(x))
MSL_BUILTIN1(atanh, msl_atanhf(x))
MSL_BUILTIN1(ceil, __builtin_ceilf(x))
MSL_BUILTIN1(cos, msl_cosf(x))
MSL_BUILTIN1(cosh, msl_coshf(x))
MSL_BUILTIN1(cospi, msl_cosf(x * 3.14159265358979f))
MSL_BUILTIN1(exp, msl_expf(x))
MSL_BUILTIN1(exp10, msl_exp10f(x))
MSL_BUILTIN1(exp2, msl_exp2f(x))
MSL_BUILTIN1(floor, __builtin_floorf(x))
MSL_BUILTIN1(fract, __builtin_fminf(x - __builtin_floorf(x), 0.99999994f))
MSL_BUILTIN1(log, msl_logf(x))
MSL_BUILTIN1(log10, msl_log10f(x))
MSL_BUILTIN1(log2, msl_log2f(x))
MSL_BUILTIN1(rint, __builtin_rintf(x))
MSL_BUILTIN1(round, __builtin_roundf(x))
MSL_BUILTIN1(rsqrt, 1.0f / __builtin_sqrtf(x))
MSL_BUILTIN1(sin, msl_sinf(x))
MSL_BUILTIN1(sinh, msl_sinhf(x))
MSL_BUILTIN1(sinpi, msl_sinf(x * 3.14159265358979f))
MSL_BUILTIN1(sqrt, __builtin_sqrtf(x))
MSL_BUILTIN1(tan, msl_tanf(x))
MSL_BUILTIN1(tanh, msl_tanhf(x))
MSL_BUILTIN1(tanpi, msl_tanf(x * 3.14159265358979f))
MSL_BUILTIN1(trunc, __builtin_truncf(x))
MSL_BUILTIN1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))
MSL_BUILTIN1(sign, x > 0.0f ? 1.0f : (x < 0.0f ? -1.0f : x))
MSL_BUILTIN2(atan2, msl_atan2f(x, y))
MSL_BUILTIN2(divide, x / y)
MSL_BUILTIN2(fmax, __builtin_fmaxf(x, y))
MSL_BUILTIN2(fmin, __builtin_fminf(x, y))
MSL_BUILTIN2(fmod, msl_fmodf(x, y))
MSL_BUILTIN2(nextafter, msl_nextafterf(x, y))
MSL_BUILTIN2(pow, msl_powf(x, y))
MSL_BUILTIN2(powr, msl_powf(x, y))
MSL_BUILTIN2(copysign, __builtin_copysignf(x, y))
MSL_BUILTIN2(fdim, x > y ? x - y : 0.0f)
MSL_BUILTIN2(step, y < x ? 0.0f : 1.0f)
MSL_BUILTIN3(fma, __builtin_fmaf(x, y, z))
MSL_BUILTIN3(fmax3, __builtin_fmaxf(__builtin_fmaxf(x, y), z))
MSL_BUILTIN3(fmin3, __builtin_fminf(__builtin_fminf(x, y), z))
MSL_BUILTIN3(fmedian3, __builtin_fmaxf(__builtin_fminf(x, y), __builtin_fminf(__builtin_fmaxf(x, y), z)))
MSL_BUILTIN3(mix, x + (y - x) * z)
METAL_FUNC float __metal_frexp(float x, thread int* e) { return msl_frexpf(x, e); }
METAL_FUNC float __metal_ldexp(float x, int k, bool = false) { return msl_ldexpf(x, k); }
#define MSL_ALL_NAMES()                                                          \
  MSL_NAME1(acos)                                                                \
  MSL_NAME1(acosh)                                                               \
  MSL_NAME1(asin)                                                                \
  MSL_NAME1(asinh)                                                               \
  MSL_NAME1(atan)                                                                \
  MSL_NAME1(atanh)                                                               \
  MSL_NAME1(ceil)                                                                \
  MSL_NAME1(cos)                                                                 \
  MSL_NAME1(cosh)                                                                \
  MSL_NAME1(cospi)                                                               \
  MSL_NAME1(exp)                                                                 \
  MSL_NAME1(exp10)                                                               \
  MSL_NAME1(exp2)                                                                \
  MSL_NAME1(fabs)                                                                \
  MSL_NAME1(floor)                                                               \
  MSL_NAME1(fract)                                                               \
  MSL_NAME1(log)                                                                 \
  MSL_NAME1(log10)                                                               \
  MSL_NAME1(log2)                                                                \
  MSL_NAME1(rint)                                                                \
  MSL_NAME1(round)                                                               \
  MSL_NAME1(rsqrt)                                                               \
  MSL_NAME1(sin)                                                                 \
  MSL_NAME1(sinh)                                                                \
  MSL_NAME1(sinpi)                                                               \
  MSL_NAME1(sqrt)                                                                \
  MSL_NAME1(tan)                                                                 \
  MSL_NAME1(tanh)                                                                \
  MSL_NAME1(tanpi)                                                               \
  MSL_NAME1(trunc)                                                               \
  MSL_NAME1(saturate)                                                            \
  MSL_NAME1(sign)                                                                \
  MSL_NAME2(atan2)                                                               \
  MSL_NAME2(divide)                                                              \
  MSL_NAME2(fmax)                                                                \
  MSL_NAME2(fmin)                                                                \
  MSL_NAME2(fmod)                                                                \
  MSL_NAME2(nextafter)                                                           \
  MSL_NAME2(pow)                                                                 \
  MSL_NAME2(powr)                                                                \
  MSL_NAME2(copysign)                                                            \
  MSL_NAME2(fdim)                                                                \
  MSL_NAME2(step)                                                                \
  MSL_NAME3(fma)                                                                 \
  MSL_NAME3(fmax3)                                                               \
  MSL_NAME3(fmin3)                                                               \
  MSL_NAME3(fmedian3)                                                            \
  MSL_NAME3(mix)                                                                 \
  METAL_FUNC float ldexp(float x, int k) { return msl_ldexpf(x, k); }            \
  METAL_FUNC half ldexp(half x, int k) { return (half)msl_ldexpf((float)x, k); } \
  METAL_FUNC float frexp(float x, thread int& e) { return msl_frexpf(x, &e); }   \
  METAL_FUNC float sincos(float x, thread float& c) {                            \
    c = msl_cosf(x);                                                             \
    return msl_sinf(x);                                                          \
  }                                                                              \
  METAL_FUNC float modf(float x, thread float& ip) {                             \
    ip = __builtin_truncf(x);                                                    \
    return x - ip;                                                               \
  }
MSL_ALL_NAMES()
// min/max/clamp/abs: explicit overloads, so that mixed-type calls are ambiguous exactly as in Metal
#define MSL_INTEGER_MINMAX(T)                                                   \
  METAL_FUNC constexpr T min(T x, T y) { return y < x ? y : x; }                \
  METAL_FUNC constexpr T max(T x, T y) { return x < y ? y : x; }                \
  METAL_FUNC constexpr T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); } \
  METAL_FUNC constexpr T min3(T x, T y, T z) { return min(x, min(y, z)); }      \
  METAL_FUNC constexpr T max3(T x, T y, T z) { return max(x, max(y, z)); }      \
  MSL_WIDTHS(MSL_MAP2, min, T)                                                  \
  MSL_WIDTHS(MSL_MAP2, max, T)                                                  \
  MSL_WIDTHS(MSL_MAP3, clamp, T)
MSL_INTEGER_MINMAX(char)
MSL_INTEGER_MINMAX(uchar)
MSL_INTEGER_MINMAX(short)
MSL_INTEGER_MINMAX(ushort)
MSL_INTEGER_MINMAX(int)
MSL_INTEGER_MINMAX(uint)
MSL_INTEGER_MINMAX(long)
MSL_INTEGER_MINMAX(ulong)
#define MSL_FLOAT_MINMAX(T)                                                             \
  METAL_FUNC T min(T x, T y) { return __metal_fmin(x, y); }                             \
  METAL_FUNC T max(T x, T y) { return __metal_fmax(x, y); }                             \
  METAL_FUNC T clamp(T x, T lo, T hi) { return __metal_fmin(__metal_fmax(x, lo), hi); } \
  METAL_FUNC T min3(T x, T y, T z) { return min(x, min(y, z)); }                        \
  METAL_FUNC T max3(T x, T y, T z) { return max(x, max(y, z)); }                        \
  METAL_FUNC T abs(T x) { return __metal_fabs(x); }                                     \
  MSL_WIDTHS(MSL_MAP2, min, T)                                                          \
  MSL_WIDTHS(MSL_MAP2, max, T)                                                          \
  MSL_WIDTHS(MSL_MAP3, clamp, T)                                                        \
  MSL_WIDTHS(MSL_MAP1, abs, T)
MSL_FLOAT_MINMAX(float)
MSL_FLOAT_MINMAX(half)
#define MSL_ABS(T) \
  METAL_FUNC constexpr T abs(T x) { return x < 0 ? (T) - x : x; }
MSL_ABS(char)
MSL_ABS(short)
MSL_ABS(int)
MSL_ABS(long)
#define MSL_UNSIGNED_ABS(T) \
  METAL_FUNC constexpr T abs(T x) { return x; }
MSL_UNSIGNED_ABS(uchar)
MSL_UNSIGNED_ABS(ushort)
MSL_UNSIGNED_ABS(uint)
MSL_UNSIGNED_ABS(ulong)
METAL_FUNC bool isnan(float x) { return x != x; }
METAL_FUNC bool isnan(half x) { return x != x; }
METAL_FUNC bool isinf(float x) { return __builtin_fabsf(x) == __builtin_inff(); }
METAL_FUNC bool isinf(half x) { return isinf((float)x); }
METAL_FUNC bool isfinite(float x) { return __builtin_fabsf(x) < __builtin_inff(); }
METAL_FUNC bool isfinite(half x) { return isfinite((float)x); }
METAL_FUNC bool signbit(float x) { return as_type<uint>(x) >> 31; }
METAL_FUNC bool signbit(half x) { return as_type<ushort>(x) >> 15; }
template <class B, class = enable_if_t<is_same_v<B, bfloat>>>
METAL_FUNC bool isnan(B x) {
  return isnan((float)x);
}
template <class B, class = enable_if_t<is_same_v<B, bfloat>>>
METAL_FUNC bool isinf(B x) {
  return isinf((float)x);
}
template <class B, class = enable_if_t<is_same_v<B, bfloat>>>
METAL_FUNC bool isfinite(B x) {
  return isfinite((float)x);
}
template <class B, class = enable_if_t<is_same_v<B, bfloat>>>
METAL_FUNC bool signbit(B x) {
  return signbit((float)x);
}
#define MSL_SELECT(T) \
  METAL_FUNC constexpr T select(T a, T b, bool c) { return c ? b : a; }
MSL_SELECT(bool)
MSL_SELECT(char)
MSL_SELECT(uchar)
MSL_SELECT(short)
MSL_SELECT(ushort)
MSL_SELECT(int)
MSL_SELECT(uint)
MSL_SELECT(long)
MSL_SELECT(ulong)
MSL_SELECT(half)
MSL_SELECT(float)
MSL_SELECT(bfloat)
template <class T, int N, class C>
METAL_FUNC vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<C, N> c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = c[i] ? b[i] : a[i];
  return r;
}
template <class C, int N>
METAL_FUNC bool any(vec<C, N> c) {
  bool r = false;
  for (int i = 0; i < N; i++) r |= (c[i] != 0);
  return r;
}
template <class C, int N>
METAL_FUNC bool all(vec<C, N> c) {
  bool r = true;
  for (int i = 0; i < N; i++) r &= (c[i] != 0);
  return r;
}
METAL_FUNC bool any(bool x) { return x; }
METAL_FUNC bool all(bool x) { return x; }
#define MSL_DOT(T, N)                                                               \
  METAL_FUNC T dot(vec<T, N> a, vec<T, N> b) {                                      \
    T s = a[0] * b[0];                                                              \
    for (int i = 1; i < N; i++) s += a[i] * b[i];                                   \
    return s;                                                                       \
  }                                                                                 \
  METAL_FUNC T length(vec<T, N> a) { return (T)__builtin_sqrtf((float)dot(a, a)); } \
  METAL_FUNC vec<T, N> normalize(vec<T, N> a) { return a * (T)(1.0f / __builtin_sqrtf((float)dot(a, a))); }
MSL_DOT(float, 2)
MSL_DOT(float, 3)
MSL_DOT(float, 4)
MSL_DOT(half, 2)
MSL_DOT(half, 3)
MSL_DOT(half, 4)
namespace precise {
MSL_ALL_NAMES()
}
namespace fast {
MSL_ALL_NAMES()
}
}  // namespace metal
