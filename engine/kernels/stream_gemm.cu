// x @ w.T for up to 256 rows of x on Hopper, its weights fetched while the kernel before it still runs. What it computes
// and how it is cut: gemm/stream.py, which puts in front of this text hopper.cu and the launch's constants: BX (rows of
// x a program), RB (blocks of 64 rows of w), KS (64 columns each of a stage), STAGES, CK, MODE, NORM, PER_SM. With PACKED
// (gemm/packed_stream.py) w has 4 bits, in GROUPS groups a stage. With TURNS w is queries, keys and values, of which a
// program has a head of 128 rows; with HEAD_NORM heads of queries and keys have a norm.

#ifndef TURNS
#define TURNS 0
#endif

enum { STORE, ADD, GLU };

constexpr int ROW_BYTES = 128;  // of a box: as wide as the swizzle, 64 columns
constexpr int X_BOX = BX * ROW_BYTES;
#if PACKED
constexpr int CODES = 64 * 128 / 2, CHUNK = CODES + 4 * 64 * GROUPS;  // of 64 rows and 128 columns
constexpr int W_BYTES = RB * CHUNK;
#else
constexpr int W_BOX = 64 * ROW_BYTES, W_BYTES = KS * RB * W_BOX;
#endif
// Boxes are swizzled in atoms of 1,024 bytes; x comes first, since chunks are no multiple of that.
constexpr int X_BYTES = KS * X_BOX, STAGE_BYTES = (X_BYTES + W_BYTES + 1023) / 1024 * 1024;
constexpr int CONSUMERS = 128;
constexpr int SUMS = RB * BX / 2;              // a thread's
constexpr int BLOCKS = RB > 1 && MODE == GLU && !PACKED ? 1 : RB;
constexpr int BLOCK_COLS = MODE == GLU && PACKED ? 32 : 64;  // of y
[[maybe_unused]] constexpr int NORM_ROWS = BX < 16 ? 1 : BX / 16;  // rows of x that a thread scales

// Few rows of x are multiplied by the warps' own instructions, whose least width is theirs: they come without fences and
// waits, and x goes through registers, where the norm is applied.
#define BY_WARPS (PACKED && BX <= 16)
#if PACKED
static_assert(KS == 2, "a stage is a chunk of 128 columns");

// A code in the low bits of the mantissa of 128 (1,024 in float16) is that much more, and so is its zero point: their
// difference is exact.
#if FLOAT16
constexpr u32 BASE = 0x64006400;
#define SUBTRACT "sub.rn.f16x2"
#else
constexpr u32 BASE = 0x43004300;
#define SUBTRACT "sub.rn.bf16x2"
#endif

// Eight codes of 4 bits, less `zeros`, as the tensor cores' operand: 16 rows x 16 columns over a warp.
__device__ __forceinline__ void unpack(u32 codes, const u32 (&zeros)[2], u32 (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    u32 v;
    asm("lop3.b32 %0, %1, 0x000F000F, %2, 0xEA;" : "=r"(v) : "r"(codes >> (4 * i)), "n"(BASE));
    asm(SUBTRACT " %0, %1, %2;" : "=r"(a[i]) : "r"(v), "r"(zeros[i % 2]));
  }
}

#if FLOAT16
#define MULTIPLY "mul.rn.f16x2"
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#else
#define MULTIPLY "mul.rn.bf16x2"
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#endif

// d += a @ b.T of a warp: 16 x 16 by 8 x 16.
__device__ __forceinline__ void multiply(float* d, const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(MMA " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four blocks of 8 rows x 16 bytes, thread i giving the address of row i % 8 of block i / 8.
__device__ __forceinline__ void load_blocks(u32 from, u32& v0, u32& v1, u32& v2, u32& v3) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v0), "=r"(v1), "=r"(v2), "=r"(v3)
               : "r"(from)
               : "memory");
}
#else
static_assert(MODE != GLU || RB == 2, "a thread needs a gate and its up value");
static_assert(!TURNS || RB == 2, "a thread needs both elements of a pair, 64 apart in a head");
#endif

#if TURNS
// What becomes of the heads: where the tokens' keys and values go, by how much they are turned (64 cosines and sines a
// token, `stride_angle` apart), weights of the norms.
struct Turn {
  const long long* slots;
  const float *cos, *sin;
  const u16 *q_norm, *k_norm;
  u16 *keys, *values;
  long long stride_slot;
  int stride_angle, num_heads, num_kv_heads;
  float eps;
};
#endif

