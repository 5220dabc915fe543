// x @ w.T for many rows of x on Hopper, w of 4 bits. What it computes and how it is cut: gemm/packed_wide.py, which puts
// in front of this text hopper.cu and the launch's constants: BN (rows of x a tile), UNITS (blocks of 64 rows of w that
// a warpgroup has sums for), SHARED (whether a tile has one block less than 2 * UNITS), CW (programs of a cluster that
// have the same rows of x), CK (parts of K, each by CW programs of a cluster), EVEN (clusters have equal shares of all
// tiles' steps), GROUPS (a chunk's), STAGES, MODE, FLOAT16.

enum { STORE, ADD, GLU };

constexpr int ROW_BYTES = 128;  // of a box: as wide as the swizzle, 64 columns
constexpr int X_BOX = BN * ROW_BYTES, X_BYTES = 2 * X_BOX;
constexpr int CODES = 64 * 128 / 2, CHUNK = CODES + 4 * 64 * GROUPS;  // of 64 rows and 128 columns
constexpr int BLOCKS = 2 * UNITS - SHARED;  // of a tile
constexpr int STAGE_BYTES = (X_BYTES + BLOCKS * CHUNK + 1023) / 1024 * 1024;
constexpr int CONSUMERS = 256;
constexpr int PLACES = BN / 8;  // a thread has four sums of each 8 rows of x
constexpr int BLOCK_COLS = MODE == GLU ? 32 : 64, WARP_COLS = BLOCK_COLS / 4;  // of y
constexpr int TURN = MODE == GLU ? 4 : 2;  // places whose results become 16 bytes of y in each thread

static_assert(BN % 32 == 0 && BN / CW % 8 == 0 && (!SHARED || (UNITS > 1 && BN % 64 == 0)), "whole turns and atoms");
static_assert(CK == 1 || !EVEN, "K is cut in one way");

struct Plan {
  int num_rows, num_cols, stride_y;
  int steps;       // of 128 columns, of a part of K
  int num_blocks;  // of 64 rows of w
  int row_tiles, col_tiles;
  int row_group;  // tiles of rows that take turns
  int share, more;  // EVEN: steps of a cluster, and how many clusters have one more
};

struct Task {
  int first_block, first_row;
};

__device__ __forceinline__ Task task_of(const Plan& plan, int index, int mate) {
  const int in_group = plan.row_group * plan.col_tiles, group = index / in_group, rest = index % in_group;
  const int before = group * plan.row_group, wide = min(plan.row_group, plan.row_tiles - before);
  return {(rest / wide * CW + mate) * BLOCKS, (before + rest % wide) * BN};
}

// Steps of one tile, or some of them: what a cluster does at a time.
struct Piece {
  int index, first, count;
};

// The pieces of a cluster, one after another. EVEN: its share of the steps of all tiles, which may begin and end within
// one: first the rest of a tile, whose sums it hands on, then whole ones, then the first steps of one, or some of them.
struct Walk {
  int at, end;
  __device__ __forceinline__ Walk(const Plan& plan, int cluster) {
    at = EVEN ? begin_of(plan, cluster) : cluster;
    end = EVEN ? begin_of(plan, cluster + 1) : plan.row_tiles * plan.col_tiles;
  }
  static __device__ __forceinline__ int begin_of(const Plan& plan, int cluster) {
    return cluster * plan.share + min(cluster, plan.more);
  }
  __device__ __forceinline__ bool ended() const { return at >= end; }
  __device__ __forceinline__ Piece piece(const Plan& plan) const {
    if (!EVEN) return {at, 0, plan.steps};
    const int index = at / plan.steps, first = at - index * plan.steps;
    return {index, first, min(plan.steps - first, end - at)};
  }
  __device__ __forceinline__ void next(const Piece& piece, int num_clusters) { at += EVEN ? piece.count : num_clusters; }
};

// A code in the low bits of the mantissa of 128 (1,024 in float16) is that much more, and so is its zero point.
#if FLOAT16
constexpr u32 BASE = 0x64006400;
#define PAIR "f16x2"
#else
constexpr u32 BASE = 0x43004300;
#define PAIR "bf16x2"
#endif

