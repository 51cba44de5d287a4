// AMX in software: a handler of SIGILL that carries out the instructions of AMX on machines without it, for tests. See README.md.
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>

#include "decode.h"
#include "tiles.h"

using namespace amx_emulator;

namespace {

struct Thread {
  State state;
  uint64_t counts[kOps];
};

// The handler can neither allocate nor lock, so threads take their state from a pool. Only a pointer is thread-local: a library loaded late
// gets little of the static thread-local memory, and the dynamic kind may allocate when a thread first touches it.
constexpr int kThreads = 256;
Thread pool[kThreads];
std::atomic<int> used{0};
__attribute__((tls_model("initial-exec"))) thread_local Thread* mine = nullptr;

struct sigaction previous;
bool installed = false;

// A line of text, put together without the C library's formatting, which is not safe in a handler.
class Line {
 public:
  Line& add(const char* text) {
    while (*text && size_ < sizeof(text_) - 1) text_[size_++] = *text++;
    return *this;
  }
  Line& add_hex(uint64_t value) {
    char digits[19] = "0x0000000000000000";
    for (int i = 17; i > 1; --i, value >>= 4) digits[i] = "0123456789abcdef"[value & 15];
    return add(digits);
  }
  Line& add_tile(int tile) {
    const char name[] = {' ', 't', 'm', 'm', static_cast<char>('0' + tile), 0};
    return add(name);
  }
  [[noreturn]] void abort() {
    text_[size_++] = '\n';
    [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, text_, size_);
    std::abort();
  }

 private:
  char text_[256];
  size_t size_ = 0;
};

Thread& thread() {
  if (!mine) {
    const int index = used++;
    if (index >= kThreads) Line().add("amx emulator: more than 256 threads").abort();
    mine = &pool[index];
  }
  return *mine;
}

void pass_on(int signal, siginfo_t* info, void* context) {
  if (previous.sa_flags & SA_SIGINFO) {
    previous.sa_sigaction(signal, info, context);
  } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(signal);
  } else {
    sigaction(SIGILL, &previous, nullptr);  // the instruction runs again, and ends the process
  }
}

void on_illegal_instruction(int signal, siginfo_t* info, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const uint64_t at = static_cast<uint64_t>(registers[REG_RIP]);
  Instruction instruction;
  if (!decode(reinterpret_cast<const uint8_t*>(at), instruction)) return pass_on(signal, info, context);
  constexpr int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                             REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  uint64_t values[16];
  for (int i = 0; i < 16; ++i) values[i] = static_cast<uint64_t>(registers[order[i]]);
  Thread& t = thread();
  const uint64_t next = at + static_cast<uint64_t>(instruction.length);
  if (const Fault fault = execute(t.state, instruction, values, next)) {
    Line line;
    line.add("amx emulator: ").add(fault).add(", at ").add(kNames[static_cast<int>(instruction.op)]);
    if (instruction.op >= Op::tilezero) line.add_tile(instruction.d);
    if (instruction.op >= Op::tdpbf16ps) line.add_tile(instruction.a).add_tile(instruction.b);
    line.add(", rip ").add_hex(at).abort();
  }
  ++t.counts[static_cast<int>(instruction.op)];
  registers[REG_RIP] = static_cast<greg_t>(next);
}

}  // namespace

extern "C" {

// After faulthandler, which also takes SIGILL; an instruction that is none of AMX goes to the handler there was before.
int amx_emulator_install() {
  if (installed) return 0;
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  if (sigaction(SIGILL, &action, &previous) != 0) return -1;
  installed = true;
  return 0;
}

int amx_emulator_uninstall() {
  if (!installed) return 0;
  installed = false;
  return sigaction(SIGILL, &previous, nullptr);
}

// Threads that have executed an instruction of AMX so far.
int amx_emulator_threads() { return used < kThreads ? used.load() : kThreads; }

// What one of them did since the last reset, by Op, and whether its tiles are configured. No thread may be at work meanwhile.
int amx_emulator_stats(int thread, uint64_t* counts) {
  std::memcpy(counts, pool[thread].counts, sizeof(pool[thread].counts));
  return pool[thread].state.configured;
}

void amx_emulator_reset() {
  for (int i = 0; i < amx_emulator_threads(); ++i) std::memset(pool[i].counts, 0, sizeof(pool[i].counts));
}

// For the tests of decode.h: its result as nine numbers; 0 if the bytes are no instruction of AMX.
int amx_emulator_decode(const uint8_t* bytes, int64_t* fields) {
  Instruction i;
  if (!decode(bytes, i)) return 0;
  const int64_t all[9] = {static_cast<int64_t>(i.op), i.length, i.d, i.a, i.b, i.base, i.index, i.shift, i.displacement};
  std::memcpy(fields, all, sizeof(all));
  return 1;
}
}
