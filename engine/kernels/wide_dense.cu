// y (+)= x @ w.T for many rows of x on Hopper, cut so that all multiprocessors work: K in parts, whose programs exchange
// their sums through memory. What it computes and how it is cut: gemm/dense.py, which puts in front of this text hopper.cu
// and the launch's constants:
//   BN       rows of w of a program's tile
//   CM       programs of a cluster
//   SHARE_X  they take the same rows of x and neighbouring tiles of w; else the same tile of w and neighbouring rows
//   PARTS    of K, each another cluster's
//   APART    clusters with neighbouring columns begin at other steps of their part, and come round to those before
//   STAGES   steps that are fetched ahead
//   MODE

enum { STORE, ADD };

constexpr int BM = 128, BK = 64, BOX_ROWS = 64;
constexpr int HALF = BN / 2;
constexpr int ROW_BYTES = BK * 2;  // of a box: as wide as the swizzle
constexpr int X_BYTES = BM * ROW_BYTES, W_BYTES = BN * ROW_BYTES, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int CONSUMERS = 256;
constexpr int BLOCKS = BN / 8;          // of 8 columns of y; a thread has four sums of each
constexpr int SLICE = BLOCKS / PARTS;  // of these, what each part makes results of

static_assert(HALF % 8 == 0, "a box must be whole swizzle atoms");
static_assert(CM <= 2, "a tile of w has two boxes, one of x too");
static_assert(SLICE * PARTS == BLOCKS, "slices must be whole blocks");

// Where programs leave sums for those with the other parts of K of the same tile; a flag says that a part's are there. The
// flags are 0 before and after a launch.
struct Exchange {
  float4* sums;
  u32* flags;
};

struct Plan {
  int num_rows, num_cols, stride_y;
  int steps;      // of 64 columns, of a part of K
  int col_tiles;  // of a cluster
};

// Results of blocks of a thread's sums in `v`, the first of which is the tile's block `first`.
template <int COUNT>
__device__ __forceinline__ void put(const float* v, u16* y, const u16* residual, const Plan& plan, int first, int row, int col) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool exists = row + 8 * half < plan.num_rows;
    const u64 line = static_cast<u64>(row + 8 * half) * plan.stride_y;
    auto pair = [&](int block, u32 old) {
      const float* two = v + 4 * block + 2 * half;
      if (MODE == ADD) return pack(two[0] + widen(old & 0xFFFFu), two[1] + widen(old >> 16));
      return pack(two[0], two[1]);
    };
#pragma unroll
    for (int block = 0; block + 4 <= COUNT; block += 4) {
      const int from = col + 8 * (first + block + lane % 4);
      const bool inside = exists && from < plan.num_cols;
      u32 out[4], old[4] = {0, 0, 0, 0};
      if (MODE == ADD) {
        if (inside) {
          const uint4 four = *reinterpret_cast<const uint4*>(residual + line + from);
          old[0] = four.x, old[1] = four.y, old[2] = four.z, old[3] = four.w;
        }
        transpose_quad(old, lane);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] = pair(block + i, old[i]);
      transpose_quad(out, lane);
      if (inside) *reinterpret_cast<uint4*>(y + line + from) = make_uint4(out[0], out[1], out[2], out[3]);
    }
#pragma unroll
    for (int block = COUNT / 4 * 4; block < COUNT; ++block) {
      const int from = col + 8 * (first + block) + lane % 4 * 2;
      if (!exists || from >= plan.num_cols) continue;
      const u32 old = MODE == ADD ? *reinterpret_cast<const u32*>(residual + line + from) : 0;
      *reinterpret_cast<u32*>(y + line + from) = pair(block, old);
    }
  }
}

