// Atomics, carried out by the runtime: kernel threads share one host thread, so an operation is a plain read and write.
// All memory orders are alike here; threads are sequentially consistent.
#pragma once

namespace metal {
enum memory_order {
  memory_order_relaxed,
  memory_order_acquire,
  memory_order_release,
  memory_order_acq_rel,
  memory_order_seq_cst,
};
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };
METAL_FUNC void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device) {}

template <class T>
struct atomic {
  T v;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;
typedef atomic<ulong> atomic_ulong;

// the numbers of `enum Atomic` in runtime/callbacks.cpp
enum msl_atomic_operation : uint {
  MSL_LOAD,
  MSL_STORE,
  MSL_EXCHANGE,
  MSL_COMPARE,
  MSL_ADD,
  MSL_SUB,
  MSL_AND,
  MSL_OR,
  MSL_XOR,
  MSL_MIN,
  MSL_MAX,
};

template <class T>
METAL_FUNC ulong msl_bits(T v) {
  if constexpr (sizeof(T) == 8) {
    return as_type<ulong>(v);
  } else if constexpr (sizeof(T) == 4) {
    return as_type<uint>(v);
  } else {
    return (ulong)v;
  }
}
template <class T>
METAL_FUNC T msl_unbits(ulong bits) {
  if constexpr (sizeof(T) == 8) {
    return as_type<T>(bits);
  } else if constexpr (sizeof(T) == 4) {
    return as_type<T>((uint)bits);
  } else {
    return (T)bits;
  }
}
// how the runtime is to read the bits: 0 unsigned, 1 signed, 2 float
template <class T>
METAL_FUNC constexpr uint msl_number() {
  return (is_floating_point_v<T> ? 2u : is_signed_v<T> ? 1u : 0u) << 8;
}
// the value's type follows from the pointer's
template <class T>
struct msl_same {
  typedef T type;
};

#define MSL_FETCH(name, operation, SPACE)                                                                       \
  template <class T>                                                                                            \
  METAL_FUNC T atomic_fetch_##name##_explicit(SPACE atomic<T>* p, typename msl_same<T>::type v, memory_order) { \
    return msl_unbits<T>(msl_atomic((ulong)p, sizeof(T), operation | msl_number<T>(), msl_bits<T>(v), 0));      \
  }
#define MSL_ATOMIC(SPACE)                                                                                          \
  template <class T>                                                                                               \
  METAL_FUNC T atomic_load_explicit(const SPACE atomic<T>* p, memory_order) {                                      \
    return msl_unbits<T>(msl_atomic((ulong)p, sizeof(T), MSL_LOAD, 0, 0));                                         \
  }                                                                                                                \
  template <class T>                                                                                               \
  METAL_FUNC void atomic_store_explicit(SPACE atomic<T>* p, T v, memory_order) {                                   \
    msl_atomic((ulong)p, sizeof(T), MSL_STORE, msl_bits<T>(v), 0);                                                 \
  }                                                                                                                \
  template <class T>                                                                                               \
  METAL_FUNC T atomic_exchange_explicit(SPACE atomic<T>* p, T v, memory_order) {                                   \
    return msl_unbits<T>(msl_atomic((ulong)p, sizeof(T), MSL_EXCHANGE, msl_bits<T>(v), 0));                        \
  }                                                                                                                \
  template <class T>                                                                                               \
  METAL_FUNC bool atomic_compare_exchange_weak_explicit(SPACE atomic<T>* p, thread T* expected, T v, memory_order, \
                                                        memory_order) {                                            \
    ulong wanted = msl_bits<T>(*expected);                                                                         \
    ulong old = msl_atomic((ulong)p, sizeof(T), MSL_COMPARE, msl_bits<T>(v), wanted);                              \
    *expected = msl_unbits<T>(old);                                                                                \
    return old == wanted;                                                                                          \
  }                                                                                                                \
  MSL_FETCH(add, MSL_ADD, SPACE)                                                                                   \
  MSL_FETCH(sub, MSL_SUB, SPACE)                                                                                   \
  MSL_FETCH(and, MSL_AND, SPACE)                                                                                   \
  MSL_FETCH(or, MSL_OR, SPACE)                                                                                     \
  MSL_FETCH(xor, MSL_XOR, SPACE)                                                                                   \
  MSL_FETCH(min, MSL_MIN, SPACE)                                                                                   \
  MSL_FETCH(max, MSL_MAX, SPACE)
MSL_ATOMIC(device)
MSL_ATOMIC(threadgroup)
MSL_ATOMIC(volatile device)
MSL_ATOMIC(volatile threadgroup)
}  // namespace metal