// Of two rows of w, each value twice: scales in two parts, since one has fewer bits than scales may have; zero points.
struct Rows {
  u32 high[2], low[2], zeros[2];
};

__device__ __forceinline__ Rows rows_from(u32 first, u32 second) {
  Rows rows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const u32 both = half ? second : first;
    const float scale = __uint_as_float(both & ~15u);
    rows.high[half] = pack(scale, scale);
    const float rest = scale - widen(static_cast<u16>(rows.high[half]));
    rows.low[half] = pack(rest, rest);
    rows.zeros[half] = (both & 15u) * 0x00010001u | BASE;
  }
  return rows;
}

// Eight codes as the tensor cores' operand, 16 rows x 16 columns over a warp: (code - zero) * scale, rounded once. The
// difference is exact.
__device__ __forceinline__ void unpack(u32 codes, const Rows& rows, u32 (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    u32 v, small;
    asm("lop3.b32 %0, %1, 0x000F000F, %2, 0xEA;" : "=r"(v) : "r"(codes >> (4 * i)), "n"(BASE));
    asm("sub.rn." PAIR " %0, %0, %1;" : "+r"(v) : "r"(rows.zeros[i % 2]));
    asm("mul.rn." PAIR " %0, %1, %2;" : "=r"(small) : "r"(v), "r"(rows.low[i % 2]));
    asm("fma.rn." PAIR " %0, %1, %2, %3;" : "=r"(a[i]) : "r"(v), "r"(rows.high[i % 2]), "r"(small));
  }
}

// A warpgroup's sums of a tile. ODD: the last block is both warpgroups', 64 columns of each chunk each.
template <bool ODD>
__device__ __forceinline__ void multiply(float (&acc)[UNITS][BN / 2], Ring& at, u32 tiles, u32 full, u32 empty, int steps,
                                         int warp_group, int first_rank) {
  constexpr int OWN = UNITS - ODD, TURNS = 2 * OWN + ODD;
  constexpr int BUFFERS = TURNS % 2 ? 3 : 2;  // one is filled while the tensor cores read another
  const int thread = threadIdx.x % 128, lane = thread % 32, first_col = thread / 32 * 16 + lane / 4;
  u32 a[BUFFERS][4][4], before = 0;
#pragma unroll
  for (int i = 0; i < UNITS * BN / 2; ++i) acc[i / (BN / 2)][i % (BN / 2)] = 0.0f;
#pragma unroll 1
  for (int step = 0; step < steps; ++step, at.next()) {
    barrier_wait(full + 8 * at.stage, at.parity);
    const u32 x = tiles + at.stage * STAGE_BYTES, w = x + X_BYTES;
    auto chunk_of = [&](int turn) { return w + (turn < 2 * OWN ? warp_group * OWN + turn / 2 : 2 * OWN) * CHUNK; };
    auto box_of = [&](int turn) { return turn < 2 * OWN ? turn % 2 : warp_group; };
    uint4 codes[TURNS];
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) codes[turn] = load_shared(chunk_of(turn) + (box_of(turn) * 128 + thread) * 16);
    Rows rows;
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
      const int box = box_of(turn), unit = turn / 2;
      const u32 words[4] = {codes[turn].x, codes[turn].y, codes[turn].z, codes[turn].w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (GROUPS == 1 ? turn % 2 == 0 && k == 0 : k % (8 / GROUPS) == 0) {
          const u32 from = chunk_of(turn) + CODES + 4 * (64 * ((box * 4 + k) * GROUPS / 8) + first_col);
          rows = rows_from(load_shared_word(from), load_shared_word(from + 32));
        }
        unpack(words[k], rows, a[turn % BUFFERS][k]);
      }
      const u64 rows_of_x = descriptor(x + box * X_BOX);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int k = 0; k < 4; ++k) wgmma(acc[unit], a[turn % BUFFERS][k], rows_of_x + 2 * k, 1);
      asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
      // Lane i tells the program that fetched a part of the rows of x that the stage before is free.
      if (turn == 0 && step > 0 && lane < CW) barrier_arrive(before, first_rank + lane);
    }
    before = empty + 8 * at.stage;
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < UNITS * BN / 2; ++i) asm volatile("" : "+f"(acc[i / (BN / 2)][i % (BN / 2)])::"memory");
  if (lane < CW) barrier_arrive(before, first_rank + lane);
}

