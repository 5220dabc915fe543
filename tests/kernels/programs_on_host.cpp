// Runs stream_gemm.cu, wide_dense.cu and wide_gemm.cu on a CPU, some programs at once: each thread is a fiber that gives
// way where it would wait, each fetch arrives at some later time, in any order, swizzled as the tensor memory accelerator
// does it, and products are done as late as they may be. The test puts before this text the launch's constants, threads of
// a program (THREADS, of which MULTIPLYING), programs of a cluster (CLUSTER), those that run at once (AT_ONCE, whole
// clusters) and fibers_on_host.cpp, and the kernel's text (without asm) behind it.

constexpr int REMOTE = 20;

struct TensorMap { const u16* data; int rows, cols, box_rows; };
struct Program { alignas(1024) char shared[PROGRAM_BYTES]; Barrier barriers[64]; Meeting all, multiplying, warps[THREADS / 32]; };
struct Product { float* d; int count; u32 a, b; bool add; };
struct Thread : Fiber {
  std::vector<std::vector<Product>> groups;
  std::vector<Product> open;
  int arrived;
  u32 sent;
};

static Program programs[AT_ONCE];
static std::vector<Thread> threads;
static Thread* now;
static Meeting clusters[AT_ONCE / CLUSTER];

static Program& own() { return programs[now->program]; }
static void __syncwarp() { meet(own().warps[now->index / 32], 32); }
static void __syncthreads() { meet(own().all, THREADS); }
static void bar_sync() { meet(own().multiplying, MULTIPLYING); }
static Meeting& cluster() { return clusters[now->program / CLUSTER]; }
static void cluster_arrive() { now->arrived = arrive(cluster(), CLUSTER * THREADS); }
static void cluster_wait() { while (cluster().times == now->arrived) give_way(); }
static void cluster_sync() { cluster_arrive(), cluster_wait(); }
static u32 cluster_rank() { return now->program % CLUSTER; }
static int first_of_cluster() { return now->program / CLUSTER * CLUSTER; }
template <class T> static T __shfl_xor_sync(u32, T value, int other) {
  memcpy(&now->sent, &value, 4);
  __syncwarp();
  T got;
  memcpy(&got, &(now - now->index % 32 + (now->index % 32 ^ other))->sent, 4);
  __syncwarp();
  return got;
}

// Static shared memory comes first, the dynamic one behind; barriers are kept apart, by their address.
template <class T> static T* shared_array(u32 offset) { return reinterpret_cast<T*>(own().shared + offset); }
static u32 shared_address(const void* p) { return static_cast<const char*>(p) - own().shared; }
static u32 remote_address(u32 address, u32 rank) { return rank << REMOTE | address; }
static void store_cluster(u32 to, float value) {
  if (to >> REMOTE != cluster_rank() && !cluster().times) fail("a program is written to that may not be there");
  memcpy(programs[first_of_cluster() + (to >> REMOTE)].shared + (to & (1 << REMOTE) - 1), &value, 4);
}
static Barrier& barrier_of(int program, u32 address) { return programs[program].barriers[address / 8]; }
static void barrier_init(u32 address, u32 count) { barrier_of(now->program, address) = {(int)count, (int)count, 0, 0}; }
static void barrier_expect(u32 address, u32 bytes) {
  Barrier& b = barrier_of(now->program, address);
  b.bytes += bytes, --b.pending;
  settle(b);
}
static void barrier_arrive(u32 address, u32 rank) {
  Barrier& b = barrier_of(first_of_cluster() + rank, address);
  --b.pending, settle(b);
}
static void barrier_arrive_local(u32 address) { barrier_arrive(address, cluster_rank()); }
static void barrier_wait(u32 address, u32 parity) {
  give_way();
  while ((barrier_of(now->program, address).phase & 1) == parity) give_way();
}
static void wait_for_previous() { give_way(); }
static void let_next_start() {}
static void flag_raise(u32* flag) {
  if (*flag) fail("a flag that is up already");
  *flag = 1;
}
static void flag_lower(u32* flag) { *flag = 0; }
static void flag_wait(const u32* flag) { while (!*flag) give_way(); }

