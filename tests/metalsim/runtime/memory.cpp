// Buffers and threadgroup memory: bounds, initialisation and byte counts. Races are in races.cpp.
//
// Every buffer has mapped red zones of NaN and, beyond them, 256 MiB of nothing: a pointer that misses its buffer
// does not land in another one. The shadow of a writable byte is a Cell; a read-only byte has a flag that it was read.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <unordered_map>

#include "shadow.h"

namespace {

constexpr u64 RED_ZONE = 64 << 10, GAP = 256 << 20, PAGE = 4096;
constexpr u64 GROUP_CAPACITY = 256 << 10, GROUP_RED_ZONE = 256, GROUP_LIMIT = 32 << 10;

enum Touched : u8 { WAS_READ = 1, WAS_WRITTEN = 2 };

struct Shadow {
  std::vector<u8> touched;
  std::vector<u32> line_group;  // the last threadgroup that touched this 128 B line, + 1
  std::vector<Cell> cells;      // empty for an input
  u64 mapped_low, mapped_high;  // with red zones
};

struct Variable {
  u32 site;
  u64 offset, size;
  const char* name;
};

u8* arena = nullptr;
u64 arena_size = 0;
std::vector<Shadow> shadows;
u32 last_buffer = 0;

u8* group_memory = nullptr;
std::vector<Cell> group_cells;
std::vector<Variable> variables;
std::vector<std::string> variable_names;
u64 group_used = 0;

// A load or store of a simdgroup, by code address and buffer: what its lanes asked for, execution by execution.
// Lanes that executed it equally often executed it together.
using Interval = std::pair<u64, u64>;
struct Site {
  u32 executed[LANES];
  std::vector<std::vector<Interval>> asked;
};
struct SiteKey {
  u64 pc;
  u32 buffer, simdgroup;
  bool operator==(const SiteKey& o) const { return pc == o.pc && buffer == o.buffer && simdgroup == o.simdgroup; }
};
struct SiteHash {
  size_t operator()(const SiteKey& k) const { return k.pc * 0x9E3779B97F4A7C15ull + k.buffer * 131 + k.simdgroup; }
};
std::unordered_map<SiteKey, Site, SiteHash> sites;

u64 round_up(u64 value, u64 unit) { return (value + unit - 1) / unit * unit; }

// ---------------------------------------------------------------- buffers

int buffer_at(u64 address) {
  Buffer* buffers = launch->buffers;
  if (address - buffers[last_buffer].base < buffers[last_buffer].size) return last_buffer;
  for (u32 i = 0; i < launch->buffer_count; i++) {
    if (address - buffers[i].base < buffers[i].size) return last_buffer = i;
  }
  return -1;
}

int nearest_buffer(u64 address) {
  int nearest = -1;
  u64 least = ~0ull;
  for (u32 i = 0; i < launch->buffer_count; i++) {
    const Buffer& buffer = launch->buffers[i];
    u64 end = buffer.base + buffer.size;
    u64 distance = address < buffer.base ? buffer.base - address : address < end ? 0 : address - end;
    if (distance < least) {
      least = distance;
      nearest = i;
    }
  }
  return nearest;
}

void outside_buffers(u64 address, u32 size, u64 pc) {
  int nearest = nearest_buffer(address);
  report(OUT_OF_BOUNDS, pc, {nearest, address - launch->buffers[nearest].base, size});
  const Shadow& shadow = shadows[nearest];
  if (address < shadow.mapped_low || address + size > shadow.mapped_high) abort_dispatch();
}

void count_site(u64 pc, u32 buffer, u64 offset, u32 size) {
  Site& site = sites[{pc, buffer, current->simdgroup}];
  u32 time = site.executed[current->lane]++;
  if (time >= site.asked.size()) site.asked.resize(time + 1);
  site.asked[time].push_back({offset, offset + size});
}

u64 distinct_bytes(std::vector<Interval>& intervals) {
  std::sort(intervals.begin(), intervals.end());
  u64 total = 0, end = 0;
  for (const auto& [from, to] : intervals) {
    if (to > end) total += to - std::max(from, end);
    end = std::max(end, to);
  }
  return total;
}

void check_device(int index, u64 address, u32 size, bool write, bool atomic, u64 pc) {
  Buffer& buffer = launch->buffers[index];
  Shadow& shadow = shadows[index];
  Place place{index, address - buffer.base, size};
  for (u64 line = place.offset / 128; line <= (place.offset + size - 1) / 128; line++) {
    if (shadow.line_group[line] == group_index + 1) continue;
    shadow.line_group[line] = group_index + 1;
    buffer.lines++;
  }
  u8* touched = shadow.touched.data() + place.offset;
  if (!shadow.cells.empty()) {
    bool unset = false, again = false;
    for (u32 i = 0; i < size; i++) {
      unset |= !(touched[i] & WAS_WRITTEN);
      again |= touched[i] & WAS_WRITTEN;
    }
    if (!write && unset && !buffer.init) report(UNINITIALISED_OUTPUT, pc, place);
    check_races(shadow.cells.data() + place.offset, address, place, DEVICE, write, atomic, pc);
    if (write && again) buffer.rewritten += size;
    if (write && again && !buffer.init && !atomic && !current->has_pending) report(WRITTEN_TWICE, pc, place);
  }
  for (u32 i = 0; i < size; i++) touched[i] |= write ? WAS_WRITTEN : WAS_READ;
}

void access_device(u64 address, u32 size, bool write, bool atomic, u64 pc) {
  int index = buffer_at(address);
  if (index < 0 || address + size > launch->buffers[index].base + launch->buffers[index].size) {
    outside_buffers(address, size, pc);
    return;
  }
  Buffer& buffer = launch->buffers[index];
  (write ? buffer.stores : buffer.loads)++;
  (write ? buffer.store_bytes : buffer.load_bytes) += size;
  if (write && buffer.readonly) report(WRITE_TO_INPUT, pc, {index, address - buffer.base, size});
  if (launch->check) check_device(index, address, size, write, atomic, pc);
  if (launch->profile) count_site(pc, index, address - buffer.base, size);
}

// ---------------------------------------------------------------- threadgroup memory

int variable_at(u64 offset, u64 size) {
  for (size_t i = 0; i < variables.size(); i++) {
    if (offset >= variables[i].offset && offset + size <= variables[i].offset + variables[i].size) return i;
  }
  return -1;
}

int nearest_variable(u64 offset) {
  int nearest = -1;
  u64 least = ~0ull;
  for (size_t i = 0; i < variables.size(); i++) {
    u64 end = variables[i].offset + variables[i].size;
    u64 distance = offset < variables[i].offset ? variables[i].offset - offset : offset < end ? 0 : offset - end;
    if (distance < least) {
      least = distance;
      nearest = i;
    }
  }
  return nearest;
}

void access_group(u64 address, u32 size, bool write, bool atomic, u64 pc) {
  u64 offset = address - (u64)group_memory;
  (write ? launch->threadgroup_stores : launch->threadgroup_loads)++;
  int index = variable_at(offset, size);
  if (index < 0) {
    int nearest = nearest_variable(offset);
    u64 from = nearest < 0 ? 0 : variables[nearest].offset;
    report(THREADGROUP_OUT_OF_BOUNDS, pc, {nearest < 0 ? -1 : -2 - nearest, offset - from, size});
    return;
  }
  if (!launch->check) return;
  Place place{-2 - index, offset - variables[index].offset, size};
  Cell* cells = group_cells.data() + offset;
  if (!write) {
    bool unset = false;
    for (u32 i = 0; i < size; i++) unset |= cells[i].writer_group != group_index + 1;
    if (unset) report(UNINITIALISED_THREADGROUP, pc, place);
  }
  check_races(cells, address, place, THREADGROUP, write, atomic, pc);
}

}  // namespace