// Results of `COUNT` places of a warp, 16 columns of w by 8 rows of x each, from sums in `v`.
template <int COUNT>
__device__ __forceinline__ void put(const float* v, u16* y, const u16* residual, const Plan& plan, int block, int first_row) {
  constexpr int PIECES = COUNT / TURN, MOST = EVEN ? 4 : 8, AT_ONCE = PIECES < MOST ? PIECES : MOST;  // for the registers
  static_assert(COUNT % TURN == 0, "whole turns");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, quad = lane % 4;
  const int col = block * BLOCK_COLS + warp * WARP_COLS + (MODE == GLU ? 0 : quad % 2 * 8);
  const int row = first_row + lane / 4 + 8 * (MODE == GLU ? quad : quad / 2);
  auto there = [&](int piece) { return row + 8 * TURN * piece < plan.num_rows && col < plan.num_cols; };
  auto place = [&](int piece) { return static_cast<u64>(row + 8 * TURN * piece) * plan.stride_y + col; };
#pragma unroll
  for (int first = 0; first < PIECES; first += AT_ONCE) {
    uint4 old[AT_ONCE];
    if (MODE == ADD) {
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        old[i] = make_uint4(0, 0, 0, 0);
        if (first + i < PIECES && there(first + i)) old[i] = *reinterpret_cast<const uint4*>(residual + place(first + i));
      }
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      if (first + i >= PIECES) continue;
      const float* sums = v + 4 * TURN * (first + i);
      u32 out[4];
      if (MODE == ADD) {
        u32 was[4] = {old[i].x, old[i].y, old[i].z, old[i].w};
        transpose_quad(was, lane);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const u32 pair = transpose_octet(was[j]);
          out[j] = pack(sums[2 * j] + widen(pair & 0xFFFFu), sums[2 * j + 1] + widen(pair >> 16));
        }
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          // Of 16 rows of w the first 8 are gate's, the others up's.
          if (MODE == GLU) out[j] = pack(silu_times(sums[4 * j], sums[4 * j + 2]), silu_times(sums[4 * j + 1], sums[4 * j + 3]));
          else out[j] = pack(sums[2 * j], sums[2 * j + 1]);
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) out[j] = transpose_octet(out[j]);
      transpose_quad(out, lane);
      if (there(first + i)) *reinterpret_cast<uint4*>(y + place(first + i)) = make_uint4(out[0], out[1], out[2], out[3]);
    }
  }
}

