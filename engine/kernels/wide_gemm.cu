// Products of many rows of x, bound by arithmetic: y = x @ w.T, or silu(x @ gate.T) * (x @ up.T). What they compute and
// how they are cut: gemm/wide.py (one matrix) and experts/grouped.py (rows by expert), which put in front of this text
// hopper.cu and the launch's constants:
//   BN       rows of w of a program's tile; with GLU half of them are gate's
//   CM       programs of a cluster
//   SHARE_X  they take the same rows of x and neighbouring tiles of w; else the same tile of w and neighbouring rows
//   STAGES   steps that are fetched ahead
//   GLU      as above; else row i of y goes to row order[i], times factors[i]
//   GROUPED  the rows of x are those of several experts, each with a matrix of its own in w

constexpr int BM = 128, BK = 64, BOX_ROWS = 64;
constexpr int HALF = BN / 2;
constexpr int ROW_BYTES = BK * 2;  // of a box: as wide as the swizzle
constexpr int X_BYTES = BM * ROW_BYTES, W_BYTES = BN * ROW_BYTES, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int CONSUMERS = 256;
constexpr int COLS = GLU ? HALF : BN;               // of y, of a program
constexpr int ITEM_ROWS = SHARE_X ? BM : BM * CM;  // of x, of a cluster
constexpr int BLOCKS = COLS / 8;                    // of 8 columns of y
constexpr int BAND = 8;                             // items of one matrix that take a tile of w one beside the other

static_assert(HALF % 8 == 0, "a box must be whole swizzle atoms");
static_assert(CM <= 2, "a tile of w has two boxes, one of x too");
static_assert(GLU || GROUPED, "nothing but experts has an order");

// What a program computes: rows row to end of x, at most BM of them, by the columns of y from col on.
struct Place {
  int expert, row, end, col;
};

// Rows of one expert, up to several items of ITEM_ROWS, the first of which is item `first` of all. What neighbouring
// tiles work on is one span: its items take a tile of w while it is in the cache.
struct Span {
  int expert, begin, end, first;
};

// A tile of all, or a half of it: its first or second BM rows.
struct Work {
  int tile, half;
  bool whole;
};

// The tiles that fill whole rounds of the clusters, and the rest, which are halved where that gives no cluster two.
struct Walk {
  int filled, rest, parts;
  __device__ __forceinline__ Walk(int num_tiles, int num_groups) {
    filled = num_tiles / num_groups * num_groups, rest = num_tiles - filled;
    parts = CM == 2 && !SHARE_X && 2 * rest <= num_groups ? 2 : 1;
  }
  // What is worked on in turn `at` of all; a tile of -1 if nothing is.
  __device__ __forceinline__ Work operator()(int at) const {
    if (at < filled) return {at, 0, true};
    at -= filled;
    if (at >= parts * rest) return {-1, 0, true};
    return {filled + at / parts, at % parts, parts == 1};
  }
};

// Where it lies, in the span of its tile; `num_tiles` of columns has each item.
__device__ __forceinline__ Place locate(const Span& span, const Work& work, int num_tiles, int rank) {
  const int rows = span.end - span.begin, items = (rows + ITEM_ROWS - 1) / ITEM_ROWS;
  const int at = work.tile - span.first * num_tiles, col = at / items, item = at % items;
  // Half a tile is shared out: each program has rows for one warpgroup, which is done in half the time if the other one
  // has none. So is what an item's second half lacks.
  const bool split = CM == 2 && !SHARE_X && (!work.whole || rows - item * ITEM_ROWS <= BM);
  const int share = split ? BM / CM : BM;
  const int row = span.begin + item * ITEM_ROWS + work.half * BM + (SHARE_X ? 0 : rank * share);
  const int end = row + share < span.end ? row + share : span.end;
  return {span.expert, row, end, (SHARE_X ? col * CM + rank : col) * COLS};
}

