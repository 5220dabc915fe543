// Causal attention of several queries per request over the paged pool, on Hopper. What it computes and how the work is
// cut: attention/wide_prefill.py, which puts in front of this text hopper.cu and the launch's constants:
//   GROUP       query heads of a KV head
//   BLOCK_SIZE  slots of a block; CONTIGUOUS: of a block table only the first entry is read
//   TILE        tokens of a step; BOX: of a fetch, a divisor of it
//   STAGES      tiles of keys, and of values, that are fetched ahead
//   TURNS       the two halves of a program take the tensor cores by turns

constexpr int DIM = 128, ROWS = 128, CONSUMERS = 256;
constexpr int QUERIES = ROWS / GROUP;
constexpr int ROW_BYTES = 128;                     // of 64 elements, as wide as the swizzle
constexpr int Q_HALF = ROWS * ROW_BYTES;           // bytes of the queries' first 64 elements
constexpr int K_HALF = TILE * ROW_BYTES;           // of a tile of keys: [half][token]
constexpr int V_BOX = BOX * 2 * ROW_BYTES;         // of a box of values: [box][half][token]
constexpr int TILE_BYTES = 2 * K_HALF;
constexpr int FETCHED_QUERIES = QUERIES * GROUP * 2 * ROW_BYTES;
constexpr int SCORES = TILE / 2, SUMS = DIM / 2;   // of a thread
constexpr int STEPS = TILE / 16;                   // of a product with the values
constexpr int CELL = CONSUMERS * (SUMS + 4);      // numbers that a part leaves
constexpr u32 ALL = ~0u;

static_assert(TILE % BOX == 0 && BOX % 16 == 0 && TILE / BOX <= 32, "a lane for each box");
static_assert(CONTIGUOUS || BLOCK_SIZE % BOX == 0, "a box lies in one block");

