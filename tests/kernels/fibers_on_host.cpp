// What runs a CUDA kernel's text on a CPU has in common (hopper_on_host.cpp, programs_on_host.cpp, which follow): threads
// as fibers that give way where they would wait, barriers, fetches on their way, and numbers of 16 bits.

#include <setjmp.h>
#include <ucontext.h>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

typedef uint32_t u32;
typedef uint64_t u64;
typedef uint16_t u16;
struct uint4 { u32 x, y, z, w; };
struct float4 { float x, y, z, w; };
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

constexpr int PROGRAM_BYTES = 232448;
#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct Barrier { int count, pending, bytes; u32 phase; };
// All threads that come to it go on together.
struct Meeting { int there = 0, times = 0; };
struct Fiber {
  ucontext_t context;
  jmp_buf at;
  int index, program;
  bool begun, ended;
  std::vector<char> stack;
};
struct Index { int x; };

static Fiber* running;
static jmp_buf scheduler;
static std::vector<std::function<void()>> on_their_way;
static Index threadIdx, blockIdx, gridDim;

// Without the system calls of swapcontext, which would take most of the time.
__attribute__((noinline)) static void give_way() { if (!_setjmp(running->at)) _longjmp(scheduler, 1); }
__attribute__((noinline)) static void go_on(Fiber& f) {
  running = &f;
  if (_setjmp(scheduler)) return;
  if (f.begun) _longjmp(f.at, 1);
  f.begun = true;
  setcontext(&f.context);
}
static void fail(const char* what) { fprintf(stderr, "%s\n", what); exit(1); }
static void make_ready(Fiber& f, int index, int program, void (*start)()) {
  f.index = index, f.program = program, f.begun = f.ended = false;
  f.stack.resize(1 << 15);
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size();
  f.context.uc_link = nullptr;
  makecontext(&f.context, start, 0);
}
// All threads of programs from `first_block` on, to their ends; fetches arrive between their rounds, in any order.
template <class T> static void run_to_the_end(std::vector<T>& threads, T*& now, int first_block) {
  for (int round = 0, left = 1; left; ++round) {
    if (round == 30000) fail("a wait that never ends");
    left = 0;
    for (T& t : threads) {
      if (t.ended) continue;
      ++left;
      now = &t, threadIdx.x = t.index, blockIdx.x = first_block + t.program;
      go_on(t);
    }
    for (size_t i = on_their_way.size(); i-- > 0;) {
      if (rand() % 3) continue;
      on_their_way[i]();
      on_their_way.erase(on_their_way.begin() + i);
    }
  }
  if (!on_their_way.empty()) fail("a program ended before its fetches");
}

static int arrive(Meeting& m, int all) {
  const int before = m.times;
  if (++m.there == all) m.there = 0, ++m.times;
  return before;
}
static void meet(Meeting& m, int all) { for (const int before = arrive(m, all); m.times == before;) give_way(); }
static void settle(Barrier& b) {
  if (b.pending < 0) fail("more arrivals than a barrier expects");
  if (b.pending == 0 && b.bytes == 0) b.pending = b.count, ++b.phase;
}
struct Ring {
  u32 stage, parity;
  explicit Ring(u32 steps) : stage(steps % STAGES), parity(steps / STAGES & 1) {}
  void next() { if (++stage == STAGES) stage = 0, parity ^= 1; }
};

static u64 policy_evict_first() { return 0; }
static u64 policy_evict_last() { return 0; }
static void __threadfence() {}
static void __stcg(float4* to, float4 value) { *to = value; }
template <class T> static T __ldcg(const T* from) { return *from; }
static float widen(u16 value) { u32 bits = (u32)value << 16; float f; memcpy(&f, &bits, 4); return f; }
static u32 narrow(float f) { u32 bits; memcpy(&bits, &f, 4); return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF; }
static u32 pack(float low, float high) { return narrow(low) | narrow(high) << 16; }
static float silu_times(float gate, float up) { return gate / (1 + std::exp(-gate)) * up; }

template <class T> static void read(std::vector<T>& to, size_t count, FILE* file) {
  to.resize(count);
  if (count && fread(to.data(), sizeof(T), count, file) != count) fail("too little input");
}