// Of x, rows: num_rows; of y, columns: num_cols. num_tiles: of columns, of an item. items: int [4, num_items], spans by
// item, an expert of -1 behind the last.
extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
    wide_gemm(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, u16* y,
              const int* items, const int* order, const float* factors, int num_items, int num_rows, int num_cols,
              int stride_y, int num_tiles, int steps) {
  extern __shared__ char raw[];
  __shared__ u64 barriers[2 * STAGES];
  // Of the tile whose first step a stage holds.
  __shared__ Place places[GROUPED ? STAGES : 1];
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

  // Of one matrix: num_tiles of columns for each item of rows. Neighbours in time have few rows and few columns.
  const int items_of_rows = (num_rows + ITEM_ROWS - 1) / ITEM_ROWS, all_tiles = num_tiles * items_of_rows;
  auto only_matrix = [&](int tile) {
    const int before = tile / (BAND * num_tiles) * BAND, rest = tile % (BAND * num_tiles);
    const int left = items_of_rows - before, high = left >= BAND ? BAND : left > 0 ? left : 1;  // none behind the last
    const int row = (before + rest % high) * ITEM_ROWS + static_cast<int>(rank) * BM;
    return Place{0, row, num_rows, rest / high * COLS};
  };

  if (warp_group == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == CONSUMERS) {
      const u64 once = policy_evict_first(), again = policy_evict_last();
      int used = 0;  // items: those before the first without an expert
      for (int beyond = num_items; GROUPED && used < beyond;) {
        const int middle = (used + beyond) / 2;
        if (__ldcg(items + middle) < 0) beyond = middle; else used = middle + 1;
      }
      const Walk walk(used * num_tiles, num_groups);
      auto span_of = [&](const Work& work) {
        if (work.tile < 0) return Span{-1, 0, 0, 0};
        const int* from = items + work.tile / num_tiles;
        return Span{__ldcg(from), __ldcg(from + num_items), __ldcg(from + 2 * num_items), __ldcg(from + 3 * num_items)};
      };
      auto place_of = [&](const Span& span, const Work& work) {
        return span.expert < 0 ? Place{-1, 0, 0, 0} : locate(span, work, num_tiles, rank);
      };
      auto fetch_w = [&](const Place& at, int step, int stage) {
        const u32 to = tiles + stage * STAGE_BYTES + X_BYTES, barrier = full + 8 * stage;
        const int first = at.expert * (GLU ? 2 : 1) * num_cols + at.col, second = first + (GLU ? num_cols : HALF);
        const int col = step * BK;
        if (CM == 1 || SHARE_X) {
          fetch(to, w_map, barrier, col, first, once);
          fetch(to + W_BYTES / 2, w_map, barrier, col, second, once);
        } else {
          fetch_for((1 << CM) - 1, to + rank * W_BYTES / 2, w_map, barrier, col, rank == 0 ? first : second, once);
        }
      };
      auto fetch_x = [&](const Place& at, int step, int stage) {
        const u32 to = tiles + stage * STAGE_BYTES, barrier = full + 8 * stage;
        if (CM > 1 && SHARE_X) {
          const int box = rank * BOX_ROWS;
          fetch_for((1 << CM) - 1, to + box * ROW_BYTES, x_map, barrier, step * BK, at.row + box, again);
        } else {
#pragma unroll
          for (int box = 0; box < BM / BOX_ROWS; ++box) {
            fetch(to + box * BOX_ROWS * ROW_BYTES, x_map, barrier, step * BK, at.row + box * BOX_ROWS, again);
          }
        }
      };
      // The weights depend on no kernel, and which expert's they are was known before the kernel before this one began:
      // those of the first stages are fetched while it runs.
      Place at = GROUPED ? place_of(span_of(walk(group)), walk(group)) : only_matrix(group);
      const int early = at.expert < 0 ? 0 : steps < STAGES ? steps : STAGES;
      if (GROUPED && early > 0) places[0] = at;
      for (int s = 0; s < early; ++s) {
        barrier_expect(full + 8 * s, STAGE_BYTES);
        fetch_w(at, s, s);
      }
      wait_for_previous();
      for (int s = 0; s < early; ++s) fetch_x(at, s, s);
      Ring ring(early);
      int step = early;
      for (int tile = group; GROUPED ? at.expert >= 0 : tile < all_tiles; step = 0) {
        tile += num_groups;
        Span next{};
        if (GROUPED) next = span_of(walk(tile));  // a tile before it is needed
        for (; step < steps; ++step, ring.next()) {
          barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
          if (GROUPED && step == 0) places[ring.stage] = at;
          barrier_expect(full + 8 * ring.stage, STAGE_BYTES);
          fetch_w(at, step, ring.stage);
          fetch_x(at, step, ring.stage);
        }
        at = GROUPED ? place_of(next, walk(tile)) : only_matrix(tile);
      }
      let_next_start();
      if (GROUPED) {
        barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
        places[ring.stage] = at;  // nothing: there is no more
        barrier_arrive_local(full + 8 * ring.stage);
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16 + lane / 4;
    float acc[BN / 2];  // with GLU gate's sums, then up's in the same order
    Ring ring(0);
    for (int tile = group; GROUPED || tile < all_tiles; tile += num_groups) {
      Place at = only_matrix(tile);
      if (GROUPED) {
        barrier_wait(full + 8 * ring.stage, ring.parity);
        at = places[ring.stage];
        __syncwarp();  // all lanes have read it before one gives the stage back
        if (at.expert < 0) break;
        if (at.row + warp_group * BOX_ROWS >= at.end || at.col >= num_cols) {
          for (int step = 0; step < steps; ++step, ring.next()) {
            barrier_wait(full + 8 * ring.stage, ring.parity);
            __syncwarp();  // lanes 0 and 1 speak for all
            if (lane < CM) barrier_arrive(empty + 8 * ring.stage, lane);
          }
          continue;
        }
      }
      int target[2];
      float factor[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        target[half] = at.row + first_row + 8 * half;
        if (!GLU) {
          const int row = target[half] < at.end ? target[half] : at.row;
          target[half] = __ldcg(order + row);
          factor[half] = __ldcg(factors + row);
        }
      }
      u32 before = 0;
      for (int step = 0; step < steps; ++step, ring.next()) {
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
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool exists = at.row + first_row + 8 * half < at.end;
        u16* to = y + static_cast<u64>(target[half]) * stride_y;
        auto pair = [&](int block) {
          const int first = 4 * block + 2 * half, up = first + BN / 4;
          if (!GLU) return pack(factor[half] * acc[first], factor[half] * acc[first + 1]);
          return pack(silu_times(acc[first], acc[up % (BN / 2)]), silu_times(acc[first + 1], acc[(up + 1) % (BN / 2)]));
        };
#pragma unroll
        for (int block = 0; block + 4 <= BLOCKS; block += 4) {
          u32 v[4] = {pair(block), pair(block + 1), pair(block + 2), pair(block + 3)};
          transpose_quad(v, lane);
          const int from = at.col + 8 * (block + lane % 4);
          if (exists && from < num_cols) *reinterpret_cast<uint4*>(to + from) = make_uint4(v[0], v[1], v[2], v[3]);
        }
#pragma unroll
        for (int block = BLOCKS / 4 * 4; block < BLOCKS; ++block) {
          const u32 v = pair(block);
          const int from = at.col + 8 * block + lane % 4 * 2;
          if (exists && from < num_cols) *reinterpret_cast<u32*>(to + from) = v;
        }
      }
    }
  }
  // No program may end while another one's fetches or arrivals are on their way to it.
  if (CM > 1) cluster_sync();
}
