// The shadow of a writable byte, and the race check on it.
#pragma once
#include "state.h"

// Who touched a byte last. Groups are numbered from 1; 0 is nobody.
//
// One writer is enough: a conflict of two writers is reported at the second, and what is ordered after the second is
// ordered after the first. Of readers, the latest is kept with a note of who else read, see `Others`.
struct Cell {
  u32 writer_group, writer_epoch, writer_simd_epoch, writer_pc;
  u32 reader_group, reader_epoch, reader_simd_epoch, reader_pc;
  u16 writer, reader;
  u8 writer_atomic, others;
};

enum Others : u8 {
  OTHER_LANE = 1,   // another thread of the same simdgroup read it since that simdgroup's last barrier
  OTHER_SIMD = 2,   // another simdgroup read it since the threadgroup's last barrier
  OTHER_GROUP = 4,  // another threadgroup read it
};

// Compares an access of the current thread with what the shadow knows of each byte, and notes it there.
void check_races(Cell* cells, u64 address, Place place, Memory memory, bool write, bool atomic, u64 pc);
