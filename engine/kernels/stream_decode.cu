// Attention of one query per request over the paged pool, on Hopper. How the work is cut and what it computes:
// stream_decode.py, which puts in front of this text hopper.cu and the launch's constants: GROUP (query heads of a KV
// head), BLOCK_SIZE, CONTIGUOUS, STAGES.

constexpr int DIM = 128, WARPS = 4, TOKENS = 16;  // of a block: what a warp fetches and multiplies at a time
constexpr int HALF_BYTES = TOKENS * 128, PART_BYTES = 2 * HALF_BYTES, STAGE_BYTES = 2 * PART_BYTES;
constexpr int PASSES = GROUP > 4 ? 2 : 1, PASS_DIMS = DIM / PASSES;  // of the sums that the warps exchange
constexpr int HEAD_STRIDE = PASS_DIMS + 4;                           // apart in the banks
constexpr u32 ALL = ~0u;

// x[2] (+)= a warp's 16 x 16 by 16 x 8.
__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
      " {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void load_matrices(u32 (&a)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ void load_transposed(u32 (&a)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ u32 transpose(u32 matrix) {
  u32 turned;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(matrix));
  return turned;
}

// Of 8 lanes that hold values of the same heads.
__device__ __forceinline__ float largest_of_heads(float x) {
  x = fmaxf(x, __shfl_xor_sync(ALL, x, 4));
  x = fmaxf(x, __shfl_xor_sync(ALL, x, 8));
  return fmaxf(x, __shfl_xor_sync(ALL, x, 16));
}

__device__ __forceinline__ float sum_of_heads(float x) {
  x += __shfl_xor_sync(ALL, x, 4);
  x += __shfl_xor_sync(ALL, x, 8);
  return x + __shfl_xor_sync(ALL, x, 16);
}

struct Items {
  const int* fields;  // rows, begins, ends, chunk numbers, chunks of the row: `capacity` of each
  int capacity;
  __device__ __forceinline__ int row(int i) const { return fields[i]; }
  __device__ __forceinline__ int begin(int i) const { return fields[capacity + i]; }
  __device__ __forceinline__ int end(int i) const { return fields[2 * capacity + i]; }
  __device__ __forceinline__ int chunk(int i) const { return fields[3 * capacity + i]; }
  __device__ __forceinline__ int chunks(int i) const { return fields[4 * capacity + i]; }
};

// How many blocks of [begin, end) are the warp's: every fourth.
__device__ __forceinline__ int num_blocks(int begin, int end, int warp) {
  return ((end - begin + TOKENS - 1) / TOKENS + WARPS - 1 - warp) / WARPS;
}

// The blocks that a warp fetches, through its slot's items in order. All lanes know the same, but each its own slots.
struct Blocks {
  const int* table;
  const int* seq_lens;
  int stride_table, last, warp, lane;
  int item, index, count, begin, newest, slots;
  const int* row_table;

  __device__ __forceinline__ bool left() const { return item < last; }

  __device__ __forceinline__ int token() const { return begin + TOKENS * (warp + WARPS * index); }

  // Whether it holds the row's newest token, which the kernel before this one stores.
  __device__ __forceinline__ bool is_newest() const { return token() + TOKENS > newest; }

  __device__ __forceinline__ void open(const Items& items) {
    for (; item < last; ++item) {
      begin = items.begin(item);
      count = num_blocks(begin, items.end(item), warp);
      if (count > 0) {
        const int row = items.row(item);
        row_table = table + static_cast<long long>(row) * stride_table;
        newest = seq_lens[row] - 1;
        index = 0;
        look_up();
        return;
      }
    }
  }

