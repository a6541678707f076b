// Data races, as unordered pairs of accesses: what a barrier would have to order, whatever order the threads ran in.
//
// Two accesses of one thread are ordered; two of a simdgroup when a simdgroup_barrier was between them, two of a
// threadgroup when a threadgroup_barrier was, in both cases with the flag of that memory; two of different threadgroups
// never. simd operations order nothing. Atomics do not race with atomics.
#include <algorithm>
#include <cstring>

#include "shadow.h"

namespace {

struct Conflict {
  bool found, other_group;
};

Conflict after_write(const Cell& cell, Memory memory) {
  if (!cell.writer_group) return {false, false};
  // threadgroup memory of an earlier group is uninitialised memory, which is another report
  if (cell.writer_group != group_index + 1) return {memory == DEVICE, true};
  if (cell.writer == current->index || cell.writer_epoch != group_epoch[memory]) return {false, false};
  bool same_simd = cell.writer / LANES == current->simdgroup;
  bool ordered = same_simd && cell.writer_simd_epoch < simdgroups[current->simdgroup].epoch[memory];
  return {!ordered, false};
}

Conflict after_reads(const Cell& cell, Memory memory) {
  if (!cell.reader_group) return {false, false};
  if (memory == DEVICE && (cell.reader_group != group_index + 1 || cell.others & OTHER_GROUP)) return {true, true};
  if (cell.reader_group != group_index + 1 || cell.reader_epoch != group_epoch[memory]) return {false, false};
  if (cell.others & OTHER_SIMD || cell.reader / LANES != current->simdgroup) return {true, false};
  if (cell.reader_simd_epoch < simdgroups[current->simdgroup].epoch[memory]) return {false, false};
  return {cell.reader != current->index || cell.others & OTHER_LANE, false};
}

void note_write(Cell& cell, Memory memory, bool atomic, u64 pc) {
  cell.writer_group = group_index + 1;
  cell.writer_epoch = group_epoch[memory];
  cell.writer_simd_epoch = simdgroups[current->simdgroup].epoch[memory];
  cell.writer_pc = u32(pc - launch->module_low);
  cell.writer = current->index;
  cell.writer_atomic = atomic;
}

void note_read(Cell& cell, Memory memory, u64 pc) {
  u32 group = group_index + 1, epoch = group_epoch[memory];
  u32 simd_epoch = simdgroups[current->simdgroup].epoch[memory];
  if (cell.reader_group && cell.reader_group != group) {
    cell.others = OTHER_GROUP;
  } else if (cell.reader_epoch != epoch) {
    cell.others &= OTHER_GROUP;
  } else if (cell.reader / LANES != current->simdgroup) {
    cell.others |= OTHER_SIMD;
  } else if (cell.reader_simd_epoch != simd_epoch) {
    cell.others &= ~OTHER_LANE;
  } else if (cell.reader_group && cell.reader != current->index) {
    cell.others |= OTHER_LANE;
  }
  cell.reader_group = group;
  cell.reader_epoch = epoch;
  cell.reader_simd_epoch = simd_epoch;
  cell.reader_pc = u32(pc - launch->module_low);
  cell.reader = current->index;
}

// A write over another thread's write: whether it is harmless is seen when it has happened.
void begin_pending_write(u64 address, Place place, u64 pc, const Cell& cell, bool other_group) {
  if (current->has_pending) return;
  PendingWrite& pending = current->pending;
  u64 pc2 = cell.writer_pc + launch->module_low;
  pending = {address,     pc,          pc2, place.offset, place.size, other_group ? OTHER_THREADGROUP : 0u,
             cell.writer, place.memory};
  memcpy(pending.before, (void*)address, std::min<u64>(place.size, sizeof pending.before));
  current->has_pending = true;
}

}  // namespace

void check_races(Cell* cells, u64 address, Place place, Memory memory, bool write, bool atomic, u64 pc) {
  for (u32 i = 0; i < place.size; i++) {
    Cell& cell = cells[i];
    Conflict written = after_write(cell, memory);
    if (written.found && !(atomic && cell.writer_atomic)) {
      if (write && !atomic && !cell.writer_atomic) {
        begin_pending_write(address, place, pc, cell, written.other_group);
      } else {
        report(write ? RACE_WRITE_AFTER_WRITE : RACE_READ_AFTER_WRITE, pc, place, cell.writer_pc + launch->module_low,
               written.other_group ? OTHER_THREADGROUP : 0, cell.writer);
      }
    }
    if (write) {
      Conflict read = after_reads(cell, memory);
      if (read.found) {
        report(RACE_WRITE_AFTER_READ, pc, place, cell.reader_pc + launch->module_low,
               read.other_group ? OTHER_THREADGROUP : 0, cell.reader);
      }
      note_write(cell, memory, atomic, pc);
    } else if (!atomic) {
      note_read(cell, memory, pc);
    }
  }
}

void settle_pending_write() {
  if (!current || !current->has_pending) return;
  current->has_pending = false;
  const PendingWrite& pending = current->pending;
  bool comparable = pending.size <= sizeof pending.before;
  bool same = comparable && memcmp(pending.before, (void*)pending.address, pending.size) == 0;
  report(same ? SAME_VALUE_WRITE : RACE_WRITE_AFTER_WRITE, pending.pc, {pending.memory, pending.offset, pending.size},
         pending.pc2, pending.info, pending.other_thread);
}