// Of a row of 128 bytes: where its 16 bytes `piece` lie.
static int swizzled(int row, int piece) { return row * 64 + (piece ^ (row & 7)) * 8; }
static void fetch_for(u16 ranks, u32 to, const TensorMap& map, u32 barrier, int col, int row, u64) {
  for (int rank = 0; rank < CLUSTER; ++rank) {
    if (!(ranks >> rank & 1)) continue;
    const int program = first_of_cluster() + rank;
    on_their_way.push_back([=] {
      u16* box = reinterpret_cast<u16*>(programs[program].shared + to);
      for (int r = 0; r < map.box_rows; ++r) {
        for (int c = 0; c < 64; ++c) {
          const bool inside = row + r < map.rows && col + c < map.cols;
          box[swizzled(r, c / 8) + c % 8] = inside ? map.data[(size_t)(row + r) * map.cols + col + c] : 0;
        }
      }
      Barrier& b = barrier_of(program, barrier);
      b.bytes -= map.box_rows * 128;
      settle(b);
    });
  }
}
static void fetch(u32 to, const TensorMap& map, u32 barrier, int col, int row, u64 policy) {
  fetch_for(1 << cluster_rank(), to, map, barrier, col, row, policy);
}

static int min(int a, int b) { return a < b ? a : b; }
static float rsqrtf(float x) { return 1 / std::sqrt(x); }
static u32 scale_pair(u32 values, u32 weights, float& sum) {
  const float low = widen(values & 0xFFFF), high = widen(values >> 16);
  sum += low * low + high * high;
  return narrow(low * widen(weights & 0xFFFF)) | narrow(high * widen(weights >> 16)) << 16;
}
static uint4 load_shared(u32 from) { uint4 v; memcpy(&v, own().shared + from, 16); return v; }
static void store_shared(u32 to, uint4 v) { memcpy(own().shared + to, &v, 16); }
static u32 descriptor(u32 address) {
  if (address % 1024) fail("a tile that begins within an atom of the swizzle");
  return address >> 4;
}
template <int N> static void wgmma(float (&d)[N], u32 a, u32 b, int add) { now->open.push_back({d, N, a, b, add != 0}); }
static float element(u32 descriptor, int row, int k) {
  const u32 address = descriptor << 4, column = address % 128 / 2 + k;
  return widen(reinterpret_cast<u16*>(own().shared + address / 1024 * 1024)[swizzled(row, column / 8) + column % 8]);
}
// This thread's part of 64 x 2 * count x 16.
static void multiply(const Product& p) {
  for (int i = 0; i < p.count; ++i) {
    const int row = now->index % 128 / 32 * 16 + now->index % 32 / 4 + i / 2 % 2 * 8;
    const int col = i / 4 * 8 + now->index % 4 * 2 + i % 2;
    float sum = p.add ? p.d[i] : 0;
    for (int k = 0; k < 16; ++k) sum += element(p.a, row, k) * element(p.b, col, k);
    p.d[i] = sum;
  }
}
static void wait_for_products(size_t left) {
  if (!now->open.empty()) now->groups.push_back(now->open), now->open.clear();
  for (; now->groups.size() > left; now->groups.erase(now->groups.begin())) {
    for (const Product& p : now->groups[0]) multiply(p);
  }
  __syncwarp();  // a warp goes on as one
}
// Two columns of each of four blocks of 8 columns lie in each of 4 threads; after it a thread has one block whole.
static void transpose_quad(u32 (&v)[4], int lane) {
  u32 sent[4][4];
  for (int i = 0; i < 4; ++i) {
    for (int other = 0; other < 4; ++other) sent[other][i] = __shfl_xor_sync(~0u, v[i], other);
  }
  for (int from = 0; from < 4; ++from) v[from] = sent[from ^ lane % 4][lane % 4];
}

// All programs of a launch, AT_ONCE at a time, each thread from `start` on.
static void (*program)();
static void thread_of_program() {
  program();
  now->ended = true;
  give_way();
}
static void run_programs(int num_programs, void (*start)()) {
  srand(1);
  program = start;
  for (int first = 0; first < num_programs; first += AT_ONCE) {
    threads.clear(), threads.resize(AT_ONCE * THREADS);
    for (Meeting& meeting : clusters) meeting = {};
    for (int i = 0; i < AT_ONCE * THREADS; ++i) make_ready(threads[i], i % THREADS, i / THREADS, thread_of_program);
    run_to_the_end(threads, now, first);
  }
}
