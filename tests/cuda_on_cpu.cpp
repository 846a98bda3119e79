// A CUDA kernel's source as C++: the threads of a block are fibers, each of which runs until it has
// to wait for the rest of its warp or block. Defined by the compiler's options: SOURCE, a file with
// the kernel's body, and the constants of its template.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <ucontext.h>
#include <vector>

#define __shared__ static
#define alignas(bytes)  // MLX's arrays have 8 on the CPU, enough where loads are not of vectors

struct bfloat16 {
  uint16_t bits;
  bfloat16() = default;
  explicit bfloat16(float value) {
    uint32_t x;
    std::memcpy(&x, &value, 4);
    bits = (x + 0x7fff + (x >> 16 & 1)) >> 16;  // to the nearest, to even
  }
  operator float() const {
    const uint32_t x = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &x, 4);
    return value;
  }
};

struct Dim { int x = 1, y = 1, z = 1; };
static Dim threadIdx, blockIdx, blockDim, gridDim;

struct Barrier { int arrived = 0, turns = 0; };
static Barrier warps[32], block;
static std::vector<ucontext_t> fibers;
static std::vector<char> done;
static ucontext_t scheduler;
static float exchanged[1024];

static void wait(Barrier& barrier, int count) {
  const int thread = threadIdx.x, turn = barrier.turns;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    barrier.turns++;
  }
  while (barrier.turns == turn) swapcontext(&fibers[thread], &scheduler);
}

static void __syncthreads() { wait(block, blockDim.x); }

static float __shfl_xor_sync(unsigned, float value, int other) {
  exchanged[threadIdx.x] = value;
  wait(warps[threadIdx.x / 32], 32);
  const float theirs = exchanged[threadIdx.x ^ other];
  wait(warps[threadIdx.x / 32], 32);
  return theirs;
}

using Shape = const int*;
using Strides = const int64_t*;

struct Arguments {
  T *queries, *new_keys, *new_values, *keys, *values, *out;
  const int *padding, *position;
  const float* frequencies;
  Shape keys_shape;
  Strides queries_strides, new_keys_strides, new_values_strides;
};
static Arguments arguments;

static void kernel() {
  const auto [queries_, new_keys_, new_values_, keys_, values_, out, padding, position,
              frequencies, keys_shape, queries_strides, new_keys_strides, new_values_strides] = arguments;
  const T *queries = queries_, *new_keys = new_keys_, *new_values = new_values_;
  const T *keys = keys_, *values = values_;
  const T* product = queries;  // where the three are parts of one
  const Strides product_strides = queries_strides;
#include SOURCE
}

static void run_thread() {
  kernel();
  done[threadIdx.x] = 1;
  swapcontext(&fibers[threadIdx.x], &scheduler);
}

static void run_block() {
  std::vector<std::vector<char>> stacks(blockDim.x, std::vector<char>(1 << 16));
  fibers.assign(blockDim.x, {});
  done.assign(blockDim.x, 0);
  for (int n = 0; n < blockDim.x; n++) {
    getcontext(&fibers[n]);
    fibers[n].uc_stack.ss_sp = stacks[n].data();
    fibers[n].uc_stack.ss_size = stacks[n].size();
    makecontext(&fibers[n], run_thread, 0);
  }
  for (bool left = true; left;) {
    left = false;
    for (int n = blockDim.x - 1; n >= 0; n--) {  // the last first, so that none relies on the first
      if (done[n]) continue;
      left = true;
      threadIdx.x = n;
      swapcontext(&scheduler, &fibers[n]);
    }
  }
}

extern "C" void launch(const Arguments* given, int threads_x, int rows, int block_size) {
  arguments = *given;
  blockDim = {block_size};
  gridDim = {threads_x / block_size, rows};
  for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++) {
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) run_block();
  }
}
