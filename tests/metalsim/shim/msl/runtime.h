// What the runtime offers to the shim: twins in runtime/abi.h, threads.cpp, memory.cpp and callbacks.cpp.
#pragma once

// The values that the lanes of a simdgroup brought to one operation.
struct msl_snap {
  uint mask;
  uint done;
  uint lane;
  uint pad;
  uchar slot[32][16];
  uchar result[32][16];
};
extern "C" {
thread msl_snap* msl_xch(const thread void* data, uint size, uint kind);
thread msl_snap* msl_qxch(const thread void* data, uint size, uint kind);
void msl_tgbarrier(uint flags);
void msl_sgbarrier(uint flags);
ulong msl_tg_alloc(uint site, ulong size, uint align, const constant char* name);
ulong msl_atomic(ulong addr, uint size, uint op, ulong a, ulong b);
void msl_bad_lane(uint lane);
float msl_expf(float), msl_exp2f(float), msl_exp10f(float), msl_logf(float), msl_log2f(float), msl_log10f(float),
    msl_sinf(float), msl_cosf(float), msl_tanf(float), msl_asinf(float), msl_acosf(float), msl_atanf(float),
    msl_atan2f(float, float), msl_sinhf(float), msl_coshf(float), msl_tanhf(float), msl_asinhf(float),
    msl_acoshf(float), msl_atanhf(float), msl_powf(float, float), msl_fmodf(float, float), msl_nextafterf(float, float),
    msl_ldexpf(float, int), msl_frexpf(float, thread int*), msl_erff(float);
}

// What a thread knows of itself.
struct msl_ti {
  uint tpig[4], tpit[4], tgpig[4], tptg[4], dtptg[4], tgpg[4], tpg[4];
  uint sgi, lane, tit, qgi, tiq, sgptg, qgptg, pad;
};

// An address that becomes whatever pointer or reference the kernel's parameter is.
#define MSL_ADDRESS(name, declared, made) \
  struct name {                           \
    ulong address;                        \
    template <class P>                    \
    operator declared() const thread {    \
      return made;                        \
    }                                     \
  };
MSL_ADDRESS(msl_device_pointer, device P*, (device P*)address)
MSL_ADDRESS(msl_device_reference, device P&, *(device P*)address)
MSL_ADDRESS(msl_constant_pointer, const __constant P*, (const __constant P*)address)
MSL_ADDRESS(msl_constant_reference, const __constant P&, *(const __constant P*)address)
MSL_ADDRESS(msl_threadgroup_pointer, threadgroup P*, (threadgroup P*)address)
#undef MSL_ADDRESS
