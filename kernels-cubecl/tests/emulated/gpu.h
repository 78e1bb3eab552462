// A GPU's multiprocessor for CUDA C++ as CubeCL writes it: one thread of the host per thread of the block.
//
// What the matrix products use and no more. Instructions follow NVIDIA's PTX ISA: `mma` and `ldmatrix` (sections on
// matrix fragments), `wgmma` (shared memory layout, matrix descriptor), `cp.async`, mbarriers, and the tensor memory
// accelerator with its 128-byte swizzle. A kernel that is right here is right where the hardware is as this reads it.
#pragma once

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include <pthread.h>

using byte = unsigned char;

// The program declares these itself.
#define int8_t gpu_int8_t
#define int16_t gpu_int16_t
#define int32_t gpu_int32_t
#define int64_t gpu_int64_t
#define uint8_t gpu_uint8_t
#define uint16_t gpu_uint16_t
#define uint32_t gpu_uint32_t
#define uint64_t gpu_uint64_t
#define __global__
#define __device__
#define __shared__
#define __grid_constant__
#define __align__(bytes)
#define __launch_bounds__(threads)

using std::max;
using std::min;

struct Index {
    unsigned x, y, z;
};
static thread_local Index threadIdx, blockIdx;

// The program's shared memory starts at this address of the shared window.
constexpr long WINDOW = 1024;
constexpr long SHARED = 232448;
extern char *const shared_memory;

[[noreturn]] static void fail(const char *what) {
    std::printf("%s\n", what);
    std::fflush(stdout);
    std::_Exit(1);
}

static pthread_barrier_t block_barrier, warp_barriers[32];

static void __syncthreads() { pthread_barrier_wait(&block_barrier); }
static void __syncwarp() { pthread_barrier_wait(&warp_barriers[threadIdx.x / 32]); }

static std::mutex barriers;
static std::condition_variable phase_ended;

namespace cuda {
enum thread_scope { thread_scope_block };

// An mbarrier: eight bytes of shared memory.
template <thread_scope> struct barrier {
    using arrival_token = int;
    unsigned short expected;
    unsigned short pending : 15;
    unsigned short phase : 1;
    int bytes;

    void end_phase_if_complete() {
        if (pending == 0 && bytes == 0) {
            pending = expected;
            phase ^= 1;
            phase_ended.notify_all();
        }
    }
    int arrive(int count = 1, int expected_bytes = 0) {
        std::lock_guard<std::mutex> lock(barriers);
        if (pending < count) fail("more arrivals than a barrier waits for");
        pending -= count;
        bytes += expected_bytes;
        end_phase_if_complete();
        return 0;
    }
    void complete(int copied) {
        std::lock_guard<std::mutex> lock(barriers);
        bytes -= copied;
        end_phase_if_complete();
    }
    void wait_parity(bool parity) {
        std::unique_lock<std::mutex> lock(barriers);
        phase_ended.wait(lock, [&] { return phase != parity; });
    }
};
template <thread_scope S> void init(barrier<S> *at, int expected) {
    at->expected = at->pending = expected;
    at->phase = at->bytes = 0;
}

namespace device {
template <class B> int barrier_arrive_tx(B &at, int count, int bytes) { return at.arrive(count, bytes); }

namespace experimental {
inline void fence_proxy_async_shared_cta() {}

// `map` holds address, rows, columns, pitch and rows of a box, whose rows are 128 bytes.
template <class Map, class B>
void cp_async_bulk_tensor_2d_global_to_shared(void *to, const Map *map, int column, int row, B &at) {
    const byte *from = reinterpret_cast<const byte *>(map->opaque[0]);
    long rows = map->opaque[1], columns = map->opaque[2], pitch = map->opaque[3], box = map->opaque[4];
    long start = static_cast<char *>(to) - shared_memory + WINDOW;
    if (start % 1024) fail("a swizzled copy to an address that is no multiple of 1024");
    for (long r = 0; r < box; ++r)
        for (long c = 0; c < 128; ++c) {
            long address = start + r * 128 + c;
            address ^= (address >> 7 & 7) << 4;
            bool inside = row + r < rows && column + c < columns;
            shared_memory[address - WINDOW] = inside ? from[(row + r) * pitch + column + c] : 0;
        }
    at.complete(box * 128);
}
} // namespace experimental
} // namespace device
} // namespace cuda
using cuda::init;

