// Metal's keywords and constants in terms of clang's.
#pragma once

#ifndef __METAL_VERSION__
#define __METAL_VERSION__ 310  // from 320 on MLX wants metal_logging
#endif
#ifndef __METAL__
#define __METAL__ 1
#endif

// during the shim `constant` is bare; <metal_stdlib> ends with its definition for kernels
#define thread __private
#define device __global
#define threadgroup __local
#define kernel
#define METAL_FUNC inline __attribute__((always_inline))
#define METAL_CONST static constant constexpr const
#define bfloat __bf16

// identifiers that are OpenCL keywords but ordinary identifiers in MSL
#define global msl_id_global
#define local msl_id_local
#define generic msl_id_generic
#define pipe msl_id_pipe

// what MLX's headers ask about
#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 0
#define METAL_VALID_LOOP ;

#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define MAXFLOAT 3.402823466e+38f
#define HUGE_VALF INFINITY
#define M_PI_F 3.14159274101257f
#define M_PI_2_F 1.57079637050629f
#define M_PI_4_F 0.78539818525314f
#define M_1_PI_F 0.31830987334251f
#define M_2_PI_F 0.63661974668503f
#define M_E_F 2.71828174591064f
#define M_LOG2E_F 1.44269502162933f
#define M_LN2_F 0.69314718246460f
#define M_LN10_F 2.30258512496948f
#define M_SQRT2_F 1.41421353816986f
#define M_SQRT1_2_F 0.70710676908493f
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.1920929e-07f
#define HALF_MAX 65504.0h
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define CHAR_BIT 8