// What was computed before this stays before it, and what comes after it after it.
template <int N>
__device__ __forceinline__ void settle(float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

// What a program does at a time: queries of one request for one KV head; -1 behind the last. `query` is the row of q of
// the first one, `end` is behind the last token that they see; the program's tiles are `first` up to `last`.
struct Place {
  int kv_head, row, query, num_queries, first_position, end, first, last, part, parts, cell;
};

struct Work {
  const int* items;  // rows, query blocks, parts, how many there are, their cells: `capacity` of each
  const int* query_loc;
  const int* seq_lens;
  int capacity, num_kv_heads;

  __device__ __forceinline__ Place operator()(int at) const {
    const int item = at / num_kv_heads, row = item < capacity ? items[item] : -1;
    if (row < 0) return Place{-1};
    const int block = items[capacity + item], part = items[2 * capacity + item], parts = items[3 * capacity + item];
    const int cell = items[4 * capacity + item], begin = query_loc[row], count = query_loc[row + 1] - begin;
    const int length = seq_lens[row], first = length - count + block * QUERIES, left = count - block * QUERIES;
    const int end = first + QUERIES < length ? first + QUERIES : length;
    const int tiles = (end + TILE - 1) / TILE;
    return {at % num_kv_heads, row, begin + block * QUERIES, left < QUERIES ? left : QUERIES, first, end,
            tiles * part / parts, tiles * (part + 1) / parts, part, parts, cell};
  }
};

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
    wide_prefill(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                 const __grid_constant__ TensorMap v_map, u16* out, const int* items, const int* query_loc,
                 const int* seq_lens, const int* table, int* counters, float* partial, int capacity, int num_kv_heads,
                 int num_slots, int stride_out_row, int stride_out_head, int stride_table, float factor) {
  extern __shared__ char raw[];
  __shared__ u64 barriers[2 + 4 * STAGES];
  __shared__ Place places[1];
  __shared__ int arrived[1];
  const u32 q_tile = (shared_address(raw) + 1023) & ~1023u;
  const u32 k_tiles = q_tile + 2 * Q_HALF, v_tiles = k_tiles + STAGES * TILE_BYTES;
  const u32 q_full = shared_address(barriers), q_empty = q_full + 8;
  const u32 k_full = q_full + 16, k_empty = k_full + 8 * STAGES;
  const u32 v_full = k_empty + 8 * STAGES, v_empty = v_full + 8 * STAGES;
  const int warp_group = threadIdx.x / 128, lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    barrier_init(q_full, 1);
    barrier_init(q_empty, CONSUMERS / 32);
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(k_full + 8 * s, 1);
      barrier_init(v_full + 8 * s, 1);
      barrier_init(k_empty + 8 * s, CONSUMERS / 32);
      barrier_init(v_empty + 8 * s, CONSUMERS / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  if (warp_group == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x < CONSUMERS + 32) {
      const Work work{items, query_loc, seq_lens, capacity, num_kv_heads};
      const u64 once = policy_evict_first(), again = policy_evict_normal();
      Ring keys(0), values(0);
      Place at = work(blockIdx.x);
      wait_for_previous();
      // What is left goes to whoever comes first: items differ, and the longest ones are taken first.
      auto take = [&] {
        int ticket = 0;
        if (lane == 0) ticket = atomicAdd(counters, 1);
        return work(gridDim.x + __shfl_sync(ALL, ticket, 0));
      };
      for (int round = 0;; ++round) {
        barrier_wait(q_empty, round % 2 ^ 1);
        if (lane == 0) {
          places[0] = at;
          if (at.kv_head < 0) {
            barrier_arrive_local(q_full);
          } else {
            barrier_expect(q_full, FETCHED_QUERIES);
            fetch_box(q_tile, q_map, q_full, 0, at.kv_head * GROUP, at.query, once);
            fetch_box(q_tile + Q_HALF, q_map, q_full, 64, at.kv_head * GROUP, at.query, once);
          }
        }
        if (at.kv_head < 0) break;
        const int* row_table = table + static_cast<long long>(at.row) * stride_table;
        // Where the lane's box of a tile lies; boxes behind the end are behind the pool's end, so that they are zeros.
        auto slot_of = [&](int tile) {
          const int token = tile * TILE + lane * BOX;
          if (tile < at.first || lane >= TILE / BOX || token >= at.end) return num_slots;
          return CONTIGUOUS ? row_table[0] * BLOCK_SIZE + token
                            : row_table[token / BLOCK_SIZE] * BLOCK_SIZE + token % BLOCK_SIZE;
        };
        const int early = at.last - at.first < 3 ? at.last - 1 : at.first + 2;
        int slot = slot_of(at.last - 1), before = 0;
        Place after{};
        for (int tile = at.last - 1; tile >= at.first - 1; --tile) {
          if (tile == early) after = take();  // it has to be there when this item has been fetched
          const int next = slot_of(tile - 1);
          if (tile >= at.first) {
            const u32 to = k_tiles + keys.stage * TILE_BYTES + lane * BOX * ROW_BYTES, barrier = k_full + 8 * keys.stage;
            barrier_wait(k_empty + 8 * keys.stage, keys.parity ^ 1);
            if (lane == 0) barrier_expect(barrier, TILE_BYTES);
            __syncwarp();
            if (lane < TILE / BOX) {
              fetch_box(to, k_map, barrier, 0, slot, 2 * at.kv_head, again);
              fetch_box(to + K_HALF, k_map, barrier, 0, slot, 2 * at.kv_head + 1, again);
            }
            keys.next();
          }
          if (tile + 1 < at.last) {  // the values of the tile before, which are wanted later
            const u32 to = v_tiles + values.stage * TILE_BYTES + lane * V_BOX, barrier = v_full + 8 * values.stage;
            barrier_wait(v_empty + 8 * values.stage, values.parity ^ 1);
            if (lane == 0) barrier_expect(barrier, TILE_BYTES);
            __syncwarp();
            if (lane < TILE / BOX) fetch_box(to, v_map, barrier, 0, before, 2 * at.kv_head, again);
            values.next();
          }
          before = slot, slot = next;
        }
        at = after;
      }
      let_next_start();
      // Who is last leaves them as they were, for the next launch.
      if (lane == 0 && atomicAdd(counters + 1, 1) == gridDim.x - 1) counters[0] = counters[1] = 0;
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    // Of the thread's two rows the first one; the other one is 8 below.
    const int warp_row = threadIdx.x / 32 * 16, first_row = warp_row + lane / 4;
    const u64 q = descriptor(q_tile + warp_group * 64 * ROW_BYTES);
    float scores[SCORES], sums[SUMS], peak[2], total[2], shrink[2];
    u32 weights[STEPS][4];
    Ring keys(0), values(0);

    auto await_turn = [&] { if (TURNS) named_sync(1 + warp_group, CONSUMERS); };
    auto give_turn = [&] { if (TURNS) named_arrive(2 - warp_group, CONSUMERS); };
    auto multiply_keys = [&] {
      const u64 k = descriptor(k_tiles + keys.stage * TILE_BYTES);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int step = 0; step < DIM / 16; ++step) {
        const int half = step / 4, within = step % 4 * 2;
        wgmma(scores, q + half * (Q_HALF >> 4) + within, k + half * (K_HALF >> 4) + within, step > 0);
      }
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    };
    auto multiply_values = [&](int add) {
      const u32 v = v_tiles + values.stage * TILE_BYTES;
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        const int token = 16 * step, from = token / BOX * V_BOX + token % BOX * ROW_BYTES;
        wgmma(sums, weights[step], column_descriptor(v + from, V_BOX / 2), step > 0 || add);
      }
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    };
    auto release = [&](u32 barrier) { if (lane == 0) barrier_arrive_local(barrier); };

    if (TURNS && warp_group == 1) named_arrive(1, CONSUMERS);  // the first half begins
    for (int round = 0;; ++round) {
      barrier_wait(q_full, round % 2);
      const Place at = places[0];
      if (at.kv_head < 0) break;
      // The last token that each row sees; from `whole` on down all rows of the warp see all of a tile.
      const int limit[2] = {at.first_position + first_row / GROUP, at.first_position + (first_row + 8) / GROUP};
      const int whole = (at.first_position + warp_row / GROUP + 1) / TILE;
      peak[0] = peak[1] = LOWEST, total[0] = total[1] = 0.0f;

      // Scores become weights, relative to the largest so far; `shrink`: what that does to earlier ones.
      auto weigh = [&](int tile) {
        if (tile >= whole) {
#pragma unroll
          for (int i = 0; i < SCORES; ++i) {
            const int token = tile * TILE + i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (token > limit[i / 2 % 2]) scores[i] = LOWEST;
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float top[2] = {peak[half], scores[2 * half]}, sum[2] = {0.0f, 0.0f};
#pragma unroll
          for (int i = 0; i < SCORES; i += 4) {
            top[0] = fmaxf(top[0], scores[i + 2 * half]);
            top[1] = fmaxf(top[1], scores[i + 2 * half + 1]);
          }
          float most = fmaxf(top[0], top[1]);
          most = fmaxf(most, __shfl_xor_sync(ALL, most, 1));
          most = fmaxf(most, __shfl_xor_sync(ALL, most, 2));
          // A row may see nothing of the last tile.
          const float anchor = most == LOWEST ? 0.0f : most * factor;
          shrink[half] = power_of_2(peak[half] * factor - anchor);
          peak[half] = most;
#pragma unroll
          for (int i = 0; i < SCORES; i += 4) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              float& score = scores[i + 2 * half + j];
              score = power_of_2(score * factor - anchor);
              sum[j] += score;
            }
          }
          total[half] = total[half] * shrink[half] + (sum[0] + sum[1]);
        }
      };
      auto pack_weights = [&] {
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
#pragma unroll
          for (int j = 0; j < 4; ++j) weights[step][j] = pack(scores[8 * step + 2 * j], scores[8 * step + 2 * j + 1]);
        }
      };

      barrier_wait(k_full + 8 * keys.stage, keys.parity);
      await_turn();
      multiply_keys();
      give_turn();
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      settle(scores);
      release(k_empty + 8 * keys.stage);
      keys.next();
      if (at.last - at.first == 1) release(q_empty);
      weigh(at.last - 1);
      pack_weights();

      // What a box of the last tile has behind the end may be anything, and 0 * NaN is NaN.
      const int seen = at.end - (at.last - 1) * TILE, used = seen < TILE ? seen : TILE;
      const int rest = (used + BOX - 1) / BOX * BOX - used;
      if (rest > 0) {
        barrier_wait(v_full + 8 * values.stage, values.parity);
        const u32 box = v_tiles + values.stage * TILE_BYTES + used / BOX * V_BOX + used % BOX * ROW_BYTES;
        for (int i = threadIdx.x % 128; i < 16 * rest; i += 128) {
          const int half = i / (8 * rest), within = i % (8 * rest);
          store_shared(box + half * (V_BOX / 2) + within * 16, make_uint4(0, 0, 0, 0));
        }
        fence_stores();
        named_sync(3 + warp_group, 128);
      }

      if (at.last - at.first > 1) barrier_wait(k_full + 8 * keys.stage, keys.parity);
      for (int tile = at.last - 2; tile >= at.first; --tile) {
        await_turn();
        multiply_keys();
        barrier_wait(v_full + 8 * values.stage, values.parity);
        multiply_values(tile < at.last - 2);
        give_turn();
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        settle(scores);
        release(k_empty + 8 * keys.stage);
        keys.next();
        if (tile == at.first) release(q_empty);
        weigh(tile);
        settle(scores);
        // Here, for the assembler moves a wait for the tensor cores up to the last loop before it, and the scores are to
        // become weights while they work.
        if (tile > at.first) barrier_wait(k_full + 8 * keys.stage, keys.parity);
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        settle(sums);
        release(v_empty + 8 * values.stage);
        values.next();
#pragma unroll
        for (int i = 0; i < SUMS; ++i) sums[i] *= shrink[i / 2 % 2];
        pack_weights();
      }
      barrier_wait(v_full + 8 * values.stage, values.parity);
      multiply_values(at.last - at.first > 1);
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      settle(sums);
      release(v_empty + 8 * values.stage);
      values.next();

#pragma unroll
      for (int half = 0; half < 2; ++half) {
        total[half] += __shfl_xor_sync(ALL, total[half], 1);
        total[half] += __shfl_xor_sync(ALL, total[half], 2);
      }
      if (at.parts > 1) {
        const int first = (at.cell - at.part) * num_kv_heads + at.kv_head;
        auto cell_of = [&](int part) {
          return partial + static_cast<long long>(first + part * num_kv_heads) * CELL + threadIdx.x;
        };
        float* own = cell_of(at.part);
#pragma unroll
        for (int i = 0; i < SUMS; ++i) __stcg(own + i * CONSUMERS, sums[i]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          __stcg(own + (SUMS + half) * CONSUMERS, peak[half]);
          __stcg(own + (SUMS + 2 + half) * CONSUMERS, total[half]);
        }
        __threadfence();
        named_sync(5, CONSUMERS);
        if (threadIdx.x == 0) arrived[0] = atomicAdd(counters + 2 + first, 1);
        named_sync(5, CONSUMERS);
        if (arrived[0] != at.parts - 1) continue;
        __threadfence();
        if (threadIdx.x == 0) counters[2 + first] = 0;
        // In order, so that the result does not depend on who was last.
        peak[0] = peak[1] = LOWEST, total[0] = total[1] = 0.0f;
        for (int part = 0; part < at.parts; ++part) {
#pragma unroll
          for (int half = 0; half < 2; ++half) peak[half] = fmaxf(peak[half], __ldcg(cell_of(part) + (SUMS + half) * CONSUMERS));
        }
#pragma unroll
        for (int i = 0; i < SUMS; ++i) sums[i] = 0.0f;
        for (int part = 0; part < at.parts; ++part) {
          const float* from = cell_of(part);
          float weight[2];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            weight[half] = power_of_2((__ldcg(from + (SUMS + half) * CONSUMERS) - peak[half]) * factor);
            total[half] += weight[half] * __ldcg(from + (SUMS + 2 + half) * CONSUMERS);
          }
#pragma unroll
          for (int i = 0; i < SUMS; ++i) sums[i] += weight[i / 2 % 2] * __ldcg(from + i * CONSUMERS);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float share = 1.0f / total[half];
        const int row = first_row + 8 * half, query = row / GROUP;
        const bool exists = query < at.num_queries && row < QUERIES * GROUP;
        u16* to = out + static_cast<long long>(at.query + query) * stride_out_row;
        to += (at.kv_head * GROUP + row % GROUP) * stride_out_head;
#pragma unroll
        for (int block = 0; block < DIM / 8; block += 4) {
          u32 v[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int first = 4 * (block + j) + 2 * half;
            v[j] = pack(sums[first] * share, sums[first + 1] * share);
          }
          transpose_quad(v, lane);
          if (exists) *reinterpret_cast<uint4*>(to + 8 * (block + lane % 4)) = make_uint4(v[0], v[1], v[2], v[3]);
        }
      }
    }
  }
}
