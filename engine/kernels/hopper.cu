// What the CUDA kernels share: barriers, the tensor memory accelerator, the tensor cores' operands. Needs STAGES. With
// FLOAT16 values of 16 bits are float16, otherwise bfloat16.

#ifndef FLOAT16
#define FLOAT16 0
#endif

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

struct alignas(64) TensorMap {
  u64 opaque[16];
};

__device__ __forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ u32 remote_address(u32 address, u32 rank) {
  u32 remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier, u32 rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote_address(barrier, rank))
               : "memory");
}

__device__ __forceinline__ void barrier_arrive_local(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  u32 done = 0;
  for (int tries = 0; !done; ++tries) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    // An error that is seen, not a device that hangs: a store to nowhere. With a trap the assembler forgets what
    // setmaxnreg gave, keeps to the registers that a program starts with, and waits for each product of many.
    if (tries == 1 << 22) asm volatile("st.global.u32 [%0], %1;" ::"l"(0ull), "r"(tries) : "memory");
  }
}

// Until here a kernel may only touch what no kernel before it writes, and must not write what they read.
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// As soon as all programs of this kernel have said so, the next one may be launched.
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// A flag in global memory, for programs of one launch: raised when everything that was written before is to be seen.
__device__ __forceinline__ void flag_raise(u32* flag) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(1) : "memory");
}

__device__ __forceinline__ void flag_lower(u32* flag) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(0) : "memory");
}

__device__ __forceinline__ void flag_wait(const u32* flag) {
  u32 raised = 0;
  for (int tries = 0; !raised; ++tries) {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(raised) : "l"(flag) : "memory");
    if (tries == 1 << 24) asm volatile("st.global.u32 [%0], %1;" ::"l"(0ull), "r"(tries) : "memory");  // as below
  }
}

// A counter in global memory, for programs of one launch. Who sees it counted up sees what was written before.
__device__ __forceinline__ u32 count_up(u32* counter) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

__device__ __forceinline__ void count_reset(u32* counter) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(counter), "r"(0) : "memory");
}

__device__ __forceinline__ void count_wait(const u32* counter, u32 count) {
  u32 there = 0;
  for (int tries = 0; there < count; ++tries) {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(counter) : "memory");
    if (tries == 1 << 24) asm volatile("st.global.u32 [%0], %1;" ::"l"(0ull), "r"(tries) : "memory");  // as above
  }
}

// A stage of the ring of tiles, and the parity of the round that it is in.
struct Ring {
  u32 stage, parity;
  __device__ __forceinline__ explicit Ring(u32 steps) : stage(steps % STAGES), parity(steps / STAGES & 1) {}
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Bytes that lie side by side, a multiple of 16.
__device__ __forceinline__ void fetch_bytes(u32 to, const void* from, u32 count, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          to), "l"(from), "r"(count), "r"(barrier), "l"(policy)
      : "memory");
}

// A box of rows x 64 columns of a row-major matrix.
__device__ __forceinline__ void fetch(u32 to, const TensorMap& map, u32 barrier, int col, int row, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to), "l"(&map), "r"(barrier), "r"(col), "r"(row), "l"(policy)
      : "memory");
}

// The same to all programs of `ranks`, a bit each.
__device__ __forceinline__ void fetch_for(u16 ranks, u32 to, const TensorMap& map, u32 barrier, int col, int row,
                                          u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(to), "l"(&map), "r"(barrier), "r"(col), "r"(row), "h"(ranks),
      "l"(policy)
      : "memory");
}

// A box of a tensor of three dimensions, the innermost coordinate first.
__device__ __forceinline__ void fetch_box(u32 to, const TensorMap& map, u32 barrier, int x, int y, int z, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to), "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "l"(policy)
      : "memory");
}

// Of a tile in shared memory, rows of 128 bytes, swizzled: 8 rows are 1,024 bytes.
__device__ __forceinline__ u64 descriptor(u32 address) {
  return static_cast<u64>((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

// Of such a tile as the transposed operand: the rows are what is summed over, `apart` bytes separate 64 columns from the
// next 64.
__device__ __forceinline__ u64 column_descriptor(u32 address, u32 apart) {
  return static_cast<u64>((address & 0x3FFFF) >> 4) | (static_cast<u64>(apart >> 4) << 16) | (64ull << 32) | (1ull << 62);
}

// Threads of a program, whole warps: `count` of them meet here, those that arrive without waiting among them.
__device__ __forceinline__ void named_sync(int name, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(count) : "memory");
}

__device__ __forceinline__ void named_arrive(int name, int count) {
  asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(count) : "memory");
}

// What this thread stored in shared memory is there for the tensor cores, and for fetches that overwrite it.
__device__ __forceinline__ void fence_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define LOWEST __int_as_float(0xFF800000)  // minus infinity

__device__ __forceinline__ float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 both;
#if FLOAT16
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
  return both;
}

__device__ __forceinline__ float silu_times(float gate, float up) { return __fdividef(gate, 1.0f + __expf(-gate)) * up; }

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// What the L2 cache is to do with what is read once, and with what is read again.
__device__ __forceinline__ u64 policy_evict_first() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ u64 policy_evict_normal() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ u64 policy_evict_last() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ float widen(u16 value) {
#if FLOAT16
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
  return wide;
#else
  return __uint_as_float(static_cast<u32>(value) << 16);
#endif
}

__device__ __forceinline__ u16 narrow(float value) { return static_cast<u16>(pack(value, 0.0f)); }

// Two values times two weights, rounded; their squares are added to `sum`.
__device__ __forceinline__ u32 scale_pair(u32 values, u32 weights, float& sum) {
  const float low = widen(values & 0xFFFFu), high = widen(values >> 16);
  sum += low * low + high * high;
  return pack(low * widen(weights & 0xFFFFu), high * widen(weights >> 16));
}

__device__ __forceinline__ uint4 load_shared(u32 from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
  return v;
}

__device__ __forceinline__ u32 load_shared_word(u32 from) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from));
  return v;
}

__device__ __forceinline__ void store_shared(u32 to, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

__device__ __forceinline__ void store_cluster(u32 to, float value) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory");
}

__device__ __forceinline__ void store_cluster(u32 to, float a, float b, float c, float d) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

// Two columns, rounded to bf16, of each of four blocks of 8 columns lie in each of 4 threads; after it a thread has one
// block whole.
__device__ __forceinline__ void transpose_quad(u32 (&v)[4], int lane) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const u32 got = __shfl_xor_sync(~0u, upper ? v[i] : v[i + step], step);
      if (upper) v[i] = got; else v[i + step] = got;
    }
  }
}

// An 8 x 8 matrix of bf16 over a warp, each thread two neighbours of a row, becomes its transpose.
__device__ __forceinline__ u32 transpose_octet(u32 pair) {
  u32 turned;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(pair));
  return turned;
}