// The sums of a tile in all warpgroups become its results.
template <bool ODD>
__device__ __forceinline__ void finish(float (&acc)[UNITS][BN / 2], u32 tiles, u32 swap, u16* y, const u16* residual,
                                       const Plan& plan, const Task& task, int warp_group, int part, int mate) {
  constexpr int OWN = UNITS - ODD, HALF = BN / 4;
  if (MODE == ADD) wait_for_previous();
  auto block_of = [&](int unit) { return task.first_block + (unit < OWN ? warp_group * OWN + unit : 2 * OWN); };
  auto row_of = [&](int unit) { return task.first_row + (unit < OWN ? 0 : warp_group * (BN / 2)); };
  if (CK == 1) {
#pragma unroll
    for (int unit = 0; unit < OWN; ++unit) put<PLACES>(acc[unit], y, residual, plan, block_of(unit), row_of(unit));
  }
  float half[ODD && CK > 1 ? HALF : 1];
  if constexpr (ODD) {
    // Of the block that both have, one takes the first half of the rows of x, the other the second.
    float(&both)[BN / 2] = acc[UNITS - 1];
    const u32 swap_at = swap + threadIdx.x % 128 * 16;
    auto give = [&](int from, int i) {
      store_shared(swap_at + i * 512, make_uint4(__float_as_uint(both[from + i]), __float_as_uint(both[from + i + 1]),
                                                 __float_as_uint(both[from + i + 2]), __float_as_uint(both[from + i + 3])));
    };
    auto take = [&](int from, int i) {
      const uint4 got = load_shared(swap_at + i * 512);
      both[from + i] += __uint_as_float(got.x), both[from + i + 1] += __uint_as_float(got.y);
      both[from + i + 2] += __uint_as_float(got.z), both[from + i + 3] += __uint_as_float(got.w);
    };
    auto finish_half = [&](int from) {
      if (CK == 1) {
        put<PLACES / 2>(both + from, y, residual, plan, block_of(UNITS - 1), row_of(UNITS - 1));
      } else {
#pragma unroll
        for (int i = 0; i < HALF; ++i) half[i] = both[from + i];
      }
    };
    if (warp_group == 0) {
      asm volatile("bar.sync 1, 256;" ::: "memory");
#pragma unroll
      for (int i = 0; i < HALF; i += 4) take(0, i), give(HALF, i);
      asm volatile("bar.sync 1, 256;" ::: "memory");
      finish_half(0);
    } else {
#pragma unroll
      for (int i = 0; i < HALF; i += 4) give(0, i);
      asm volatile("bar.sync 1, 256;\nbar.sync 1, 256;" ::: "memory");
#pragma unroll
      for (int i = 0; i < HALF; i += 4) take(HALF, i);
      finish_half(HALF);
    }
  }
  if (CK == 1) return;
  // Each part of K sums up one slice of the places, in the memory of the stages, which all have read.
  constexpr int SLICE = (2 * OWN + ODD) * (PLACES / 2) / CK, RUN = ODD || SLICE > PLACES ? 4 : SLICE;
  static_assert(SLICE * CK * 2 == (2 * OWN + ODD) * PLACES && SLICE % RUN == 0 && PLACES % RUN == 0, "whole slices");
  static_assert(CK == 1 || (CK - 1) * SLICE * CONSUMERS * 16 <= STAGES * STAGE_BYTES, "slices must fit into the stages");
  auto sums_of = [&](int at) { return at < OWN * PLACES ? acc[at / PLACES] + at % PLACES * 4 : half + (at - OWN * PLACES) * 4; };
  cluster_sync();
#pragma unroll
  for (int to = 0; to < CK; ++to) {
    if (to == part) continue;
    const u32 slice = tiles + ((part - (part > to)) * SLICE * CONSUMERS + threadIdx.x) * 16;
    const u32 there = remote_address(slice, to * CW + mate);
#pragma unroll
    for (int i = 0; i < SLICE; ++i) {
      const float* sums = sums_of(to * SLICE + i);
      store_cluster(there + i * CONSUMERS * 16, sums[0], sums[1], sums[2], sums[3]);
    }
  }
  cluster_sync();
#pragma unroll
  for (int mine = 0; mine < CK; ++mine) {
    if (mine != part) continue;
#pragma unroll
    for (int i = 0; i < SLICE; i += RUN) {
      float total[4 * RUN];
#pragma unroll
      for (int j = 0; j < 4 * RUN; ++j) total[j] = sums_of(mine * SLICE + i)[j];
#pragma unroll
      for (int j = 0; j < RUN; ++j) {
#pragma unroll
        for (int from = 0; from < CK - 1; ++from) {
          const uint4 got = load_shared(tiles + ((from * SLICE + i + j) * CONSUMERS + threadIdx.x) * 16);
          total[4 * j] += __uint_as_float(got.x), total[4 * j + 1] += __uint_as_float(got.y);
          total[4 * j + 2] += __uint_as_float(got.z), total[4 * j + 3] += __uint_as_float(got.w);
        }
      }
      const int unit = (mine * SLICE + i) / PLACES, at = (mine * SLICE + i) % PLACES;
      put<RUN>(total, y, residual, plan, block_of(unit), row_of(unit) + 8 * at);
    }
  }
}

// Where clusters that have steps of one tile exchange its sums: each program has two places, one for the tile that its
// share begins in and one for the tile that it ends in, and two counters: of the tile whose first steps it has, who has
// written and who has read. They are 0 before and after a launch.
struct Exchange {
  float4* sums;
  u32* counters;
};

__device__ __forceinline__ float4* place_of(const Exchange& exchange, int program, bool at_end) {
  float4* place = exchange.sums + static_cast<u64>(2 * program + at_end) * (UNITS * PLACES * CONSUMERS) + threadIdx.x;
  asm volatile("" : "+l"(place));  // or it would be computed anew for each of its elements
  return place;
}