namespace gpu {
static float decoded[256];

static void make_codes() {
    for (int code = 0; code < 256; ++code) {
        int exponent = code >> 3 & 15, mantissa = code & 7;
        float magnitude = exponent == 15 && mantissa == 7 ? NAN
                          : exponent == 0                ? std::ldexp(float(mantissa), -9)
                                                         : std::ldexp(float(8 + mantissa), exponent - 10);
        decoded[code] = code & 128 ? -magnitude : magnitude;
    }
}

static int lane() { return threadIdx.x % 32; }
static int warp() { return threadIdx.x / 32; }

inline void no_operation() {}

// Copies happen when they are waited for, and not before.
struct Copy {
    char *to;
    const char *from;
    unsigned bytes;
};
static thread_local std::vector<Copy> copies;
static thread_local std::vector<std::vector<Copy>> groups;

inline void cp_async(void *to, const void *from, unsigned bytes) {
    auto aligned = [](const void *at) { return reinterpret_cast<std::uintptr_t>(at) % 16 == 0; };
    if (!aligned(to) || !aligned(from) || bytes > 16) fail("a copy that is not of 16 aligned bytes");
    copies.push_back({static_cast<char *>(to), static_cast<const char *>(from), bytes});
}
inline void cp_async_commit_group() {
    groups.push_back(copies);
    copies.clear();
}
inline void cp_async_wait_group_1() {
    for (; groups.size() > 1; groups.erase(groups.begin()))
        for (const Copy &copy : groups[0]) {
            std::memset(copy.to, 0, 16);
            std::memcpy(copy.to, copy.from, copy.bytes);
        }
}

template <class Word> void ldmatrix_x4(Word &a, Word &b, Word &c, Word &d, const void *row) {
    static const char *rows[32][32];
    rows[warp()][lane()] = static_cast<const char *>(row);
    __syncwarp();
    Word *out[] = {&a, &b, &c, &d};
    for (int matrix = 0; matrix < 4; ++matrix)
        std::memcpy(out[matrix], rows[warp()][8 * matrix + lane() / 4] + lane() % 4 * 4, 4);
    __syncwarp();
}

// Four of m16n8k32, one after another: registers of A four by four, then those of B two by two.
template <class... Words> void mma_m16n8k32_x4(float &c0, float &c1, float &c2, float &c3, Words... words) {
    static unsigned registers[32][32][24];
    unsigned mine[] = {unsigned(words)...};
    static_assert(sizeof mine == sizeof registers[0][0]);
    std::memcpy(registers[warp()][lane()], mine, sizeof mine);
    __syncwarp();
    const auto &all = registers[warp()];
    float *out[] = {&c0, &c1, &c2, &c3};
    for (int e = 0; e < 4; ++e) {
        int row = lane() / 4 + e / 2 * 8, column = lane() % 4 * 2 + e % 2;
        float sum = 0;
        for (int step = 0; step < 4; ++step)
            for (int k = 0; k < 32; ++k) {
                unsigned a = all[row % 8 * 4 + k % 16 / 4][step * 4 + k / 16 * 2 + row / 8];
                unsigned b = all[column * 4 + k % 16 / 4][16 + step * 2 + k / 16];
                sum += decoded[a >> k % 4 * 8 & 255] * decoded[b >> k % 4 * 8 & 255];
            }
        *out[e] = sum;
    }
    __syncwarp();
}

template <class Word> void descriptor(Word &out, const void *at, unsigned long long fields) {
    unsigned long address = static_cast<const char *>(at) - shared_memory + WINDOW;
    out = (address >> 4 & 0x3fff) | fields;
}

// A code of a matrix whose rows of 128 bytes are swizzled.
inline float code_at(unsigned long long descriptor, int row, int k) {
    if (descriptor >> 62 != 1 || descriptor >> 49 & 7) fail("a descriptor of another layout");
    long stride = (descriptor >> 32 & 0x3fff) << 4;
    long address = ((descriptor & 0x3fff) << 4) + row / 8 * stride + row % 8 * 128 + k;
    address ^= (address >> 7 & 7) << 4;
    return decoded[byte(shared_memory[address - WINDOW])];
}

// Four of m64nNk32, each 32 bytes further; `count` is half of N.
inline void wgmma_x4(float **out, int count, unsigned long long a, unsigned long long b) {
    for (int i = 0; i < count; ++i) {
        int row = warp() % 4 * 16 + lane() / 4 + i % 4 / 2 * 8;
        int column = i / 4 * 8 + lane() % 4 * 2 + i % 2;
        float sum = 0;
        for (int step = 0; step < 4; ++step)
            for (int k = 0; k < 32; ++k) sum += code_at(a + 2 * step, row, k) * code_at(b + 2 * step, column, k);
        *out[i] = sum;
    }
}

template <class Kernel> void run(Index grid, unsigned threads, Kernel kernel) {
    for (unsigned cube = 0; cube < grid.x * grid.y * grid.z; ++cube) {
        unsigned x = cube % grid.x, y = cube / grid.x % grid.y, z = cube / grid.x / grid.y;
        std::memset(shared_memory, 0x7f, SHARED);
        pthread_barrier_init(&block_barrier, nullptr, threads);
        for (unsigned warp = 0; warp < threads / 32; ++warp)
            pthread_barrier_init(&warp_barriers[warp], nullptr, 32);
        std::vector<std::thread> all;
        for (unsigned thread = 0; thread < threads; ++thread)
            all.emplace_back([=] {
                threadIdx = {thread, 0, 0};
                blockIdx = {x, y, z};
                kernel();
            });
        for (std::thread &thread : all) thread.join();
    }
}
} // namespace gpu
