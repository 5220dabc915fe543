// Runs wide_gemm.cu, with PACKED wide_packed.cu, or with COLUMNS wide_prefill.cu on a CPU, a cluster after another or all
// at once: each thread is a fiber that gives way where it would wait, each fetch arrives at some later time, in any order.
// What hopper.cu does with instructions of the GPU is done here by hand, without swizzle. The test puts the launch's
// constants (CM: programs of a cluster) and fibers_on_host.cpp before this text, and the kernel's (without asm) behind it.

constexpr int PROGRAM_THREADS = 384;

struct TensorMap {
  const u16* data;
  int rows, cols, box_rows;
  // Of one of three dimensions, the innermost first, whose elements lie side by side.
  int sizes[3];
  long strides[3];
  int box[3];
};
struct Program {
  alignas(1024) char shared[PROGRAM_BYTES];
  u32 used = 0;
  Barrier barriers[64];
};
struct Product { float* d; int count; u64 a, b; const u32* packed; bool add; };
struct Thread : Fiber { std::vector<std::vector<Product>> groups; std::vector<Product> open; u32 sent[4]; };

static std::vector<Program> programs;  // of the clusters that run at once
static std::vector<Thread> threads;
static Thread* now;
static std::vector<Meeting> of_clusters, of_warps, of_consumers;
static int first_program;

static Program& own() { return programs[now->program]; }
static int cluster_of(int program) { return program / CM; }
static int mate(int rank) { return now->program / CM * CM + rank; }  // in the cluster of this program
static int warp() { return (now->program * PROGRAM_THREADS + now->index) / 32; }
static void __syncwarp() { meet(of_warps[warp()], 32); }
template <class T> static T __shfl_xor_sync(u32, T value, int other) {
  memcpy(now->sent, &value, 4);
  __syncwarp();
  T got;
  memcpy(&got, (now - now->index % 32 + (now->index % 32 ^ other))->sent, 4);
  __syncwarp();
  return got;
}
static int __shfl_sync(u32, int value, int lane) {
  now->sent[0] = value;
  __syncwarp();
  const int got = (now - now->index % 32 + lane)->sent[0];
  __syncwarp();
  return got;
}
static int atomicAdd(int* to, int value) { return (*to += value) - value; }
static void cluster_sync() { meet(of_clusters[cluster_of(now->program)], CM * PROGRAM_THREADS); }
static void __syncthreads() { cluster_sync(); }  // of a cluster of one
static u32 cluster_rank() { return now->program % CM; }

// Static shared memory comes first, the dynamic one behind; barriers are kept apart, by their address.
template <class T> static T* shared_array(u32 offset) { return reinterpret_cast<T*>(own().shared + offset); }
static u32 shared_address(const void* p) { return static_cast<const char*>(p) - own().shared; }
static Barrier& barrier_of(int program, u32 address) { return programs[program].barriers[address / 8]; }
static void barrier_init(u32 address, u32 count) { barrier_of(now->program, address) = {(int)count, (int)count, 0, 0}; }
static void barrier_expect(u32 address, u32 bytes) {
  Barrier& b = barrier_of(now->program, address);
  b.bytes += bytes, --b.pending;
  settle(b);
}
static void barrier_arrive(u32 address, u32 rank) { Barrier& b = barrier_of(mate(rank), address); --b.pending, settle(b); }
static void barrier_arrive_local(u32 address) { barrier_arrive(address, now->program % CM); }
static void barrier_wait(u32 address, u32 parity) {
  give_way();
  while ((barrier_of(now->program, address).phase & 1) == parity) give_way();
}
static std::vector<char> has_waited;
static void wait_for_previous() { has_waited[cluster_of(now->program)] = true; }
static void let_next_start() { if (!has_waited[cluster_of(now->program)]) fail("the next kernel may start before this one's inputs are there"); }

static void fetch_for(u16 ranks, u32 to, const TensorMap& map, u32 barrier, int col, int row, u64) {
  for (int rank = 0; rank < CM; ++rank) {
    if (!(ranks >> rank & 1)) continue;
    const int program = mate(rank);
    on_their_way.push_back([=] {  // of a map that lives as long as the launch
      u16* box = reinterpret_cast<u16*>(programs[program].shared + to);
      for (int r = 0; r < map.box_rows; ++r) {
        for (int c = 0; c < 64; ++c) {
          const bool inside = row + r < map.rows && col + c < map.cols;
          box[r * 64 + c] = inside ? map.data[(size_t)(row + r) * map.cols + col + c] : 0;
        }
      }
      Barrier& b = barrier_of(program, barrier);
      b.bytes -= map.box_rows * 128;
      settle(b);
    });
  }
}
static void fetch(u32 to, const TensorMap& map, u32 barrier, int col, int row, u64 policy) {
  fetch_for(1 << now->program % CM, to, map, barrier, col, row, policy);
}