// ---------------------------------------------------------------- called by the others

void access(u64 address, u64 size, bool write, u64 pc, bool atomic) {
  if (!current) return;
  settle_pending_write();
  if (address - (u64)current->stack < STACK_BYTES) return;
  if (address - (u64)arena < arena_size) {
    access_device(address, size, write, atomic, pc);
  } else if (address - (u64)group_memory < GROUP_CAPACITY) {
    access_group(address, size, write, atomic, pc);
  } else if (!(address >= launch->module_low && address < launch->module_high) && !owned_by_runtime(address)) {
    report(WILD_POINTER, pc, {-1, address, u32(size)});
    abort_dispatch();
  }
}

bool find_memory(u64 address, int* memory, u64* offset) {
  if (address - (u64)arena < arena_size) {
    *memory = nearest_buffer(address);
    *offset = address - launch->buffers[*memory].base;
    return true;
  }
  u64 within = address - (u64)group_memory;
  if (within >= GROUP_CAPACITY) return false;
  int index = nearest_variable(within);
  *memory = index < 0 ? -1 : -2 - index;
  *offset = within - (index < 0 ? 0 : variables[index].offset);
  return true;
}

extern "C" u64 msl_tg_alloc(u32 site, u64 size, u32 align, const char* name) {
  for (const Variable& known : variables) {
    if (known.site == site) return (u64)group_memory + known.offset;
  }
  u64 offset = round_up(group_used + GROUP_RED_ZONE, std::max(align, 16u));
  u64 total = round_up(size, 16);
  for (const Variable& known : variables) total += round_up(known.size, 16);
  variables.push_back({site, offset, size, name});
  group_used = offset + size;
  launch->threadgroup_bytes = std::max(launch->threadgroup_bytes, total);
  if (total > GROUP_LIMIT) {
    report(THREADGROUP_TOO_BIG, (u64)__builtin_return_address(0), {-1 - int(variables.size()), 0, u32(total)});
  }
  if (group_used + GROUP_RED_ZONE > GROUP_CAPACITY) abort_dispatch();
  return (u64)group_memory + offset;
}

