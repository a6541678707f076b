// as_type, and vector constructors as functions: rewrite.py turns `float4(a, b)` into `msl_ctor<float4>(a, b)`.
#pragma once

template <class To, class From>
constexpr METAL_FUNC To as_type(From f) {
  static_assert(sizeof(To) == sizeof(From), "as_type size mismatch");
  return __builtin_bit_cast(To, f);
}

// Components of the arguments, one after the other; or one scalar for all; or none for zeros.
template <class V, class... A>
constexpr METAL_FUNC bool msl_fits() {
  constexpr int given = (0 + ... + metal::is_vector_i<A>::n);
  if constexpr (!metal::is_vector_i<V>::value) {
    return sizeof...(A) <= 1;
  } else {
    return given == metal::is_vector_i<V>::n || given == 0 || (given == 1 && sizeof...(A) == 1);
  }
}

template <class V, class A>
METAL_FUNC constexpr int msl_put(thread V& made, int at, A a) {
  using E = typename metal::is_vector_i<V>::elem;
  if constexpr (metal::is_vector_i<A>::value) {
    for (int j = 0; j < metal::is_vector_i<A>::n; j++) made[at + j] = (E)a[j];
  } else {
    made[at] = (E)a;
  }
  return at + metal::is_vector_i<A>::n;
}

template <class V, class... A, class = metal::enable_if_t<msl_fits<V, A...>()>>
METAL_FUNC constexpr V msl_ctor(A... a) {
  if constexpr (!metal::is_vector_i<V>::value) {
    return V(a...);
  } else {
    using E = typename metal::is_vector_i<V>::elem;
    constexpr int n = metal::is_vector_i<V>::n;
    if constexpr (sizeof...(A) == 0) {
      return V{};
    } else if constexpr (sizeof...(A) == 1) {
      if constexpr ((metal::is_vector_i<A>::value && ...)) {
        return __builtin_convertvector((a, ...), V);
      } else {
        return (V)((E)(a, ...));
      }
    } else if constexpr (sizeof...(A) == n) {  // usable in constants, which element-wise writing is not
      return V{(E)a...};
    } else {
      V made;
      int at = 0;
      ((at = msl_put(made, at, a)), ...);
      return made;
    }
  }
}
