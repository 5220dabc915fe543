
struct Launch { int num_programs, num_rows, num_cols, w_rows, depth, steps, row_tiles, num_slots, num_heads, num_kv_heads; float eps; };
static TensorMap x_map, w_map;
static Launch launch;
static std::vector<u16> x, w, y, norm, head_norms, pool;
static std::vector<long long> slots;
static std::vector<float> angles;

static void start() {
#if TURNS
  const u64 layer = pool.size() / 2;
  const Turn turn = {slots.data(), angles.data(), angles.data() + 64, head_norms.data(), head_norms.data() + 128, pool.data(),
                     pool.data() + layer, 128 * launch.num_kv_heads, 128, launch.num_heads, launch.num_kv_heads, launch.eps};
#endif
  stream_gemm(x_map, w_map, y.data(), y.data(), norm.data(), launch.num_rows, launch.w_rows / (MODE == GLU ? 2 : 1),
              launch.num_cols, launch.steps, launch.row_tiles, launch.eps
#if TURNS
              , turn
#endif
  );
  now->ended = true;
  give_way();
}

template <class T> static void read(std::vector<T>& to, size_t count, FILE* file) {
  to.resize(count);
  if (count && fread(to.data(), sizeof(T), count, file) != count) fail("too little input");
}

// Reads a launch and its operands, runs it, writes y and the pool.
int main(int, char** paths) {
  FILE* file = fopen(paths[1], "rb");
  if (!file || fread(&launch, sizeof launch, 1, file) != 1) fail("no input");
  const size_t depth = launch.depth, rows = launch.num_rows;
  read(x, rows * depth, file), read(w, launch.w_rows * depth, file), read(y, rows * launch.num_cols, file);
  read(norm, depth, file), read(head_norms, 256, file), read(angles, rows * 128, file), read(slots, rows, file);
  read(pool, (size_t)2 * launch.num_slots * launch.num_kv_heads * 128, file);
  x_map = {x.data(), launch.num_rows, launch.depth, BX}, w_map = {w.data(), launch.w_rows, launch.depth, 64};
  srand(1);
  for (int first = 0; first < launch.num_programs; first += CK) {
    threads.clear(), threads.resize(CK * THREADS), cluster = {};
    for (int i = 0; i < CK * THREADS; ++i) {
      Thread& t = threads[i];
      t.index = i % THREADS, t.program = i / THREADS, t.begun = t.ended = false;
      t.stack.resize(1 << 15);
      getcontext(&t.context);
      t.context.uc_stack.ss_sp = t.stack.data(), t.context.uc_stack.ss_size = t.stack.size();
      t.context.uc_link = nullptr;
      makecontext(&t.context, start, 0);
    }
    for (int round = 0, left = 1; left; ++round) {
      if (round == 30000) fail("a wait that never ends");
      left = 0;
      for (Thread& t : threads) {
        if (t.ended) continue;
        ++left;
        now = &t, threadIdx.x = t.index, blockIdx.x = first + t.program;
        go_on(t);
      }
      for (size_t i = on_their_way.size(); i-- > 0;) {
        if (rand() % 3) continue;
        on_their_way[i]();
        on_their_way.erase(on_their_way.begin() + i);
      }
    }
    if (!on_their_way.empty()) fail("a program ended before its fetches");
  }
  FILE* to = fopen(paths[2], "wb");
  fwrite(y.data(), 2, y.size(), to), fwrite(pool.data(), 2, pool.size(), to);
  return fclose(to);
}
