// silu(x @ gate.T) * (x @ up.T) for 65 to 256 rows of x. What it computes and how it is cut: wide_gemm.py, which puts
// in front of this text hopper.cu and the launch's constants: BN (rows of w, half of them gate's), CM (programs of a
// cluster, each with 128 rows of x), STAGES.

constexpr int BM = 128, BK = 64, BOX_ROWS = 64;
constexpr int HALF = BN / 2;
constexpr int ROW_BYTES = BK * 2;  // of a box: as wide as the swizzle
constexpr int X_BYTES = BM * ROW_BYTES, W_BYTES = BN * ROW_BYTES, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int CONSUMERS = 256;
constexpr int BLOCKS = HALF / 8;   // of 8 columns of y

static_assert(HALF % 8 == 0, "a box must be whole swizzle atoms");

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

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
    wide_gemm(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, u16* y, int num_rows,
              int num_cols, int stride_y, int num_tiles, int steps) {
  extern __shared__ char raw[];
  __shared__ u64 barriers[2 * STAGES];
  const u32 tiles = (shared_address(raw) + 1023) & ~1023u;
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  const u32 rank = CM > 1 ? cluster_rank() : 0;
  const int group = blockIdx.x / CM, num_groups = gridDim.x / CM;
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
      const u64 once = policy_evict_first(), again = policy_evict_last();
      auto fetch_w = [&](int tile, int step, int stage) {
        const u32 to = tiles + stage * STAGE_BYTES + X_BYTES, barrier = full + 8 * stage;
        const int gate = tile * HALF, up = num_cols + gate, col = step * BK;
        if (CM == 1) {
          fetch(to, w_map, barrier, col, gate, once);
          fetch(to + W_BYTES / 2, w_map, barrier, col, up, once);
        } else {
          fetch_for((1 << CM) - 1, to + rank * W_BYTES / 2, w_map, barrier, col, rank == 0 ? gate : up, once);
        }
      };
      auto fetch_x = [&](int step, int stage) {
#pragma unroll
        for (int box = 0; box < BM / BOX_ROWS; ++box) {
          fetch(tiles + stage * STAGE_BYTES + box * BOX_ROWS * ROW_BYTES, x_map, full + 8 * stage, step * BK,
                rank * BM + box * BOX_ROWS, again);
        }
      };
      // The weights depend on no kernel: those of the first stages are fetched while the one before this runs.
      const int early = steps < STAGES ? steps : STAGES;
      for (int s = 0; s < early; ++s) {
        barrier_expect(full + 8 * s, STAGE_BYTES);
        fetch_w(group, s, s);
      }
      wait_for_previous();
      for (int s = 0; s < early; ++s) fetch_x(s, s);
      Ring at(early);
      int step = early;
      for (int tile = group; tile < num_tiles; tile += num_groups, step = 0) {
        for (; step < steps; ++step, at.next()) {
          barrier_wait(empty + 8 * at.stage, at.parity ^ 1);
          barrier_expect(full + 8 * at.stage, STAGE_BYTES);
          fetch_w(tile, step, at.stage);
          fetch_x(step, at.stage);
        }
      }
      let_next_start();
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int lane = threadIdx.x % 32, first_row = rank * BM + threadIdx.x / 32 * 16 + lane / 4;
    float acc[BN / 2];  // gate's sums, then up's in the same order
    Ring at(0);
    for (int tile = group; tile < num_tiles; tile += num_groups) {
      u32 before = 0;
      for (int step = 0; step < steps; ++step, at.next()) {
        barrier_wait(full + 8 * at.stage, at.parity);
        const u64 x = descriptor(tiles + at.stage * STAGE_BYTES + warp_group * BOX_ROWS * ROW_BYTES);
        const u64 w = descriptor(tiles + at.stage * STAGE_BYTES + X_BYTES);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < BK / 16; ++k) wgmma(acc, x + 2 * k, w + 2 * k, step > 0 || k > 0);
        asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
        // Lane i tells the cluster's program i, which fetched a part of it, that the stage before is free.
        if (step > 0 && lane < CM) barrier_arrive(before, lane);
        before = empty + 8 * at.stage;
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
      for (int i = 0; i < BN / 2; ++i) asm volatile("" : "+f"(acc[i])::"memory");
      if (lane < CM) barrier_arrive(before, lane);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + 8 * half, col = tile * HALF;
        u16* to = y + static_cast<u64>(row) * stride_y;
        auto pair = [&](int block) {
          const int gate = 4 * block + 2 * half, up = gate + BN / 4;
          return pack(silu_times(acc[gate], acc[up]), silu_times(acc[gate + 1], acc[up + 1]));
        };
#pragma unroll
        for (int block = 0; block + 4 <= BLOCKS; block += 4) {
          u32 v[4] = {pair(block), pair(block + 1), pair(block + 2), pair(block + 3)};
          transpose_quad(v, lane);
          const int from = col + 8 * (block + lane % 4);
          if (row < num_rows && from < num_cols) *reinterpret_cast<uint4*>(to + from) = make_uint4(v[0], v[1], v[2], v[3]);
        }
#pragma unroll
        for (int block = BLOCKS / 4 * 4; block < BLOCKS; ++block) {
          const u32 v = pair(block);
          const int from = col + 8 * block + lane % 4 * 2;
          if (row < num_rows && from < num_cols) *reinterpret_cast<u32*>(to + from) = v;
        }
      }
    }
  }
  // No program may end while another one's fetches or arrivals are on their way to it.
  if (CM > 1) cluster_sync();
}