  // Where the next 32 blocks lie, one a lane.
  __device__ __forceinline__ void look_up() {
    const int at = index + lane, position = begin + TOKENS * (warp + WARPS * at);
    if (at >= count) return;
    slots = CONTIGUOUS ? row_table[0] * BLOCK_SIZE + position
                       : row_table[position / BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE;
  }

  __device__ __forceinline__ int slot() const { return __shfl_sync(ALL, slots, index % 32); }

  __device__ __forceinline__ void next(const Items& items) {
    if (++index == count) {
      ++item;
      open(items);
    } else if (index % 32 == 0) {
      look_up();
    }
  }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, 2)
    stream_decode(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map, const u16* q, u16* out,
                  const int* item_fields, const int* starts, const int* query_loc, const int* seq_lens, const int* table,
                  float* partial, float* stats, int* counters, int capacity, int num_kv_heads, int stride_q_row,
                  int stride_q_head, int stride_out_row, int stride_out_head, int stride_table, float factor) {
  extern __shared__ char raw[];
  __shared__ u64 barriers[WARPS * STAGES];
  __shared__ float all_peaks[2][WARPS][8], all_totals[2][WARPS][8];
  __shared__ int arrived;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u32 tiles = (shared_address(raw) + 1023) & ~1023u, ring = tiles + warp * STAGES * STAGE_BYTES;
  float* sums = reinterpret_cast<float*>(raw + (tiles - shared_address(raw)) + WARPS * STAGES * STAGE_BYTES);
  const u32 full = shared_address(barriers + warp * STAGES);
  const int kv_head = blockIdx.x % num_kv_heads, slot = blockIdx.x / num_kv_heads;
  const Items items{item_fields, capacity};
  const int first = starts[slot], last = starts[slot + 1];
  const u64 once = policy_evict_first();

  if (lane == 0) {
    for (int s = 0; s < STAGES; ++s) barrier_init(full + 8 * s, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();

  Blocks ahead;
  ahead.table = table, ahead.seq_lens = seq_lens, ahead.stride_table = stride_table;
  ahead.item = first, ahead.last = last, ahead.warp = warp, ahead.lane = lane, ahead.slots = 0;
  ahead.open(items);
  auto fetch_next = [&](u32 stage) {
    const int from = ahead.slot();
    if (lane == 0) {
      const u32 to = ring + stage * STAGE_BYTES;
      barrier_expect(full + 8 * stage, STAGE_BYTES);
      fetch_box(to, k_map, full + 8 * stage, 0, from, 2 * kv_head, once);
      fetch_box(to + PART_BYTES, v_map, full + 8 * stage, 0, from, 2 * kv_head, once);
    }
    ahead.next(items);
  };
  // The kernel before this one stores the new tokens' keys and values and no others: those may be on their way by now.
  int filled = 0;
  for (; filled < STAGES && ahead.left() && !ahead.is_newest(); ++filled) fetch_next(filled);
  wait_for_previous();
  let_next_start();
  for (; filled < STAGES && ahead.left(); ++filled) fetch_next(filled);

  // Of the tensor cores' fragments: a lane's tokens (or elements) are `high` and 8 more, its heads `pair` and the next.
  const int high = lane / 4, pair = lane % 4 * 2;
  // Of ldmatrix: the row of 128 bytes whose address the lane gives, and which 16 bytes of it.
  const int k_row = lane % 16, k_col = lane / 16, v_row = lane % 8 + lane / 16 * 8, v_col = lane / 8 % 2;
  Ring at(0);
  for (int item = first; item < last; ++item) {
    const int row = items.row(item), begin = items.begin(item), end = items.end(item);
    const u16* queries = q + static_cast<long long>(query_loc[row]) * stride_q_row;
    u32 query[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int head = kv_head * GROUP + high;
      query[i] = high < GROUP ? *reinterpret_cast<const u32*>(queries + head * stride_q_head + 8 * i + pair) : 0;
    }
    float peak[2] = {LOWEST, LOWEST}, total[2] = {0.0f, 0.0f}, acc[8][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0.0f;

    const int count = num_blocks(begin, end, warp);
    for (int i = 0; i < count; ++i, at.next()) {
      barrier_wait(full + 8 * at.stage, at.parity);
      const u32 k = ring + at.stage * STAGE_BYTES, v = k + PART_BYTES;
      float even[4] = {0.0f, 0.0f, 0.0f, 0.0f}, odd[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int step = 0; step < 8; ++step) {
        u32 a[4];
        const int col = step % 4 * 2 + k_col;
        load_matrices(a, k + step / 4 * HALF_BYTES + k_row * 128 + ((col ^ (k_row & 7)) << 4));
        multiply(step % 2 ? odd : even, a, query[2 * step], query[2 * step + 1]);
      }
      // Tokens of this block that are of the item.
      const int tokens = end - begin - TOKENS * (warp + WARPS * i);
      float scores[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[j] = high + j / 2 * 8 < tokens ? (even[j] + odd[j]) * factor : LOWEST;
      float shrink[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float next = fmaxf(peak[j], largest_of_heads(fmaxf(scores[j], scores[j + 2])));
        shrink[j] = power_of_2(peak[j] - next);
        peak[j] = next;
        scores[j] = power_of_2(scores[j] - next);
        scores[j + 2] = power_of_2(scores[j + 2] - next);
        total[j] = total[j] * shrink[j] + scores[j] + scores[j + 2];
      }
      if (__any_sync(ALL, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
          for (int n = 0; n < 4; ++n) acc[j][n] *= shrink[n % 2];
        }
      }
      const u32 low = transpose(pack(scores[0], scores[1])), upper = transpose(pack(scores[2], scores[3]));
      // Of a block that is not all the item's: what lies behind its end may be anything, and 0 * NaN is NaN.
      u32 keep[2] = {ALL, ALL};
      if (tokens < TOKENS) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int token = pair + 8 * j;
          keep[j] = token + 1 < tokens ? ALL : token < tokens ? 0xFFFFu : 0u;
        }
      }
#pragma unroll
      for (int step = 0; step < 8; ++step) {
        u32 a[4];
        const int col = step % 4 * 2 + v_col;
        load_transposed(a, v + step / 4 * HALF_BYTES + v_row * 128 + ((col ^ (v_row & 7)) << 4));
        a[0] &= keep[0], a[1] &= keep[0], a[2] &= keep[1], a[3] &= keep[1];
        multiply(acc[step], a, low, upper);
      }
      __syncwarp();
      if (ahead.left()) fetch_next(at.stage);
    }

    // The four warps' sums, brought to one maximum. Of two items in turn: who is done may be at the next.
    float(*peaks)[8] = all_peaks[item % 2];
    float(*totals)[8] = all_totals[item % 2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      total[j] = sum_of_heads(total[j]);
      if (high == 0) peaks[warp][pair + j] = peak[j], totals[warp][pair + j] = total[j];
    }
    __syncthreads();
    float own[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float top = peaks[0][pair + j];
#pragma unroll
      for (int w = 1; w < WARPS; ++w) top = fmaxf(top, peaks[w][pair + j]);
      own[j] = power_of_2(peak[j] - top);
    }
    const int chunks = items.chunks(item);
    const long long cell = static_cast<long long>(item) * num_kv_heads + kv_head;
    u16* to = out + static_cast<long long>(query_loc[row]) * stride_out_row + kv_head * GROUP * stride_out_head;
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
      if (pass > 0) __syncthreads();
#pragma unroll
      for (int step = 0; step < 8 / PASSES; ++step) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int head = pair + n % 2, dim = 16 * step + high + n / 2 * 8;
          if (head < GROUP) sums[(warp * GROUP + head) * HEAD_STRIDE + dim] = acc[step + 8 / PASSES * pass][n] * own[n % 2];
        }
      }
      __syncthreads();
      for (int at4 = threadIdx.x * 4; at4 < GROUP * PASS_DIMS; at4 += 128 * WARPS) {
        const int head = at4 / PASS_DIMS, dim = at4 % PASS_DIMS;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
          const float4 part = *reinterpret_cast<const float4*>(&sums[(w * GROUP + head) * HEAD_STRIDE + dim]);
          sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
        }
        float top = peaks[0][head], all = 0.0f;
#pragma unroll
        for (int w = 1; w < WARPS; ++w) top = fmaxf(top, peaks[w][head]);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) all += totals[w][head] * power_of_2(peaks[w][head] - top);
        const int whole = pass * PASS_DIMS + dim;
        if (chunks == 1) {
          const float scale = 1.0f / all;
          const uint2 packed = make_uint2(pack(sum.x * scale, sum.y * scale), pack(sum.z * scale, sum.w * scale));
          *reinterpret_cast<uint2*>(to + head * stride_out_head + whole) = packed;
        } else {
          __stcg(reinterpret_cast<float4*>(partial + (cell * GROUP + head) * DIM + whole), sum);
          if (whole == 0) {
            __stcg(stats + cell * 2 * GROUP + head, top);
            __stcg(stats + cell * 2 * GROUP + GROUP + head, all);
          }
        }
      }
    }
    if (chunks == 1) continue;

    // Of a row in parts the program that comes last merges them.
    __threadfence();
    __syncthreads();
    int* counter = counters + row * num_kv_heads + kv_head;
    if (threadIdx.x == 0) arrived = atomicAdd(counter, 1);
    __syncthreads();
    if (arrived != chunks - 1) continue;
    __threadfence();
    const long long first_cell = cell - static_cast<long long>(items.chunk(item)) * num_kv_heads;
    for (int at4 = threadIdx.x * 4; at4 < GROUP * DIM; at4 += 128 * WARPS) {
      const int head = at4 / DIM, dim = at4 % DIM;
      float top = LOWEST, all = 0.0f;
      for (int c = 0; c < chunks; ++c)
        top = fmaxf(top, __ldcg(stats + (first_cell + c * num_kv_heads) * 2 * GROUP + head));
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
      for (int c = 0; c < chunks; ++c) {
        const long long from = first_cell + c * num_kv_heads;
        const float weight = power_of_2(__ldcg(stats + from * 2 * GROUP + head) - top);
        const float4 part = __ldcg(reinterpret_cast<const float4*>(partial + (from * GROUP + head) * DIM + dim));
        all += weight * __ldcg(stats + from * 2 * GROUP + GROUP + head);
        sum.x += weight * part.x, sum.y += weight * part.y, sum.z += weight * part.z, sum.w += weight * part.w;
      }
      const float scale = 1.0f / all;
      const uint2 packed = make_uint2(pack(sum.x * scale, sum.y * scale), pack(sum.z * scale, sum.w * scale));
      *reinterpret_cast<uint2*>(to + head * stride_out_head + dim) = packed;
    }
    if (threadIdx.x == 0) *counter = 0;
  }
}