extern "C" __global__ void __launch_bounds__(CONSUMERS + 32, PER_SM)
    stream_gemm(const __grid_constant__ TensorMap x_map,
#if PACKED
                const char* chunks,
#else
                const __grid_constant__ TensorMap w_map,
#endif
                u16* y, const u16* residual, const u16* norm, int num_rows, int num_cols, int stride_y, int steps, int row_tiles,
                float eps
#if TURNS
                , const __grid_constant__ Turn turn
#endif
    ) {
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
  const int first_col = tile / row_tiles * BLOCK_COLS * BLOCKS, first_row = tile % row_tiles * BX;

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
        const u32 to = tiles + stage * STAGE_BYTES + X_BYTES;
#if PACKED
#pragma unroll
        for (int block = 0; block < RB; ++block) {
          const u64 row = tile / row_tiles * RB + block;
          fetch_bytes(to + block * CHUNK, chunks + ((row * CK + part) * steps + step) * CHUNK, CHUNK, full + 8 * stage, once);
        }
#else
#pragma unroll
        for (int box = 0; box < KS * RB; ++box) {
          int row = first_col + box % RB * (MODE == GLU ? num_cols : 64);
          fetch(to + box * W_BOX, w_map, full + 8 * stage, first_k + (step * KS + box / RB) * 64, row, once);
        }
#endif
      };
      auto fetch_x = [&](int step, int stage) {
#pragma unroll
        for (int box = 0; box < KS; ++box) {
          fetch(tiles + stage * STAGE_BYTES + box * X_BOX, x_map, full + 8 * stage,
                first_k + (step * KS + box) * 64, first_row, again);
        }
      };
      const int early = steps < STAGES ? steps : STAGES;
      for (int s = 0; s < early; ++s) {
        barrier_expect(full + 8 * s, X_BYTES + W_BYTES);
        fetch_w(s, s);
      }
      wait_for_previous();
      for (int s = 0; s < early; ++s) fetch_x(s, s);
      Ring at(early);
      for (int step = early; step < steps; ++step, at.next()) {
        barrier_wait(empty + 8 * at.stage, at.parity ^ 1);
        barrier_expect(full + 8 * at.stage, X_BYTES + W_BYTES);
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
#if !TURNS
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
#else
  // Of the first program of a cluster; what only depends on the step comes while the weights do.
  constexpr int ROWS = BX / 4;  // of x, a thread's
  constexpr bool EARLY = BX < 64;  // more rows leave no registers for it
  const int head = first_col / 128;
  const bool is_turned = head < turn.num_heads + turn.num_kv_heads;
  auto row_of = [&](int i) { return first_row + i / 2 * 8 + row_in_block + i % 2; };
  auto angle = [&](const float* of, int i, int half) {
    return of[static_cast<u64>(min(row_of(i), num_rows - 1)) * turn.stride_angle + col_in_block + 8 * half];
  };
  float cosines[EARLY ? ROWS : 1][2], sines[EARLY ? ROWS : 1][2], weights[2][2];
  long long slots[EARLY ? ROWS : 1];
  if (part == 0) {
    wait_for_previous();
#pragma unroll
    for (int i = 0; EARLY && i < ROWS; ++i) {
      slots[i] = turn.slots[min(row_of(i), num_rows - 1)];
#pragma unroll
      for (int half = 0; half < 2; ++half) cosines[i][half] = angle(turn.cos, i, half), sines[i][half] = angle(turn.sin, i, half);
    }
    if (HEAD_NORM && is_turned) {
      const u16* from = head < turn.num_heads ? turn.q_norm : turn.k_norm;
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[i / 2][i % 2] = widen(from[64 * (i / 2) + col_in_block + 8 * (i % 2)]);
    }
  }
#endif

  float acc[RB][BX / 2];
  Ring at(0);
#if BY_WARPS
  constexpr int TILES = BX / 8, STEPS = 8 / GROUPS;  // of 8 rows of x; of 16 columns in a group
#pragma unroll
  for (int i = 0; i < SUMS; ++i) acc[i / (BX / 2)][i % (BX / 2)] = 0.0f;
  float of_row[TILES] = {};
  for (int step = 0; step < steps; ++step, at.next()) {
    barrier_wait(full + 8 * at.stage, at.parity);
    const u32 x = tiles + at.stage * STAGE_BYTES, w = x + X_BYTES;
    u32 b[8][TILES][2];
#pragma unroll
    for (int k = 0; k < 8; k += 2) {
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        const int row = tile * 8 + lane % 8, column = k % 4 * 2 + lane / 8;
        load_blocks(x + k / 4 * X_BOX + row * ROW_BYTES + (column ^ (row & 7)) * 16, b[k][tile][0], b[k][tile][1],
                    b[k + 1][tile][0], b[k + 1][tile][1]);
      }
    }
    if (NORM) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const u32 scale = *reinterpret_cast<const u32*>(scales + step * 128 + k * 16 + half * 8 + lane % 4 * 2);
#pragma unroll
          for (int tile = 0; tile < TILES; ++tile) {
            u32& two = b[k][tile][half];
            const float low = widen(two & 0xFFFFu), high = widen(two >> 16);
            of_row[tile] += low * low + high * high;
            asm(MULTIPLY " %0, %1, %2;" : "=r"(two) : "r"(two), "r"(scale));
          }
        }
      }
    }
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
      for (int block = 0; block < RB; ++block) {
        const u32 from = w + block * CHUNK;
        float sums_of[2][BX / 2] = {};
        float scale[2];
        u32 zeros[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const u32 both = load_shared_word(from + CODES + 4 * (64 * group + col_in_block + 8 * half));
          scale[half] = __uint_as_float(both & ~15u);
          zeros[half] = (both & 15u) * 0x00010001u | BASE;
        }
#pragma unroll
        for (int k = 0; k < STEPS; k += STEPS < 4 ? 2 : 4) {
          const int column = group * STEPS + k;
          // A thread's four words of a box are its codes of 16 columns each.
          const uint4 four = load_shared(from + (column / 4 * CONSUMERS + threadIdx.x) * 16);
          const u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
          for (int i = 0; i < (STEPS < 4 ? 2 : 4); ++i) {
            u32 a[4];
            unpack(words[column % 4 + i], zeros, a);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
              multiply(sums_of[i % 2] + 4 * tile, a, b[column + i][tile][0], b[column + i][tile][1]);
          }
        }
#pragma unroll
        for (int j = 0; j < BX / 2; ++j) acc[block][j] += scale[j / 2 % 2] * (sums_of[0][j] + sums_of[1][j]);
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive_local(empty + 8 * at.stage);
  }
