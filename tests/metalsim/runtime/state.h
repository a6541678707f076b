// The state of the dispatch in progress. One dispatch at a time; every kernel thread is a coroutine of one OS thread.
#pragma once
#include <vector>

#include "abi.h"

constexpr u32 LANES = 32;
constexpr u32 MAX_THREADS = 1024;
constexpr u32 MAX_SIMDGROUPS = MAX_THREADS / LANES;
constexpr u64 STACK_BYTES = 256 << 10;

enum class Run : u8 { READY, AT_SIMD, AT_SIMD_BARRIER, AT_BARRIER, DONE };

// A store that races with an earlier one; whether it changed the value is known only after it has happened.
struct PendingWrite {
  u64 address, pc, pc2, offset;
  u32 size, info, other_thread;
  int memory;
  u8 before[64] = {};
};

struct Thread {
  void* stack_pointer;
  u8* stack;
  Run state;
  u32 index, simdgroup, lane;
  u32 operation, flags;  // at which simd operation, or with which memory flags at a barrier
  u64 pc;                // where it waits
  Snapshot* snapshot;
  u8 value[16];
  bool has_pending;
  PendingWrite pending;
  ThreadInfo info;
};

// The two memories have barriers of their own (mem_flags), so epochs come in pairs.
enum Memory : u32 { DEVICE = 0, THREADGROUP = 1 };

struct Simdgroup {
  u32 size;
  u32 epoch[2];
  std::vector<Snapshot> snapshots;
};

extern Launch* launch;
extern std::vector<Thread> threads;
extern std::vector<Simdgroup> simdgroups;
extern Thread* current;
extern u32 group_index;     // the threadgroup that runs
extern u32 group_epoch[2];  // advanced by threadgroup_barrier, per memory

// threads.cpp
void run_threadgroups();
void leave_thread();  // back to the scheduler, until it resumes this thread
void abort_dispatch();
bool owned_by_runtime(u64 address);

// memory.cpp
void prepare_memory();
void prepare_threadgroup_memory();
void finish_threadgroup_memory();
void finish_memory();
void access(u64 address, u64 size, bool write, u64 pc, bool atomic = false);
void settle_pending_write();
bool find_memory(u64 address, int* memory, u64* offset);

// faults.cpp
void install_signal_handlers();
void restore_signal_handlers();

// reports.cpp
struct Place {
  int memory = -1;
  u64 offset = 0;
  u32 size = 0;
};
void report(Kind kind, u64 pc, Place place, u64 pc2 = 0, u32 info = 0, u32 other_thread = 0);