extern "C" const char* msl_variable_name(int index) {
  return index >= 0 && index < int(variable_names.size()) ? variable_names[index].c_str() : "";
}

void prepare_memory() {
  if (!group_memory) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
    group_memory = (u8*)mmap(nullptr, GROUP_CAPACITY, PROT_READ | PROT_WRITE, flags, -1, 0);
    memset(group_memory, 0xFF, GROUP_CAPACITY);
  }
  group_cells.assign(GROUP_CAPACITY, Cell{});
  arena_size = GAP;
  for (u32 i = 0; i < launch->buffer_count; i++) {
    arena_size += round_up(launch->buffers[i].size, PAGE) + 2 * RED_ZONE + GAP;
  }
  arena = (u8*)mmap(nullptr, arena_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  shadows.assign(launch->buffer_count, Shadow{});
  last_buffer = 0;
  variable_names.clear();
  u64 at = (u64)arena + GAP;
  for (u32 i = 0; i < launch->buffer_count; i++) {
    Buffer& buffer = launch->buffers[i];
    Shadow& shadow = shadows[i];
    u64 mapped = round_up(buffer.size, PAGE) + 2 * RED_ZONE;
    mprotect((void*)at, mapped, PROT_READ | PROT_WRITE);
    shadow.mapped_low = at;
    shadow.mapped_high = at + mapped;
    buffer.base = at + RED_ZONE;
    // NaN, so that a result that depends on it shows
    memset((void*)(buffer.base - 256), 0xFF, 256);
    memset((void*)(buffer.base + buffer.size), 0xFF, 256);
    if (buffer.readonly || buffer.init) {
      memcpy((void*)buffer.base, (void*)buffer.host, buffer.size);
    } else {
      memset((void*)buffer.base, 0xFF, buffer.size);
    }
    if (launch->check) {
      shadow.touched.assign(buffer.size, 0);
      shadow.line_group.assign(buffer.size / 128 + 1, 0);
      if (!buffer.readonly) shadow.cells.assign(buffer.size, Cell{});
    }
    at += mapped + GAP;
  }
}

void prepare_threadgroup_memory() {
  // NaN again, where the threadgroup before has written
  memset(group_memory, 0xFF, group_used + GROUP_RED_ZONE);
  variables.clear();
  group_used = 0;
  group_epoch[DEVICE] = group_epoch[THREADGROUP] = 1;
}

void finish_threadgroup_memory() {
  for (size_t i = variable_names.size(); i < variables.size(); i++) variable_names.push_back(variables[i].name);
  for (auto& [key, site] : sites) {
    Buffer& buffer = launch->buffers[key.buffer];
    buffer.simd_instructions += site.asked.size();
    for (std::vector<Interval>& lanes : site.asked) {
      buffer.active_lanes += lanes.size();
      buffer.simd_bytes += distinct_bytes(lanes);
    }
  }
  sites.clear();
}

void finish_memory() {
  for (u32 i = 0; i < launch->buffer_count; i++) {
    Buffer& buffer = launch->buffers[i];
    if (!buffer.readonly) memcpy((void*)buffer.host, (void*)buffer.base, buffer.size);
    for (u8 touched : shadows[i].touched) {
      buffer.unique_read += touched & WAS_READ ? 1 : 0;
      buffer.unique_written += touched & WAS_WRITTEN ? 1 : 0;
    }
    if (launch->check && !buffer.readonly && !buffer.init) buffer.unwritten = buffer.size - buffer.unique_written;
  }
  shadows.clear();
  munmap(arena, arena_size);
}