#else
  float square[NORM_ROWS];
#pragma unroll
  for (int i = 0; i < NORM_ROWS; ++i) square[i] = 0.0f;
  u32 before = 0;
  auto apply_norm = [&](int step, u32 x) {
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
  };
#if PACKED
  // While the tensor cores multiply a unit, up to 64 columns of one group, the next is unpacked to other registers.
  constexpr int DEPTH = GROUPS < 4 ? 4 : 2, UNITS = 8 / DEPTH;  // steps of 16 columns
  float group_sums[RB][BX / 2];
  u32 scale_of[RB][2], a[2][RB][DEPTH][4];
#pragma unroll
  for (int i = 0; i < SUMS; ++i) acc[i / (BX / 2)][i % (BX / 2)] = 0.0f;
  auto add_group = [&] {
#pragma unroll
    for (int i = 0; i < SUMS; ++i) {
      const int block = i / (BX / 2), j = i % (BX / 2);
      asm volatile("" : "+f"(group_sums[block][j])::"memory");
      acc[block][j] += __uint_as_float(scale_of[block][j / 2 % 2]) * group_sums[block][j];
    }
  };
  for (int step = 0; step < steps; ++step, at.next()) {
    const u32 x = tiles + at.stage * STAGE_BYTES, w = x + X_BYTES;
    u32 zeros[RB][2], next_scale[RB][2];
#pragma unroll
    for (int unit = 0; unit < UNITS; ++unit) {
      const bool begins = unit * DEPTH % (8 / GROUPS) == 0;
      if (unit == 0) {
        barrier_wait(full + 8 * at.stage, at.parity);
        if (NORM) apply_norm(step, x);
      }
#pragma unroll
      for (int block = 0; block < RB; ++block) {
        const u32 from = w + block * CHUNK;
        if (begins) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = 64 * (unit * DEPTH * GROUPS / 8) + col_in_block + 8 * half;
            const u32 both = load_shared_word(from + CODES + 4 * row);
            next_scale[block][half] = both & ~15u;
            zeros[block][half] = (both & 15u) * 0x00010001u | BASE;
          }
        }
        // A thread's four words of a box are its codes of 16 columns each.
        const uint4 four = load_shared(from + (unit * DEPTH / 4 * CONSUMERS + threadIdx.x) * 16);
        const u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int k = 0; k < DEPTH; ++k) unpack(words[unit * DEPTH % 4 + k], zeros[block], a[unit % 2][block][k]);
      }
      if (unit > 0 || step > 0) {
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        if (begins) add_group();
        if (unit == 0 && lane == 0) barrier_arrive_local(before);
      }
      if (begins) {
#pragma unroll
        for (int i = 0; i < RB; ++i) scale_of[i][0] = next_scale[i][0], scale_of[i][1] = next_scale[i][1];
      }
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int k = 0; k < DEPTH; ++k) {
        const int column = unit * DEPTH + k;
#pragma unroll
        for (int block = 0; block < RB; ++block) {
          wgmma(group_sums[block], a[unit % 2][block][k], descriptor(x + column / 4 * X_BOX) + column % 4 * 2,
                !begins || k > 0);
        }
      }
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    }
    before = empty + 8 * at.stage;
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  add_group();
#else
  for (int step = 0; step < steps; ++step, at.next()) {
    barrier_wait(full + 8 * at.stage, at.parity);
    const u32 x = tiles + at.stage * STAGE_BYTES, w = x + X_BYTES;
    if (NORM) apply_norm(step, x);
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
#endif
#endif

  if (CK > 1) asm volatile("barrier.cluster.wait;" ::: "memory");
  if (NORM) {
#if BY_WARPS
    // Every warp has seen all of x; of a row, four neighbouring threads hold parts.
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      float sum = of_row[tile];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const int slot = 8 * tile + lane / 4;
      if (warp == 0 && lane % 4 == 0) {
        store_cluster(CK > 1 ? remote_address(shared_address(&squares[part][slot]), 0) : shared_address(&squares[part][slot]),
                      sum);
      }
    }
#else
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
#endif
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
  auto factor_of = [&](int in_tile) {
    if (!NORM) return 1.0f;
    float sum = 0.0f;
#pragma unroll
    for (int from = 0; from < CK; ++from) {
      sum += squares[from][in_tile];
      if (BX < 16 && !BY_WARPS) sum += squares[from][in_tile + 8];
    }
    return rsqrtf(sum / (steps * KS * 64 * CK) + eps);
  };
#if TURNS
  // Rounded where the product and the rotation are launches of their own (rope.py): before each of norm and rotation.
  auto rounded = [](float value) { return widen(narrow(value)); };
  auto sum_of = [&](int block, int i, int half) -> float& { return acc[block][i / 2 * 4 + 2 * half + i % 2]; };
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    const float factor = factor_of(i / 2 * 8 + row_in_block + i % 2);
#pragma unroll
    for (int k = 0; k < 4; ++k) sum_of(k / 2, i, k % 2) = rounded(sum_of(k / 2, i, k % 2) * factor);
  }
  if (HEAD_NORM && is_turned) {
    // Of a head, 8 lanes of each warp hold parts.
    __shared__ float head_squares[4][BX];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      float sum = 0.0f;
#pragma unroll
      for (int k = 0; k < 4; ++k) sum += sum_of(k / 2, i, k % 2) * sum_of(k / 2, i, k % 2);
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
      if (lane < 4) head_squares[warp][i / 2 * 8 + row_in_block + i % 2] = sum;
    }
    asm volatile("bar.sync 1, 128;" ::: "memory");
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int row = i / 2 * 8 + row_in_block + i % 2;
      const float sum = head_squares[0][row] + head_squares[1][row] + head_squares[2][row] + head_squares[3][row];
      const float factor = 1.0f / sqrtf(sum / 128 + turn.eps);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float& value = sum_of(k / 2, i, k % 2);
        value = rounded(rounded(value * factor) * weights[k / 2][k % 2]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    const int row = row_of(i);
    if (row >= num_rows) continue;
    const int kv_head = head - turn.num_heads;  // of keys, behind them of values
    u16* to = y + static_cast<u64>(row) * stride_y + head * 128;
    if (kv_head >= 0) {
      to = is_turned ? turn.keys + kv_head * 128 : turn.values + (kv_head - turn.num_kv_heads) * 128;
      to += (EARLY ? slots[i] : turn.slots[row]) * turn.stride_slot;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float first = sum_of(0, i, half), second = sum_of(1, i, half);
      float cosine = 1.0f, sine = 0.0f;
      if (is_turned) {
        cosine = EARLY ? cosines[i][half] : angle(turn.cos, i, half);
        sine = EARLY ? sines[i][half] : angle(turn.sin, i, half);
      }
      to[col_in_block + 8 * half] = narrow(first * cosine - second * sine);
      to[64 + col_in_block + 8 * half] = narrow(second * cosine + first * sine);
    }
  }
#else
#pragma unroll
  for (int j = 0; j < BX / 8; ++j) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int in_tile = 8 * j + row_in_block + odd, row = first_row + in_tile;
      const float factor = factor_of(in_tile);
      if (row >= num_rows) continue;
      u16* to = y + static_cast<u64>(row) * stride_y;
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
        for (int half = 0; half < (MODE == GLU && PACKED ? 1 : 2); ++half) {
          const int i = 4 * j + 2 * half + odd;
          int col = first_col + BLOCK_COLS * block + col_in_block + 8 * half;
          float value = acc[block][i] * factor;
#if PACKED
          // Of 16 rows of w the first 8 are gate's, the others up's.
          if (MODE == GLU) {
            col = first_col + BLOCK_COLS * block + warp * 8 + lane / 4;
            value = silu_times(value, acc[block][i + 2] * factor);
          }
#else
          if (MODE == GLU) value = silu_times(value, acc[RB - 1][i] * factor);
#endif
          if (MODE == ADD) value += widen(old[block * (BX / 2) + i]);
          if (col < num_cols) to[col] = narrow(value);
        }
      }
    }
  }
#endif
}
