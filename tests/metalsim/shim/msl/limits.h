// metal::numeric_limits.
#pragma once

namespace metal {
template <class T>
struct numeric_limits;
#define MSL_INTEGER_LIMITS(T, MN, MX, SG, D)                          \
  template <>                                                         \
  struct numeric_limits<T> {                                          \
    static constexpr constant bool is_integer = true, is_signed = SG; \
    static constexpr constant int digits = D;                         \
    static constexpr T max() { return MX; }                           \
    static constexpr T min() { return MN; }                           \
    static constexpr T lowest() { return MN; }                        \
    static constexpr T infinity() { return 0; }                       \
    static constexpr T quiet_NaN() { return 0; }                      \
    static constexpr T epsilon() { return 0; }                        \
  };
MSL_INTEGER_LIMITS(bool, 0, 1, false, 1)
MSL_INTEGER_LIMITS(char, -128, 127, true, 7)
MSL_INTEGER_LIMITS(signed char, -128, 127, true, 7)
MSL_INTEGER_LIMITS(uchar, 0, 255, false, 8)
MSL_INTEGER_LIMITS(short, -32768, 32767, true, 15)
MSL_INTEGER_LIMITS(ushort, 0, 65535, false, 16)
MSL_INTEGER_LIMITS(int, (-2147483647 - 1), 2147483647, true, 31)
MSL_INTEGER_LIMITS(uint, 0u, 4294967295u, false, 32)
MSL_INTEGER_LIMITS(long, (-9223372036854775807L - 1), 9223372036854775807L, true, 63)
MSL_INTEGER_LIMITS(ulong, 0ul, 18446744073709551615ul, false, 64)
#define MSL_FLOAT_LIMITS(T, MX, MN, EPS, D)                              \
  template <>                                                            \
  struct numeric_limits<T> {                                             \
    static constexpr constant bool is_integer = false, is_signed = true; \
    static constexpr constant int digits = D;                            \
    static constexpr T max() { return T(MX); }                           \
    static constexpr T min() { return T(MN); }                           \
    static constexpr T lowest() { return T(-MX); }                       \
    static constexpr T infinity() { return T(__builtin_inff()); }        \
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); }     \
    static constexpr T signaling_NaN() { return T(__builtin_nanf("")); } \
    static constexpr T epsilon() { return T(EPS); }                      \
    static constexpr T denorm_min() { return T(0); }                     \
  };
MSL_FLOAT_LIMITS(float, 3.402823466e+38f, 1.175494351e-38f, 1.1920929e-07f, 24)
MSL_FLOAT_LIMITS(half, 65504.0f, 6.103515625e-05f, 9.765625e-04f, 11)
MSL_FLOAT_LIMITS(bfloat, 3.3895313892515355e+38f, 1.175494351e-38f, 7.8125e-03f, 8)
}  // namespace metal
