// Type traits that know address spaces.
#pragma once

namespace metal {
typedef decltype(nullptr) nullptr_t;
template <class T, T v>
struct integral_constant {
  static constexpr constant T value = v;
  typedef T value_type;
  typedef integral_constant type;
  constexpr operator T() const { return v; }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;
template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class T, class F>
struct conditional {
  typedef T type;
};
template <class T, class F>
struct conditional<false, T, F> {
  typedef F type;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;
template <class A, class B>
struct is_same : false_type {};
template <class A>
struct is_same<A, A> : true_type {};
template <class A, class B>
constexpr constant bool is_same_v = is_same<A, B>::value;
template <class T>
struct remove_addrspace {
  typedef T type;
};
template <class T>
struct remove_addrspace<thread T> {
  typedef T type;
};
template <class T>
struct remove_addrspace<device T> {
  typedef T type;
};
template <class T>
struct remove_addrspace<constant T> {
  typedef T type;
};
template <class T>
struct remove_addrspace<threadgroup T> {
  typedef T type;
};
template <class T>
struct remove_addrspace<const thread T> {
  typedef const T type;
};
template <class T>
struct remove_addrspace<const device T> {
  typedef const T type;
};
template <class T>
struct remove_addrspace<const constant T> {
  typedef const T type;
};
template <class T>
struct remove_addrspace<const threadgroup T> {
  typedef const T type;
};
template <class T>
using remove_addrspace_t = typename remove_addrspace<T>::type;
template <class T>
struct remove_reference {
  typedef T type;
};
template <class T>
struct remove_reference<thread T&> {
  typedef T type;
};
template <class T>
struct remove_reference<device T&> {
  typedef T type;
};
template <class T>
struct remove_reference<constant T&> {
  typedef T type;
};
template <class T>
struct remove_reference<threadgroup T&> {
  typedef T type;
};
template <class T>
using remove_reference_t = typename remove_reference<T>::type;
template <class T>
struct remove_cv0 {
  typedef T type;
};
template <class T>
struct remove_cv0<const T> {
  typedef T type;
};
template <class T>
struct remove_cv0<volatile T> {
  typedef T type;
};
template <class T>
struct remove_cv0<const volatile T> {
  typedef T type;
};
template <class T>
struct remove_cv {
  typedef typename remove_cv0<remove_addrspace_t<T>>::type type;
};
template <class T>
using remove_cv_t = typename remove_cv<T>::type;
template <class T>
struct remove_const {
  typedef T type;
};
template <class T>
struct remove_const<const T> {
  typedef T type;
};
template <class T>
using remove_const_t = typename remove_const<T>::type;
template <class T>
struct remove_pointer {
  typedef T type;
};
template <class T>
struct remove_pointer<device T*> {
  typedef T type;
};
template <class T>
struct remove_pointer<thread T*> {
  typedef T type;
};
template <class T>
struct remove_pointer<constant T*> {
  typedef T type;
};
template <class T>
struct remove_pointer<threadgroup T*> {
  typedef T type;
};
template <class T>
using remove_pointer_t = typename remove_pointer<T>::type;
template <class A, class B>
struct is_convertible : bool_constant<__is_convertible_to(A, B)> {};
template <class A, class B>
constexpr constant bool is_convertible_v = is_convertible<A, B>::value;
template <class T>
struct is_integral_i : false_type {};
#define MSL_INTEGRAL(T) \
  template <>           \
  struct is_integral_i<T> : true_type {};
MSL_INTEGRAL(bool)
MSL_INTEGRAL(char)
MSL_INTEGRAL(signed char)
MSL_INTEGRAL(uchar)
MSL_INTEGRAL(short)
MSL_INTEGRAL(ushort)
MSL_INTEGRAL(int)
MSL_INTEGRAL(uint)
MSL_INTEGRAL(long)
MSL_INTEGRAL(ulong)
#undef MSL_INTEGRAL
template <class T>
struct is_integral : bool_constant<is_integral_i<remove_cv_t<T>>::value> {};
template <class T>
constexpr constant bool is_integral_v = is_integral<T>::value;
template <class T>
struct is_floating_point : bool_constant<is_same_v<remove_cv_t<T>, float> || is_same_v<remove_cv_t<T>, half> ||
                                         is_same_v<remove_cv_t<T>, bfloat>> {};
template <class T>
constexpr constant bool is_floating_point_v = is_floating_point<T>::value;
template <class T>
struct is_arithmetic : bool_constant<is_integral_v<T> || is_floating_point_v<T>> {};
template <class T>
constexpr constant bool is_arithmetic_v = is_arithmetic<T>::value;
template <class T>
struct is_signed : bool_constant<is_arithmetic_v<T> && (T(-1) < T(0))> {};
template <class T>
constexpr constant bool is_signed_v = is_signed<T>::value;
template <class T>
struct is_unsigned : bool_constant<is_integral_v<T> && !(T(-1) < T(0))> {};
template <class T>
constexpr constant bool is_unsigned_v = is_unsigned<T>::value;
template <class T>
struct is_enum : bool_constant<__is_enum(T)> {};
template <class T>
struct make_unsigned {
  typedef T type;
};
template <>
struct make_unsigned<char> {
  typedef uchar type;
};
template <>
struct make_unsigned<signed char> {
  typedef uchar type;
};
template <>
struct make_unsigned<short> {
  typedef ushort type;
};
template <>
struct make_unsigned<int> {
  typedef uint type;
};
template <>
struct make_unsigned<long> {
  typedef ulong type;
};
template <class T>
using make_unsigned_t = typename make_unsigned<T>::type;
template <class T>
struct is_vector_i : false_type {
  typedef T elem;
  static constexpr constant int n = 1;
};
template <class T, int N>
struct is_vector_i<vec<T, N>> : true_type {
  typedef T elem;
  static constexpr constant int n = N;
};
template <class T>
T declval_();
template <class T, size_t N>
struct array {
  T elems[N];
  constexpr thread T& operator[](size_t i) thread { return elems[i]; }
  constexpr const thread T& operator[](size_t i) const thread { return elems[i]; }
  constexpr const constant T& operator[](size_t i) const constant { return elems[i]; }
  constexpr const threadgroup T& operator[](size_t i) const threadgroup { return elems[i]; }
  constexpr threadgroup T& operator[](size_t i) threadgroup { return elems[i]; }
  constexpr size_t size() const { return N; }
};

template <class... B>
struct msl_disjunction : false_type {};
template <class A, class... B>
struct msl_disjunction<A, B...> : conditional_t<A::value, A, msl_disjunction<B...>> {};
template <class... B>
struct disjunction : msl_disjunction<B...> {};
template <class... B>
constexpr constant bool disjunction_v = disjunction<B...>::value;

template <class T>
using uniform = T;
template <class T>
METAL_FUNC constexpr T make_uniform(T x) {
  return x;
}
}  // namespace metal
