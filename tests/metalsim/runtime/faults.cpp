// A kernel thread that the CPU stops (a misaligned vector, a wild pointer in an unchecked run, a division by zero) or
// that runs on for too long becomes a finding: the signal handler sends the thread to a function that reports and
// leaves it for good.
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include "state.h"

namespace {

constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGALRM};
constexpr int COUNT = sizeof SIGNALS / sizeof SIGNALS[0];
struct sigaction before[COUNT];
u64 stopped_pc;
Kind stopped_by;

void leave_for_good() {
  report(stopped_by, stopped_pc + 1, {});  // findings hold return addresses, which are behind their instruction
  abort_dispatch();
}

void on_signal(int signal, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  u64 pc = registers[REG_RIP];
  bool in_kernel = current && pc >= launch->module_low && pc < launch->module_high;
  if (signal == SIGALRM && !in_kernel) {  // never leave the runtime or the allocator half-way
    ualarm(1000, 0);
    return;
  }
  if (!current) {  // the runtime's own mistake: as if there were no handler
    restore_signal_handlers();
    raise(signal);
    return;
  }
  stopped_pc = pc;
  stopped_by = signal == SIGALRM ? TIMEOUT : FAULT;
  registers[REG_RIP] = (greg_t)leave_for_good;
  registers[REG_RSP] = ((registers[REG_RSP] - 256) & ~15ll) - 8;  // below the red zone, aligned as after a call
}

}  // namespace

void install_signal_handlers() {
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  for (int i = 0; i < COUNT; i++) sigaction(SIGNALS[i], &action, &before[i]);
  alarm(launch->time_limit);
}

void restore_signal_handlers() {
  alarm(0);
  for (int i = 0; i < COUNT; i++) sigaction(SIGNALS[i], &before[i], nullptr);
}
