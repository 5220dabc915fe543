
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
  run_programs(launch.num_programs, start);
  FILE* to = fopen(paths[2], "wb");
  fwrite(y.data(), 2, y.size(), to), fwrite(pool.data(), 2, pool.size(), to);
  return fclose(to);
}