// The clusters that have steps of a tile: `count` of them end with it or within it, at the same time. One more, if any,
// had its last steps first, and is at work on other tiles.
struct Team {
  int first, count;
  bool has_rest;
  __device__ __forceinline__ Team(const Plan& plan, int tile, int cluster, int num_clusters) {
    const int begin = tile * plan.steps, end = begin + plan.steps;
    for (first = cluster; Walk::begin_of(plan, first) > begin;) --first;
    for (count = 1; first + count < num_clusters && Walk::begin_of(plan, first + count + 1) <= end;) ++count;
    has_rest = first + count < num_clusters && Walk::begin_of(plan, first + count) < end;
  }
};

// All sums of a program, to be read by those who end in the tile.
__device__ __forceinline__ void hand_on(const float (&acc)[UNITS][BN / 2], const Exchange& exchange, int head) {
  float4* to = place_of(exchange, blockIdx.x, false);
#pragma unroll
  for (int i = 0; i < UNITS * PLACES; ++i) {
    const float* from = acc[i / PLACES] + i % PLACES * 4;
    __stcg(to + i * CONSUMERS, make_float4(from[0], from[1], from[2], from[3]));
  }
  __threadfence();
  asm volatile("bar.sync 1, 256;" ::: "memory");
  if (threadIdx.x == 0) count_up(exchange.counters + 2 * head);
}

