// x @ w.T for up to 256 rows of x on Hopper, its weights fetched while the kernel before it still runs. What it computes
// and how it is cut: stream_gemm.py, which puts in front of this text hopper.cu and the launch's constants: BX (rows of
// x a program), RB (blocks of 64 rows of w), KS (64 columns each of a stage), STAGES, CK, MODE, NORM.

enum { STORE, ADD, GLU };

constexpr int ROW_BYTES = 128;  // of a box: as wide as the swizzle, 64 columns
constexpr int W_BOX = 64 * ROW_BYTES, X_BOX = BX * ROW_BYTES;
constexpr int W_BYTES = KS * RB * W_BOX, X_BYTES = KS * X_BOX, STAGE_BYTES = W_BYTES + X_BYTES;
constexpr int CONSUMERS = 128;
constexpr int SUMS = RB * BX / 2;              // a thread's
constexpr int BLOCKS = RB > 1 && MODE == GLU ? 1 : RB;
constexpr int NORM_ROWS = BX < 16 ? 1 : BX / 16;  // rows of x that a thread scales

static_assert(MODE != GLU || RB == 2, "a thread needs a gate and its up value");

extern "C" __global__ void __launch_bounds__(CONSUMERS + 32)
    stream_gemm(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, u16* y,
                const u16* residual, const u16* norm, int num_rows, int num_cols, int stride_y, int steps, int row_tiles,
                float eps) {
  extern __shared__ char raw[];
  __shared__ u64 barriers[2 * STAGES];
  __shared__ float squares[CK][2 * BX];
  const u32 tiles = (shared_address(raw) + 1023) & ~1023u;
  char* after = raw + (tiles - shared_address(raw)) + STAGES * STAGE_BYTES;
  float* sums = reinterpret_cast<float*>(after);  // of the other parts, in the first program of a cluster
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  const u32 part = CK > 1 ? cluster_rank() : 0;
  // Neighbours have the same rows of w.
  const int tile = blockIdx.x / CK, first_k = part * steps * KS * 64;
  const int first_col = tile / row_tiles * 64 * BLOCKS, first_row = tile % row_tiles * BX;

  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, CONSUMERS / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  // Seen before anything is stored in the first program's memory: that it is there.
  if (CK > 1) asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  // The next kernel may come as soon as all programs of this one are there: it takes no room from them.
  let_next_start();

  if (threadIdx.x >= CONSUMERS) {
    if (threadIdx.x == CONSUMERS) {
      const u64 once = policy_evict_first(), again = policy_evict_last();
      auto fetch_w = [&](int step, int stage) {
#pragma unroll
        for (int box = 0; box < KS * RB; ++box) {
          int row = first_col + box % RB * (MODE == GLU ? num_cols : 64);
          fetch(tiles + stage * STAGE_BYTES + box * W_BOX, w_map, full + 8 * stage,
                first_k + (step * KS + box / RB) * 64, row, once);
        }
      };
      auto fetch_x = [&](int step, int stage) {
#pragma unroll
        for (int box = 0; box < KS; ++box) {
          fetch(tiles + stage * STAGE_BYTES + W_BYTES + box * X_BOX, x_map, full + 8 * stage,
                first_k + (step * KS + box) * 64, first_row, again);
        }
      };
      const int early = steps < STAGES ? steps : STAGES;
      for (int s = 0; s < early; ++s) {
        barrier_expect(full + 8 * s, STAGE_BYTES);
        fetch_w(s, s);
      }
      wait_for_previous();
      for (int s = 0; s < early; ++s) fetch_x(s, s);
      Ring at(early);
      for (int step = early; step < steps; ++step, at.next()) {
        barrier_wait(empty + 8 * at.stage, at.parity ^ 1);
        barrier_expect(full + 8 * at.stage, STAGE_BYTES);
        fetch_w(step, at.stage);
        fetch_x(step, at.stage);
      }
    }
    if (CK > 1) {
      asm volatile("barrier.cluster.wait;" ::: "memory");
      cluster_sync();
    }
    return;
  }

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int col_in_block = warp * 16 + lane / 4, row_in_block = lane % 4 * 2;
  u16* scales = reinterpret_cast<u16*>(after + (CK - 1) * SUMS * CONSUMERS * 4);
  if (NORM) {
    // Weights of the norm, too, are there before the kernel before this one ends.
    for (int i = threadIdx.x * 8; i < steps * KS * 64; i += CONSUMERS * 8)
      *reinterpret_cast<uint4*>(scales + i) = *reinterpret_cast<const uint4*>(norm + first_k + i);
    asm volatile("bar.sync 1, 128;" ::: "memory");
  }
  u16 old[MODE == ADD ? SUMS : 1];
  if (MODE == ADD && part == 0) {
    wait_for_previous();
#pragma unroll
    for (int i = 0; i < SUMS; ++i) {
      int block = i / (BX / 2), j = i % (BX / 2) / 4, half = i / 2 % 2, odd = i % 2;
      int row = first_row + 8 * j + row_in_block + odd, col = first_col + 64 * block + col_in_block + 8 * half;
      old[i] = row < num_rows && col < num_cols ? residual[static_cast<u64>(row) * stride_y + col] : 0;
    }
  }

  float acc[RB][BX / 2];
  float square[NORM_ROWS];
#pragma unroll
  for (int i = 0; i < NORM_ROWS; ++i) square[i] = 0.0f;
  Ring at(0);
  u32 before = 0;
  for (int step = 0; step < steps; ++step, at.next()) {
    barrier_wait(full + 8 * at.stage, at.parity);
    const u32 w = tiles + at.stage * STAGE_BYTES, x = w + W_BYTES;
    if (NORM) {
      // In place: 8 columns of a row at a time, each thread of 8 its own of the 128 swizzled bytes.
#pragma unroll
      for (int i = 0; i < KS * BX * 8 / CONSUMERS + (KS * BX * 8 % CONSUMERS != 0); ++i) {
        const int index = threadIdx.x + CONSUMERS * i, row = index / 8 % BX, box = index / 8 / BX;
        if (index >= KS * BX * 8) continue;
        const u32 from = x + box * X_BOX + row * ROW_BYTES + ((index % 8) ^ (row & 7)) * 16;
        uint4 v = load_shared(from);
        const uint4 scale = *reinterpret_cast<const uint4*>(scales + (step * KS + box) * 64 + index % 8 * 8);
        float& sum = square[i % NORM_ROWS];
        v.x = scale_pair(v.x, scale.x, sum);
        v.y = scale_pair(v.y, scale.y, sum);
        v.z = scale_pair(v.z, scale.z, sum);
        v.w = scale_pair(v.w, scale.w, sum);
        store_shared(from, v);
      }
      asm volatile("fence.proxy.async.shared::cta;\nbar.sync 1, 128;" ::: "memory");
    }
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < KS * 4; ++k) {
#pragma unroll
      for (int block = 0; block < RB; ++block) {
        wgmma(acc[block], descriptor(w + (k / 4 * RB + block) * W_BOX) + k % 4 * 2,
              descriptor(x + k / 4 * X_BOX) + k % 4 * 2, step > 0 || k > 0);
      }
    }
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
    if (step > 0 && lane == 0) barrier_arrive_local(before);
    before = empty + 8 * at.stage;
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int block = 0; block < RB; ++block) {
#pragma unroll
    for (int i = 0; i < BX / 2; ++i) asm volatile("" : "+f"(acc[block][i])::"memory");
  }

  if (CK > 1) asm volatile("barrier.cluster.wait;" ::: "memory");
  if (NORM) {
    // Of a row, 8 neighbouring threads hold parts; of few rows, threads of both halves.
#pragma unroll
    for (int i = 0; i < NORM_ROWS; ++i) {
      float sum = square[i];
#pragma unroll
      for (int step = 1; step < 8; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
      if (lane % 8 == 0) {
        const int slot = BX < 16 ? threadIdx.x / 8 : threadIdx.x / 8 + 16 * i;
        store_cluster(CK > 1 ? remote_address(shared_address(&squares[part][slot]), 0) : shared_address(&squares[part][slot]),
                      sum);
      }
    }
  }
  if (CK > 1) {
    if (part > 0) {
      const u32 to = remote_address(shared_address(sums + ((part - 1) * SUMS) * CONSUMERS + threadIdx.x), 0);
#pragma unroll
      for (int i = 0; i < SUMS; ++i) store_cluster(to + i * CONSUMERS * 4, acc[i / (BX / 2)][i % (BX / 2)]);
    }
    cluster_sync();
    if (part > 0) return;
#pragma unroll
    for (int i = 0; i < SUMS; ++i) {
#pragma unroll
      for (int from = 0; from < CK - 1; ++from) acc[i / (BX / 2)][i % (BX / 2)] += sums[(from * SUMS + i) * CONSUMERS + threadIdx.x];
    }
  } else if (NORM) {
    asm volatile("bar.sync 1, 128;" ::: "memory");
  }
#pragma unroll
  for (int j = 0; j < BX / 8; ++j) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int in_tile = 8 * j + row_in_block + odd, row = first_row + in_tile;
      float factor = 1.0f;
      if (NORM) {
        float sum = 0.0f;
#pragma unroll
        for (int from = 0; from < CK; ++from) {
          sum += squares[from][in_tile];
          if (BX < 16) sum += squares[from][in_tile + 8];
        }
        factor = rsqrtf(sum / (steps * KS * 64 * CK) + eps);
      }
      if (row >= num_rows) continue;
      u16* to = y + static_cast<u64>(row) * stride_y;
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = 4 * j + 2 * half + odd, col = first_col + 64 * block + col_in_block + 8 * half;
          float value = acc[block][i] * factor;
          if (MODE == GLU) value = silu_times(value, acc[RB - 1][i] * factor);
          if (MODE == ADD) value += widen(old[block * (BX / 2) + i]);
          if (col < num_cols) to[col] = narrow(value);
        }
      }
    }
  }
}