static u64 descriptor(u32 address) { return address >> 4; }
#if PACKED
// One operand is in the registers of a warp, which are read at once.
static void wgmma(float (&d)[BN / 2], const u32 (&a)[4], u64 b, int add) {
  memcpy(now->sent, a, sizeof a);
  __syncwarp();
  const u16* x = reinterpret_cast<u16*>(own().shared + (b << 4));
  const int lane = now->index % 32;
  float rows[2][16];
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 16; ++k) {
      const u32 pair = (now - lane + lane / 4 * 4 + k % 8 / 2)->sent[half + k / 8 * 2];
      rows[half][k] = widen(k % 2 ? pair >> 16 : pair & 0xFFFF);
    }
  }
  for (int i = 0; i < BN / 2; ++i) {
    float sum = add ? d[i] : 0;
    for (int k = 0; k < 16; ++k) sum += rows[i / 2 % 2][k] * widen(x[(i / 4 * 8 + lane % 4 * 2 + i % 2) * 64 + k]);
    d[i] = sum;
  }
  __syncwarp();
}
#else
static u64 column_descriptor(u32 address, u32 apart) { return address >> 4 | (u64)apart << 32; }
template <int N> static void wgmma(float (&d)[N], u64 a, u64 b, int add) {
  now->open.push_back({d, N, a, b, nullptr, add != 0});
}
template <int N> static void wgmma(float (&d)[N], const u32 (&a)[4], u64 b, int add) {
  now->open.push_back({d, N, 0, b, a, add != 0});
}
// The first operand's rows of this thread: in registers of four lanes each.
static void gather_rows(const Product& p, float (&rows)[2][16]) {
  for (int lane = 0; lane < 4; ++lane) {
    const Thread& owner = *(now - now->index % 4 + lane);
    const Product* same = nullptr;
    for (const Product& other : owner.groups[0]) if (other.b == p.b) same = &other;
    if (!same) fail("the lanes of a warp multiply different things");
    for (int i = 0; i < 8; ++i) {
      rows[i / 2 % 2][i / 4 * 8 + 2 * lane + i % 2] = widen(same->packed[i / 2] >> 16 * (i % 2) & 0xFFFF);
    }
  }
}
// This thread's part of 64 x columns x 16.
static void multiply(const Product& p) {
  const u16 *x = reinterpret_cast<u16*>(own().shared + (p.a << 4));
  const u16 *w = reinterpret_cast<u16*>(own().shared + ((u32)p.b << 4));
  const u32 apart = p.b >> 32;
  float rows[2][16];
  if (p.packed) gather_rows(p, rows);
  for (int i = 0; i < p.count; ++i) {
    const int half = i / 2 % 2, row = now->index % 128 / 32 * 16 + now->index % 32 / 4 + half * 8;
    const int col = i / 4 * 8 + now->index % 4 * 2 + i % 2;
    float sum = p.add ? p.d[i] : 0;
    if (p.packed) {
      const u16* column = w + col / 64 * apart / 2 + col % 64;
      for (int k = 0; k < 16; ++k) sum += rows[half][k] * widen(column[k * 64]);
    } else {
      for (int k = 0; k < 16; ++k) sum += widen(x[row * 64 + k]) * widen(w[col * 64 + k]);
    }
    p.d[i] = sum;
  }
}
static void commit_products() {
  if (!now->open.empty()) now->groups.push_back(now->open), now->open.clear();
}
// Products are done as late as they may be: their operands must be there till then.
static void wait_for_products(size_t left) {
  commit_products();
  __syncwarp();  // the registers of other lanes are read here
  while (now->groups.size() > left) {
    for (const Product& p : now->groups[0]) multiply(p);
    __syncwarp();
    now->groups.erase(now->groups.begin());
    __syncwarp();
  }
  __syncwarp();  // a warp goes on as one
}
#endif
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

