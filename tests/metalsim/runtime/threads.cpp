// Kernel threads as coroutines, and the scheduler that runs a threadgroup from one rendezvous to the next.
//
// A thread runs until it waits: at a simd operation, at a barrier, or it is done. When all lanes of a simdgroup wait,
// those at the same operation exchange their values. When all simdgroups stand, the threadgroup barrier opens.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "state.h"

Launch* launch;
std::vector<Thread> threads;
std::vector<Simdgroup> simdgroups;
Thread* current;
u32 group_index;
u32 group_epoch[2];

namespace {

enum Schedule : u32 { FORWARD, REVERSE, RANDOM, ROUND_ROBIN };

constexpr u32 QUAD_OPERATION = 0x100;                 // the exchange is among four lanes (shim/msl_runtime.h)
constexpr u32 DEVICE_FLAG = 1, THREADGROUP_FLAG = 2;  // metal::mem_flags
constexpr u64 MAX_YIELDS = 20'000;                    // turns in which a simdgroup only spun

u8* stacks;
void* scheduler_stack;
bool aborting;
u64 random_state;

u64 random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

extern "C" void msl_switch(void** from, void* to);
asm(R"(
.text
.globl msl_switch
.type msl_switch,@function
msl_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

u64 buffer_addresses[64];

void thread_main() {
  ((void (*)(const ThreadInfo*, const u64*))launch->entry)(&current->info, buffer_addresses);
  current->state = Run::DONE;
  leave_thread();
  __builtin_trap();
}

// A stack that msl_switch can switch to: six saved registers, then the address to return to.
void start_thread(Thread& thread) {
  u64* top = (u64*)((u64)(thread.stack + STACK_BYTES - 64) & ~15ull);
  *--top = 0;
  *--top = (u64)thread_main;
  for (int i = 0; i < 6; i++) *--top = 0;
  thread.stack_pointer = top;
  thread.state = Run::READY;
  thread.has_pending = false;
}

struct As {  // reports made by the scheduler name the thread that they are about
  explicit As(Thread& thread) { current = &thread; }
  ~As() { current = nullptr; }
};

// ---------------------------------------------------------------- rendezvous of a simdgroup

u32 lanes_in(u32 group, Run state) {
  u32 mask = 0;
  for (u32 i = 0; i < simdgroups[group].size; i++) {
    if (threads[group * LANES + i].state == state) mask |= 1u << i;
  }
  return mask;
}

u32 live_lanes(u32 group) {
  u32 all = simdgroups[group].size == LANES ? ~0u : (1u << simdgroups[group].size) - 1;
  return all & ~lanes_in(group, Run::DONE);
}

// The waiting lanes that are at the same operation as lane `first`.
u32 partners(u32 group, u32 first, u32 waiting) {
  const Thread* lanes = &threads[group * LANES];
  u32 mask = 0;
  for (u32 i = first; i < simdgroups[group].size; i++) {
    bool same = lanes[i].pc == lanes[first].pc && lanes[i].operation == lanes[first].operation;
    bool together = !(lanes[first].operation & QUAD_OPERATION) || i / 4 == first / 4;
    if (waiting >> i & 1 && same && together) mask |= 1u << i;
  }
  return mask;
}

void exchange(u32 group, u32 waiting) {
  Thread* lanes = &threads[group * LANES];
  u32 live = live_lanes(group), used = 0;
  while (waiting) {
    u32 first = __builtin_ctz(waiting), mask = partners(group, first, waiting);
    Snapshot& snapshot = simdgroups[group].snapshots[used++];
    snapshot.mask = mask;
    snapshot.done = 0;
    for (u32 i = 0; i < LANES; i++) {
      if (!(mask >> i & 1)) continue;
      memcpy(snapshot.slot[i], lanes[i].value, sizeof lanes[i].value);
      lanes[i].snapshot = &snapshot;
      lanes[i].state = Run::READY;
    }
    bool quad = lanes[first].operation & QUAD_OPERATION;
    u32 expected = quad ? live & (0xFu << (first & ~3u)) : live;
    launch->simd_operations++;
    if (mask != expected) {
      launch->partial_simd_operations++;
      As reporter(lanes[first]);
      if (launch->check) report(DIVERGENT_SIMD, lanes[first].pc, {}, 0, mask);
    }
    waiting &= ~mask;
  }
}

void open_simd_barrier(u32 group, u32 waiting) {
  Thread* lanes = &threads[group * LANES];
  const Thread& first = lanes[__builtin_ctz(waiting)];
  u32 flags = first.flags;
  for (u32 i = 0; i < simdgroups[group].size; i++) {
    if (waiting >> i & 1) flags &= lanes[i].flags;
  }
  if (waiting != live_lanes(group) && launch->check) {
    As reporter(lanes[__builtin_ctz(waiting)]);
    report(DIVERGENT_SIMD_BARRIER, first.pc, {}, 0, waiting);
  }
  launch->simd_barriers++;
  if (flags & DEVICE_FLAG) simdgroups[group].epoch[DEVICE]++;
  if (flags & THREADGROUP_FLAG) simdgroups[group].epoch[THREADGROUP]++;
  for (u32 i = 0; i < simdgroups[group].size; i++) {
    if (waiting >> i & 1) lanes[i].state = Run::READY;
  }
}

// All lanes wait. Returns whether some can go on without the other simdgroups.
bool resolve(u32 group) {
  if (u32 waiting = lanes_in(group, Run::AT_SIMD)) {
    exchange(group, waiting);
    return true;
  }
  if (u32 waiting = lanes_in(group, Run::AT_SIMD_BARRIER)) {
    open_simd_barrier(group, waiting);
    return true;
  }
  return false;
}

// ---------------------------------------------------------------- a threadgroup

// Every thread waits at a threadgroup barrier or is done. Returns false when all are done.
bool open_barrier(u32 count) {
  Thread* first = nullptr;
  u32 live = 0, flags = ~0u;
  u64 elsewhere = 0;
  for (u32 i = 0; i < count; i++) {
    Thread& thread = threads[i];
    if (thread.state == Run::DONE) continue;
    if (!first) first = &thread;
    if (thread.pc != first->pc) elsewhere = thread.pc;
    flags &= thread.flags;
    live++;
  }
  if (!first) return false;
  if ((elsewhere || live != count) && launch->check) {
    As reporter(*first);
    report(DIVERGENT_BARRIER, first->pc, {}, elsewhere, live);
  }
  launch->barriers++;
  if (flags & DEVICE_FLAG) group_epoch[DEVICE]++;
  if (flags & THREADGROUP_FLAG) group_epoch[THREADGROUP]++;
  for (u32 i = 0; i < count; i++) {
    if (threads[i].state == Run::AT_BARRIER) threads[i].state = Run::READY;
  }
  return true;
}

// Runs the ready lanes of a simdgroup. Returns whether one stopped only to let others run.
bool run_lanes(u32 group) {
  u32 order[LANES], size = simdgroups[group].size;
  for (u32 i = 0; i < size; i++) order[i] = i;
  if (launch->schedule == REVERSE) std::reverse(order, order + size);
  if (launch->schedule == RANDOM) {
    for (u32 i = size - 1; i > 0; i--) std::swap(order[i], order[random_number() % (i + 1)]);
  }
  bool yielded = false;
  for (u32 i = 0; i < size && !aborting; i++) {
    Thread& thread = threads[group * LANES + order[i]];
    if (thread.state != Run::READY) continue;
    current = &thread;
    msl_switch(&scheduler_stack, thread.stack_pointer);
    current = nullptr;
    yielded |= thread.state == Run::READY;
  }
  return yielded;
}

// The simdgroup to run next. turn: how often one has yielded, so that one that spins does not keep the others out.
u32 choose(const std::vector<bool>& standing, u32 count, u32& turn) {
  u32 group = turn % count;
  if (launch->schedule == RANDOM) {
    group = random_number() % count;
  } else if (launch->schedule == REVERSE) {
    group = count - 1 - group;
  } else if (launch->schedule == ROUND_ROBIN) {
    turn++;
  }
  while (standing[group]) group = launch->schedule == REVERSE ? (group + count - 1) % count : (group + 1) % count;
  return group;
}

void run_threadgroup(u32 count) {
  u32 groups = (count + LANES - 1) / LANES, stood = 0, turn = 0;
  std::vector<bool> standing(groups, false);
  u64 yields = 0;
  while (!aborting) {
    if (stood == groups) {
      if (!open_barrier(count)) return;
      standing.assign(groups, false);
      stood = 0;
    }
    u32 group = choose(standing, groups, turn);
    if (run_lanes(group)) {
      turn++;
      if (++yields <= MAX_YIELDS) continue;
      report(LIVELOCK, 0, {});
      aborting = true;
      launch->aborted = 1;
    }
    if (!aborting && !resolve(group)) {
      standing[group] = true;
      stood++;
    }
  }
}

void describe_thread(Thread& thread, u32 index, const u32 at[3], const u32 groups[3], const u32 size[3]) {
  ThreadInfo& info = thread.info;
  u32 count = size[0] * size[1] * size[2];
  u32 position[3] = {index % size[0], index / size[0] % size[1], index / (size[0] * size[1])};
  for (int axis = 0; axis < 3; axis++) {
    u32 full = launch->group[axis];
    info.position_in_group[axis] = position[axis];
    info.group_position[axis] = at[axis];
    info.group_size[axis] = size[axis];
    info.dispatch_group_size[axis] = full;
    info.groups_per_grid[axis] = groups[axis];
    info.threads_per_grid[axis] = launch->grid_counts_groups ? launch->grid[axis] * full : launch->grid[axis];
    info.position_in_grid[axis] = at[axis] * full + position[axis];
  }
  info.simdgroup = index / LANES;
  info.lane = index % LANES;
  info.index = index;
  info.quadgroup = index / 4;
  info.lane_in_quad = index % 4;
  info.simdgroups = (count + LANES - 1) / LANES;
  info.quadgroups = (count + 3) / 4;
}

void start_threadgroup(const u32 at[3], const u32 groups[3], const u32 size[3]) {
  u32 count = size[0] * size[1] * size[2];
  for (u32 i = 0; i < count; i++) {
    Thread& thread = threads[i];
    thread.index = i;
    thread.simdgroup = i / LANES;
    thread.lane = i % LANES;
    thread.stack = stacks + i * STACK_BYTES;
    describe_thread(thread, i, at, groups, size);
    start_thread(thread);
  }
  for (u32 group = 0; group * LANES < count; group++) {
    simdgroups[group].size = std::min(LANES, count - group * LANES);
    simdgroups[group].epoch[DEVICE] = simdgroups[group].epoch[THREADGROUP] = 1;
  }
}

std::vector<u32> threadgroup_order(u32 total) {
  std::vector<u32> order(total);
  for (u32 i = 0; i < total; i++) order[i] = i;
  if (launch->schedule == REVERSE) std::reverse(order.begin(), order.end());
  if (launch->schedule == RANDOM) {
    for (u32 i = total - 1; i > 0 && total > 1; i--) std::swap(order[i], order[random_number() % (i + 1)]);
  }
  return order;
}

void prepare_threads() {
  if (!stacks) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    stacks = (u8*)mmap(nullptr, MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
    threads.resize(MAX_THREADS);
    simdgroups.resize(MAX_SIMDGROUPS);
    for (Simdgroup& group : simdgroups) group.snapshots.resize(LANES);
  }
  random_state = launch->seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
  aborting = false;
  current = nullptr;
}

}  // namespace

void leave_thread() {
  settle_pending_write();
  launch->switches++;
  msl_switch(&current->stack_pointer, scheduler_stack);
}

void abort_dispatch() {
  aborting = true;
  launch->aborted = 1;
  leave_thread();
}

bool owned_by_runtime(u64 address) {
  for (const Simdgroup& group : simdgroups) {
    if (address - (u64)group.snapshots.data() < group.snapshots.size() * sizeof(Snapshot)) return true;
  }
  return false;
}

void run_threadgroups() {
  prepare_threads();
  for (u32 i = 0; i < launch->buffer_count; i++) buffer_addresses[i] = launch->buffers[i].base;
  u32 groups[3], size[3];
  for (int axis = 0; axis < 3; axis++) {
    u32 full = launch->group[axis], extent = launch->grid[axis];
    groups[axis] = launch->grid_counts_groups ? extent : (extent + full - 1) / full;
  }
  for (u32 index : threadgroup_order(groups[0] * groups[1] * groups[2])) {
    if (aborting) break;
    group_index = index;
    u32 at[3] = {index % groups[0], index / groups[0] % groups[1], index / (groups[0] * groups[1])};
    for (int axis = 0; axis < 3; axis++) {
      u32 left = launch->grid[axis] - at[axis] * launch->group[axis];
      size[axis] = launch->grid_counts_groups ? launch->group[axis] : std::min(launch->group[axis], left);
    }
    u32 count = size[0] * size[1] * size[2];
    launch->threads += count;
    prepare_threadgroup_memory();
    start_threadgroup(at, groups, size);
    run_threadgroup(count);
    finish_threadgroup_memory();
  }
}

extern "C" void msl_dispatch(Launch* given) {
  launch = given;
  prepare_memory();
  install_signal_handlers();
  run_threadgroups();
  restore_signal_handlers();
  finish_memory();
}

extern "C" u64 msl_sizes(int index) {
  const u64 sizes[] = {sizeof(Launch), sizeof(Buffer), sizeof(Report), sizeof(ThreadInfo)};
  return sizes[index];
}

// ---------------------------------------------------------------- called by the shim

namespace {
Snapshot* rendezvous(const void* value, u32 size, u32 operation, u64 pc) {
  if (size > sizeof current->value) __builtin_trap();
  memcpy(current->value, value, size);
  current->operation = operation;
  current->pc = pc;
  current->state = Run::AT_SIMD;
  leave_thread();
  current->snapshot->lane = current->lane;
  return current->snapshot;
}

void wait_at(Run barrier, u32 flags, u64 pc) {
  current->pc = pc;
  current->flags = flags;
  current->state = barrier;
  leave_thread();
}
}  // namespace

extern "C" {
Snapshot* msl_xch(const void* value, u32 size, u32 operation) {
  return rendezvous(value, size, operation, (u64)__builtin_return_address(0));
}
Snapshot* msl_qxch(const void* value, u32 size, u32 operation) {
  return rendezvous(value, size, operation | QUAD_OPERATION, (u64)__builtin_return_address(0));
}
void msl_tgbarrier(u32 flags) { wait_at(Run::AT_BARRIER, flags, (u64)__builtin_return_address(0)); }
void msl_sgbarrier(u32 flags) { wait_at(Run::AT_SIMD_BARRIER, flags, (u64)__builtin_return_address(0)); }
void msl_bad_lane(u32 lane) { report(INACTIVE_LANE, current->pc, {}, 0, lane); }
}