// Gives the others their slices of this part's sums, and adds theirs to its own, in the order of the parts. `tile`: of all
// programs' tiles. Threads without rows give and take nothing.
__device__ __forceinline__ void exchange_sums(float (&acc)[BN / 2], float (&total)[4 * SLICE], const Exchange& exchange,
                                              int tile, int part, bool active) {
  auto place = [&](int from, int to) {
    return exchange.sums + (static_cast<u64>(tile * PARTS + to) * PARTS + from) * SLICE * CONSUMERS + threadIdx.x;
  };
#pragma unroll
  for (int to = 0; to < PARTS; ++to) {
    if (to == part || !active) continue;
    float4* there = place(part, to);
#pragma unroll
    for (int i = 0; i < SLICE; ++i) {
      const float* v = acc + 4 * (to * SLICE + i);
      __stcg(there + i * CONSUMERS, make_float4(v[0], v[1], v[2], v[3]));
    }
  }
  __threadfence();
  asm volatile("bar.sync 1, 256;" ::: "memory");
  // Thread i raises the flag for part i, and waits for that of part i.
  const int other = threadIdx.x;
  if (other < PARTS && other != part) {
    flag_raise(exchange.flags + (tile * PARTS + other) * PARTS + part);
    u32* theirs = exchange.flags + (tile * PARTS + part) * PARTS + other;
    flag_wait(theirs);
    flag_lower(theirs);
  }
  asm volatile("bar.sync 1, 256;" ::: "memory");
  if (!active) return;
#pragma unroll
  for (int i = 0; i < 4 * SLICE; ++i) total[i] = 0.0f;
#pragma unroll
  for (int from = 0; from < PARTS; ++from) {
    if (from == part) {
#pragma unroll
      for (int mine = 0; mine < PARTS; ++mine) {
        if (mine != part) continue;
#pragma unroll
        for (int i = 0; i < 4 * SLICE; ++i) total[i] += acc[4 * mine * SLICE + i];
      }
    } else {
      const float4* there = place(from, part);
#pragma unroll
      for (int i = 0; i < SLICE; ++i) {
        const float4 v = __ldcg(there + i * CONSUMERS);
        total[4 * i] += v.x, total[4 * i + 1] += v.y, total[4 * i + 2] += v.z, total[4 * i + 3] += v.w;
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
    wide_dense(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, u16* y,
               const u16* residual, const __grid_constant__ Exchange exchange, const __grid_constant__ Plan plan) {
  extern __shared__ char raw[];
  __shared__ u64 barriers[2 * STAGES];
  const u32 tiles = (shared_address(raw) + 1023) & ~1023u;
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  const u32 rank = CM > 1 ? cluster_rank() : 0;
  const int cluster = blockIdx.x / CM, part = cluster % PARTS, tile = cluster / PARTS;
  const int row_group = tile / plan.col_tiles, in_cols = tile % plan.col_tiles;
  const int first_row = (SHARE_X ? row_group : row_group * CM + static_cast<int>(rank)) * BM;
  const int first_col = (SHARE_X ? in_cols * CM + static_cast<int>(rank) : in_cols) * BN;
  const int warp_group = threadIdx.x / 128;

  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, CONSUMERS / 32 * CM);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (CM > 1) cluster_sync(); else __syncthreads();

  if (warp_group == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == CONSUMERS) {
      const u64 again = policy_evict_last(), once = plan.num_rows > BM * (SHARE_X ? 1 : CM) ? again : policy_evict_first();
      const int begin = APART ? in_cols * plan.steps / plan.col_tiles : 0;
      auto column_of = [&](int step) {
        const int at = begin + step;
        return (part * plan.steps + (at < plan.steps ? at : at - plan.steps)) * BK;
      };
      auto fetch_w = [&](int step, int stage) {
        const u32 to = tiles + stage * STAGE_BYTES + X_BYTES, barrier = full + 8 * stage;
        const int col = column_of(step);
        if (CM == 1 || SHARE_X) {
          fetch(to, w_map, barrier, col, first_col, once);
          fetch(to + W_BYTES / 2, w_map, barrier, col, first_col + HALF, once);
        } else {
          fetch_for((1 << CM) - 1, to + rank * W_BYTES / 2, w_map, barrier, col, first_col + rank * HALF, once);
        }
      };
      auto fetch_x = [&](int step, int stage) {
        const u32 to = tiles + stage * STAGE_BYTES, barrier = full + 8 * stage;
        const int col = column_of(step);
        if (CM > 1 && SHARE_X) {
          const int box = rank * BOX_ROWS;
          fetch_for((1 << CM) - 1, to + box * ROW_BYTES, x_map, barrier, col, first_row + box, again);
        } else {
#pragma unroll
          for (int box = 0; box < BM / BOX_ROWS; ++box) {
            fetch(to + box * BOX_ROWS * ROW_BYTES, x_map, barrier, col, first_row + box * BOX_ROWS, again);
          }
        }
      };
      // The weights depend on no kernel: those of the first stages are fetched while the one before this runs.
      const int early = plan.steps < STAGES ? plan.steps : STAGES;
      for (int s = 0; s < early; ++s) {
        barrier_expect(full + 8 * s, STAGE_BYTES);
        fetch_w(s, s);
      }
      wait_for_previous();
      for (int s = 0; s < early; ++s) fetch_x(s, s);
      Ring ring(early);
      for (int step = early; step < plan.steps; ++step, ring.next()) {
        barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
        barrier_expect(full + 8 * ring.stage, STAGE_BYTES);
        fetch_w(step, ring.stage);
        fetch_x(step, ring.stage);
      }
      let_next_start();
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int lane = threadIdx.x % 32, row = first_row + threadIdx.x / 32 * 16 + lane / 4;
    // A warpgroup without rows leaves the tensor cores to the other one.
    const bool active = first_row + warp_group * BOX_ROWS < plan.num_rows && first_col < plan.num_cols;
    float acc[BN / 2];
    Ring ring(0);
    if (active) {
      u32 before = 0;
      for (int step = 0; step < plan.steps; ++step, ring.next()) {
        barrier_wait(full + 8 * ring.stage, ring.parity);
        const u64 x = descriptor(tiles + ring.stage * STAGE_BYTES + warp_group * BOX_ROWS * ROW_BYTES);
        const u64 w = descriptor(tiles + ring.stage * STAGE_BYTES + X_BYTES);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < BK / 16; ++k) wgmma(acc, x + 2 * k, w + 2 * k, step > 0 || k > 0);
        asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
        // Lane i tells the cluster's program i, which fetched a part of it, that the stage before is free.
        if (step > 0 && lane < CM) barrier_arrive(before, lane);
        before = empty + 8 * ring.stage;
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
      for (int i = 0; i < BN / 2; ++i) asm volatile("" : "+f"(acc[i])::"memory");
      if (lane < CM) barrier_arrive(before, lane);
    } else {
      for (int step = 0; step < plan.steps; ++step, ring.next()) {
        barrier_wait(full + 8 * ring.stage, ring.parity);
        __syncwarp();  // lanes 0 and 1 speak for all
        if (lane < CM) barrier_arrive(empty + 8 * ring.stage, lane);
      }
    }
    wait_for_previous();
    if constexpr (PARTS == 1) {
      if (active) put<BLOCKS>(acc, y, residual, plan, 0, row, first_col);
    } else {
      float total[4 * SLICE];
      exchange_sums(acc, total, exchange, tile * CM + rank, part, active);
      if (active) put<SLICE>(total, y, residual, plan, part * SLICE, row, first_col);
    }
  }
  // No program may end while another one's fetches or arrivals are on their way to it.
  if (CM > 1) cluster_sync();
}