#if PACKED
static int min(int a, int b) { return a < b ? a : b; }
static float __uint_as_float(u32 bits) { float f; memcpy(&f, &bits, 4); return f; }
static u32 __float_as_uint(float f) { u32 bits; memcpy(&bits, &f, 4); return bits; }
static u64 policy_evict_normal() { return 0; }
static uint4 load_shared(u32 from) { uint4 v; memcpy(&v, own().shared + from, 16); return v; }
static u32 load_shared_word(u32 from) { u32 v; memcpy(&v, own().shared + from, 4); return v; }
static void store_shared(u32 to, uint4 v) { memcpy(own().shared + to, &v, 16); }
static u32 remote_address(u32 address, u32 rank) { return rank << 20 | address; }
static void store_cluster(u32 to, float a, float b, float c, float d) {
  const float v[4] = {a, b, c, d};
  memcpy(programs[mate(to >> 20)].shared + (to & 0xFFFFF), v, 16);
}
static void fetch_bytes(u32 to, const void* from, u32 count, u32 barrier, u64) {
  const int rank = now->program;
  if (to % 16 || reinterpret_cast<size_t>(from) % 16 || count % 16) fail("a fetch of bytes that do not lie at 16");
  on_their_way.push_back([=] {
    memcpy(programs[rank].shared + to, from, count);
    Barrier& b = barrier_of(rank, barrier);
    b.bytes -= count;
    settle(b);
  });
}
static void bar_sync() { meet(of_consumers[now->program], 256); }
static u32 count_up(u32* counter) { return (*counter)++; }
static void count_reset(u32* counter) { *counter = 0; }
static void count_wait(const u32* counter, u32 count) {
  while (*counter < count) give_way();
  if (*counter > count) fail("more are counted than there are");
}
static u32 transpose_octet(u32 pair) {
  now->sent[0] = pair;
  __syncwarp();
  const int lane = now->index % 32;
  auto of = [&](int row, int col) { return (now - lane + row * 4 + col / 2)->sent[0] >> (col % 2 * 16) & 0xFFFF; };
  const u32 got = of(lane % 4 * 2, lane / 4) | of(lane % 4 * 2 + 1, lane / 4) << 16;
  __syncwarp();
  return got;
}
#endif

#if COLUMNS
static void fetch_box(u32 to, const TensorMap& map, u32 barrier, int x, int y, int z, u64) {
  on_their_way.push_back([=, program = now->program] {
    u16* box = reinterpret_cast<u16*>(programs[program].shared + to);
    for (int c = 0; c < map.box[2]; ++c) {
      for (int b = 0; b < map.box[1]; ++b) {
        for (int a = 0; a < map.box[0]; ++a) {
          const int at[3] = {x + a, y + b, z + c};
          bool inside = true;
          for (int i = 0; i < 3; ++i) inside = inside && at[i] >= 0 && at[i] < map.sizes[i];
          *box++ = inside ? map.data[at[0] + at[1] * map.strides[1] + at[2] * map.strides[2]] : 0;
        }
      }
    }
    Barrier& b = barrier_of(program, barrier);
    b.bytes -= 2 * map.box[0] * map.box[1] * map.box[2];
    settle(b);
  });
}
static Meeting named[16];  // of the only program
static void named_arrive(int name, int count) {
  if (++named[name].there == count) named[name].there = 0, ++named[name].times;
}
static void named_sync(int name, int count) { meet(named[name], count); }
static u64 policy_evict_normal() { return 0; }
static void fence_stores() {}
static void store_shared(u32 to, uint4 v) { memcpy(own().shared + to, &v, 16); }
static void __stcg(float* to, float value) { *to = value; }
static float power_of_2(float x) { return std::exp2(x); }
#define LOWEST (-INFINITY)
#endif

// All threads of clusters, to their end; `start` is a thread's.
static void run_clusters(int first, int count, void (*start)()) {
  first_program = first * CM;
  programs.clear(), programs.resize(count * CM), threads.clear(), threads.resize(count * CM * PROGRAM_THREADS);
  has_waited.assign(count, false), of_clusters.assign(count, {}), of_consumers.assign(count * CM, {});
  of_warps.assign(threads.size() / 32, {});
  for (size_t i = 0; i < threads.size(); ++i) make_ready(threads[i], i % PROGRAM_THREADS, i / PROGRAM_THREADS, start);
  run_to_the_end(threads, now, first_program);
}
static void run_cluster(int cluster, void (*start)()) { run_clusters(cluster, 1, start); }
