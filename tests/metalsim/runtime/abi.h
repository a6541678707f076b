// What Python and the runtime share (twins of the structures in abi.py), and what the shim and the runtime share.
#pragma once
#include <cstdint>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

struct Buffer {
  u64 host, size;
  u32 readonly, init;  // init: the host's values are there before the kernel runs
  u64 base;
  u64 loads, load_bytes, stores, store_bytes;
  u64 unique_read, unique_written, unwritten, rewritten;
  u64 lines;  // 128 B lines, each counted once per threadgroup
  // with profile: memory instructions of simdgroups, active lanes in them, and bytes asked for by them, where a byte
  // that several lanes of one instruction want counts once
  u64 simd_instructions, active_lanes, simd_bytes;
};

// The order is that of KINDS in abi.py.
enum Kind : u32 {
  NOTHING,
  OUT_OF_BOUNDS,
  WILD_POINTER,
  RACE_READ_AFTER_WRITE,
  RACE_WRITE_AFTER_READ,
  RACE_WRITE_AFTER_WRITE,
  SAME_VALUE_WRITE,
  WRITTEN_TWICE,
  WRITE_TO_INPUT,
  UNINITIALISED_THREADGROUP,
  UNINITIALISED_OUTPUT,
  DIVERGENT_BARRIER,
  DIVERGENT_SIMD,
  DIVERGENT_SIMD_BARRIER,
  INACTIVE_LANE,
  THREADGROUP_OUT_OF_BOUNDS,
  THREADGROUP_TOO_BIG,
  ARRAY_OUT_OF_BOUNDS,
  MISALIGNED,
  DIVISION_BY_ZERO,
  LIVELOCK,
  FAULT,
  TIMEOUT,
};

struct Report {
  u32 kind, count;
  u64 pc, pc2;     // of this access, and of the one that it conflicts with
  int32_t memory;  // >= 0 a buffer, -1 nothing, <= -2 threadgroup variable -2 - memory
  u32 threadgroup, thread, other_thread;
  u64 offset;
  u32 size, info;
};

// Report.info of a race
enum : u32 { OTHER_THREADGROUP = 1 };

struct Launch {
  u64 entry;
  u32 grid[3], group[3];
  u32 buffer_count, schedule;
  u64 seed;
  u32 check, profile, max_reports, grid_counts_groups;
  u64 time_limit;  // seconds
  Buffer* buffers;
  Report* reports;
  u32 report_count, aborted;
  u64 threads, simd_operations, partial_simd_operations, barriers, simd_barriers, atomics, switches;
  u64 threadgroup_bytes, threadgroup_loads, threadgroup_stores;
  u64 module_low, module_high;  // code and constants of the kernel
};

// What a thread knows of itself: `struct msl_ti` in shim/msl_runtime.h.
struct ThreadInfo {
  u32 position_in_grid[4], position_in_group[4], group_position[4], group_size[4], dispatch_group_size[4];
  u32 groups_per_grid[4], threads_per_grid[4];
  u32 simdgroup, lane, index, quadgroup, lane_in_quad, simdgroups, quadgroups, pad;
};

// The values that the lanes of a simdgroup brought to one operation: `struct msl_snap` in shim/msl_runtime.h.
struct Snapshot {
  u32 mask, done, lane, pad;
  u8 slot[32][16];
  u8 result[32][16];
};
