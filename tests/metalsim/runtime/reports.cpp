// Findings: one per kind, memory and pair of places; repetitions are counted.
#include "state.h"

void report(Kind kind, u64 pc, Place place, u64 pc2, u32 info, u32 other_thread) {
  for (u32 i = 0; i < launch->report_count; i++) {
    Report& known = launch->reports[i];
    if (known.kind == kind && known.pc == pc && known.pc2 == pc2 && known.memory == place.memory) {
      known.count++;
      return;
    }
  }
  if (launch->report_count == launch->max_reports) return;
  u32 thread = current ? current->index : 0;
  launch->reports[launch->report_count++] = {
      kind, 1, pc, pc2, place.memory, group_index, thread, other_thread, place.offset, place.size, info};
}
