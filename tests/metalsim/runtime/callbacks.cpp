// What instrumented kernels call: before each load and store (ASan's names), at a failed check (UBSan's names), and
// for atomics and mathematics (the shim's names).
#include <algorithm>
#include <cmath>
#include <cstring>

#include "state.h"

#define CALLER ((u64)__builtin_return_address(0))

// ---------------------------------------------------------------- loads and stores

namespace {
void report_misaligned(u64 address, u32 alignment, u64 pc) {
  Place place{-1, address, alignment};
  if (find_memory(address, &place.memory, &place.offset)) report(MISALIGNED, pc, place);
  if (alignment >= 16) abort_dispatch();  // the CPU may trap
}

// ASan calls these for a size only where the type promises that alignment, of which it looks at 8 bytes at most.
void sized_access(u64 at, u64 size, bool write, u64 pc) {
  if (at % std::min<u64>(size, 8) && current) report_misaligned(at, std::min<u64>(size, 8), pc);
  access(at, size, write, pc);
}
}  // namespace

#define SIZED(N)                                                                           \
  extern "C" void __asan_load##N##_noabort(u64 at) { sized_access(at, N, false, CALLER); } \
  extern "C" void __asan_store##N##_noabort(u64 at) { sized_access(at, N, true, CALLER); }
SIZED(1)
SIZED(2)
SIZED(4)
SIZED(8)
SIZED(16)

extern "C" {
void __asan_loadN_noabort(u64 at, u64 size) { access(at, size, false, CALLER); }
void __asan_storeN_noabort(u64 at, u64 size) { access(at, size, true, CALLER); }
void __asan_handle_no_return() {}

void* __asan_memcpy(void* to, const void* from, u64 size) {
  if (size) access((u64)from, size, false, CALLER);
  if (size) access((u64)to, size, true, CALLER);
  return memcpy(to, from, size);
}
void* __asan_memmove(void* to, const void* from, u64 size) {
  if (size) access((u64)from, size, false, CALLER);
  if (size) access((u64)to, size, true, CALLER);
  return memmove(to, from, size);
}
void* __asan_memset(void* to, int value, u64 size) {
  if (size) access((u64)to, size, true, CALLER);
  return memset(to, value, size);
}
}

// ---------------------------------------------------------------- failed checks

namespace {
// the part of UBSan's own structures that is read here
struct SourceLocation {
  const char* file;
  u32 line, column;
};
struct TypeMismatch {
  SourceLocation location;
  const void* type;
  u8 log_alignment, check_kind;
};
}  // namespace

extern "C" {
void __ubsan_handle_type_mismatch_v1(const TypeMismatch* data, u64 address) {
  u32 alignment = 1u << data->log_alignment;
  if (address % alignment && current) report_misaligned(address, alignment, CALLER);
}
void __ubsan_handle_out_of_bounds(const void*, u64 index) { report(ARRAY_OUT_OF_BOUNDS, CALLER, {-1, index, 0}); }
void __ubsan_handle_divrem_overflow(const void*, u64, u64) {
  report(DIVISION_BY_ZERO, CALLER, {});
  abort_dispatch();  // the CPU would trap
}
}

// ---------------------------------------------------------------- atomics

namespace {
enum Atomic : u32 { LOAD, STORE, EXCHANGE, COMPARE, ADD, SUB, AND, OR, XOR, MIN, MAX };
enum Number : u32 { UNSIGNED, SIGNED, FLOAT };
constexpr u64 LOADS_BEFORE_YIELD = 16;  // a thread that spins lets the others run

float as_float(u64 bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
u64 as_bits(float value) {
  u32 bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

u64 combine_float(u32 operation, float old, float value) {
  switch (operation) {
    case ADD: return as_bits(old + value);
    case SUB: return as_bits(old - value);
    case MIN: return as_bits(std::fmin(old, value));
    default: return as_bits(std::fmax(old, value));
  }
}

u64 combine_signed(u32 operation, u32 size, u64 old, u64 value) {
  int64_t a = size == 4 ? int32_t(old) : int64_t(old), b = size == 4 ? int32_t(value) : int64_t(value);
  return u64(operation == MIN ? std::min(a, b) : std::max(a, b));
}

u64 combine(u32 operation, u32 number, u32 size, u64 old, u64 value) {
  switch (operation) {
    case AND: return old & value;
    case OR: return old | value;
    case XOR: return old ^ value;
    default: break;
  }
  if (number == FLOAT) return combine_float(operation, as_float(old), as_float(value));
  switch (operation) {
    case ADD: return old + value;
    case SUB: return old - value;
    default: break;
  }
  if (number == SIGNED) return combine_signed(operation, size, old, value);
  return operation == MIN ? std::min(old, value) : std::max(old, value);
}
}  // namespace

extern "C" u64 msl_atomic(u64 address, u32 size, u32 operation_and_number, u64 value, u64 expected) {
  u32 operation = operation_and_number & 255, number = operation_and_number >> 8;
  launch->atomics++;
  access(address, size, operation != LOAD, CALLER, true);
  u64 old = 0;
  memcpy(&old, (void*)address, size);
  if (operation == LOAD) {
    if (launch->atomics % LOADS_BEFORE_YIELD == 0) leave_thread();
    return old;
  }
  u64 made = old;
  if (operation == STORE || operation == EXCHANGE) {
    made = value;
  } else if (operation == COMPARE) {
    made = old == expected ? value : old;
  } else {
    made = combine(operation, number, size, old, value);
  }
  memcpy((void*)address, &made, size);
  return old;
}

// ---------------------------------------------------------------- mathematics

#define MATH1(name) \
  extern "C" float msl_##name(float x) { return name(x); }
MATH1(expf)
MATH1(exp2f)
MATH1(logf)
MATH1(log2f)
MATH1(log10f)
MATH1(sinf)
MATH1(cosf)
MATH1(tanf)
MATH1(asinf)
MATH1(acosf)
MATH1(atanf)
MATH1(sinhf)
MATH1(coshf)
MATH1(tanhf)
MATH1(asinhf)
MATH1(acoshf)
MATH1(atanhf)
MATH1(erff)

extern "C" {
float msl_exp10f(float x) { return powf(10.f, x); }
float msl_atan2f(float y, float x) { return atan2f(y, x); }
float msl_powf(float x, float y) { return powf(x, y); }
float msl_fmodf(float x, float y) { return fmodf(x, y); }
float msl_nextafterf(float x, float y) { return nextafterf(x, y); }
float msl_ldexpf(float x, int exponent) { return ldexpf(x, exponent); }
float msl_frexpf(float x, int* exponent) { return frexpf(x, exponent); }

// Debian's libgcc 12 has no conversion to bfloat. Round to nearest even; a NaN stays one.
__attribute__((weak)) __bf16 __truncsfbf2(float value) {
  u32 bits = u32(as_bits(value));
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  u16 half = nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  __bf16 made;
  memcpy(&made, &half, sizeof made);
  return made;
}
__attribute__((weak)) __bf16 __truncdfbf2(double value) { return __truncsfbf2(float(value)); }
}