// Each of a team's programs sums up and writes a slice of the tile.
__device__ __forceinline__ void finish_together(float (&acc)[UNITS][BN / 2], const Exchange& exchange, u16* y,
                                                const u16* residual, const Plan& plan, const Task& task, const Team& team,
                                                int cluster, int mate, int warp_group) {
  constexpr int PIECES = UNITS * PLACES / TURN;  // 16 bytes of y of each thread
  const int me = cluster - team.first, first = (me * PIECES + team.count - 1) / team.count;
  const int last = ((me + 1) * PIECES + team.count - 1) / team.count;
  auto is_mine = [&](int piece) { return piece >= first && piece < last; };
  float4* to = place_of(exchange, blockIdx.x, true);
#pragma unroll
  for (int i = 0; i < UNITS * PLACES; ++i) {
    const float* from = acc[i / PLACES] + i % PLACES * 4;
    if (!is_mine(i / TURN)) __stcg(to + i * CONSUMERS, make_float4(from[0], from[1], from[2], from[3]));
  }
  u32* counters = exchange.counters + 2 * (team.first * CW + mate);
  __threadfence();
  asm volatile("bar.sync 1, 256;" ::: "memory");
  if (threadIdx.x == 0) count_up(counters);
  count_wait(counters, team.count + team.has_rest);
#pragma unroll 1
  for (int other = 0; other < team.count + team.has_rest; ++other) {
    if (other == me) continue;
    const float4* from = place_of(exchange, (team.first + other) * CW + mate, other < team.count);
#pragma unroll
    for (int i = 0; i < UNITS * PLACES; ++i) {
      float4 got = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (is_mine(i / TURN)) got = __ldcg(from + i * CONSUMERS);
      float* sums = acc[i / PLACES] + i % PLACES * 4;
      sums[0] += got.x, sums[1] += got.y, sums[2] += got.z, sums[3] += got.w;
    }
  }
  if (MODE == ADD) wait_for_previous();
#pragma unroll
  for (int piece = 0; piece < PIECES; ++piece) {
    const int unit = piece * TURN / PLACES, at = piece * TURN % PLACES;
    if (!is_mine(piece)) continue;
    put<TURN>(acc[unit] + at * 4, y, residual, plan, task.first_block + warp_group * UNITS + unit, task.first_row + 8 * at);
  }
  asm volatile("bar.sync 1, 256;" ::: "memory");
  if (threadIdx.x == 0 && count_up(counters + 1) + 1 == team.count) count_reset(counters), count_reset(counters + 1);
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
    wide_packed(const __grid_constant__ TensorMap x_map, const char* chunks, u16* y, const u16* residual,
                const __grid_constant__ Exchange exchange, const __grid_constant__ Plan plan) {
  extern __shared__ char raw[];
  __shared__ u64 barriers[2 * STAGES];
  const u32 tiles = (shared_address(raw) + 1023) & ~1023u;
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  const u32 rank = CW * CK > 1 ? cluster_rank() : 0;
  const int mate = rank % CW, part = rank / CW;
  const int cluster = blockIdx.x / (CW * CK), num_clusters = gridDim.x / (CW * CK);
  const int warp_group = threadIdx.x / 128;

  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, CONSUMERS / 32 * CW);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (CW * CK > 1) cluster_sync(); else __syncthreads();

  if (warp_group == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == CONSUMERS) {
      const u64 again = policy_evict_last(), weights = plan.row_tiles > 1 ? policy_evict_normal() : policy_evict_first();
      auto fetch_w = [&](const Task& task, int step, int stage) {
        barrier_expect(full + 8 * stage, X_BYTES + BLOCKS * CHUNK);
#pragma unroll 1
        for (int i = 0; i < BLOCKS; ++i) {
          const u64 block = min(task.first_block + i, plan.num_blocks - 1);
          fetch_bytes(tiles + stage * STAGE_BYTES + X_BYTES + i * CHUNK,
                      chunks + ((block * CK + part) * plan.steps + step) * CHUNK, CHUNK, full + 8 * stage, weights);
        }
      };
      auto fetch_x = [&](const Task& task, int step, int stage) {
#pragma unroll
        for (int box = 0; box < 2; ++box) {
          const u32 to = tiles + stage * STAGE_BYTES + box * X_BOX + mate * (X_BOX / CW);
          const int col = ((part * plan.steps + step) * 2 + box) * 64, row = task.first_row + mate * (BN / CW);
          if (CW == 1) fetch(to, x_map, full + 8 * stage, col, row, again);
          else fetch_for(((1 << CW) - 1) << (part * CW), to, x_map, full + 8 * stage, col, row, again);
        }
      };
      // The weights depend on no kernel: those of the first stages are fetched while the one before this runs.
      Walk walk(plan, cluster);
      Piece piece = walk.piece(plan);
      Task task = task_of(plan, piece.index, mate);
      const int early = piece.count < STAGES ? piece.count : STAGES;
      for (int s = 0; s < early; ++s) fetch_w(task, piece.first + s, s);
      wait_for_previous();
      for (int s = 0; s < early; ++s) fetch_x(task, piece.first + s, s);
      Ring at(early);
      for (int done = early;; done = 0) {
        for (; done < piece.count; ++done, at.next()) {
          barrier_wait(empty + 8 * at.stage, at.parity ^ 1);
          fetch_w(task, piece.first + done, at.stage);
          fetch_x(task, piece.first + done, at.stage);
        }
        walk.next(piece, num_clusters);
        if (walk.ended()) break;
        piece = walk.piece(plan);
        task = task_of(plan, piece.index, mate);
      }
      let_next_start();
    }
    if (CK > 1) {
      cluster_sync();
      cluster_sync();
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    Ring at(0);
    Walk walk(plan, cluster);
#pragma unroll 1
    while (!walk.ended()) {
      float acc[UNITS][BN / 2];
      multiply<SHARED>(acc, at, tiles, full, empty, walk.piece(plan).count, warp_group, part * CW);
      asm volatile("" : "+r"(walk.at));  // what follows is computed again, and takes no registers meanwhile
      const Piece piece = walk.piece(plan);
      walk.next(piece, num_clusters);
      if (EVEN && piece.count < plan.steps) {
        const Team team(plan, piece.index, cluster, num_clusters);
        if (cluster == team.first + team.count) {
          hand_on(acc, exchange, team.first * CW + mate);
        } else {
          const Task task = task_of(plan, piece.index, mate);
          finish_together(acc, exchange, y, residual, plan, task, team, cluster, mate, warp_group);
        }
        continue;
      }
      const Task task = task_of(plan, piece.index, mate);
      finish<SHARED>(acc, tiles, tiles + STAGES * STAGE_BYTES, y, residual, plan, task, warp_group, part, mate);
    }
  }
  // No program may end while another one's fetches or arrivals are on their way to it.
  if (CW > 1 && CK == 1) cluster_sync();
}
