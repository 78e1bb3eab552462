// What attention on bf16 tensor cores needs beside gpu.h: `ldmatrix`, also transposed, `mma.m16n8k16`, `shfl.bfly`, the
// rounding of pairs, and the type bf16. By NVIDIA's PTX ISA as well.
#pragma once

#include "gpu.h"

// Rounds to nearest, ties to even, as CUDA does. What is not a number stays so.
struct Bf16 {
    unsigned short bits;
    Bf16() = default;
    Bf16(float value) {
        unsigned word;
        std::memcpy(&word, &value, 4);
        bits = std::isnan(value) ? 0x7fff : (word + 0x7fff + (word >> 16 & 1)) >> 16;
    }
    operator float() const {
        unsigned word = unsigned(bits) << 16;
        float value;
        std::memcpy(&value, &word, 4);
        return value;
    }
};
#define __nv_bfloat16 Bf16
static Bf16 __float2bfloat16(float value) { return value; }
static float __bfloat162float(Bf16 value) { return value; }

static Index gridDim;

namespace bf16 {
using gpu::lane;
using gpu::warp;

// What the units of a warp give each other: two places, used in turns, so that one barrier per exchange is enough.
template <class T> const T *exchange(const T &mine) {
    static T places[32][2][32];
    static thread_local int turn = 0;
    turn ^= 1;
    places[warp()][turn][lane()] = mine;
    __syncwarp();
    return places[warp()][turn];
}

inline void cp_async_wait_all() {
    for (const gpu::Copy &copy : gpu::copies) {
        std::memset(copy.to, 0, 16);
        std::memcpy(copy.to, copy.from, copy.bytes);
    }
    gpu::copies.clear();
}

// A unit gets two neighbouring elements of a row of each of four matrices of 8 x 8, or, transposed, of a column.
template <bool transposed, class Word>
void ldmatrix(Word &a, Word &b, Word &c, Word &d, const void *row) {
    if (reinterpret_cast<std::uintptr_t>(row) % 16) fail("a row of a matrix that is not aligned");
    struct Row {
        unsigned short elements[8];
    };
    Row own;
    std::memcpy(&own, row, 16);
    const Row *rows = exchange(own);
    Word *out[] = {&a, &b, &c, &d};
    for (int matrix = 0; matrix < 4; ++matrix) {
        unsigned pair[2];
        for (int e = 0; e < 2; ++e) {
            int major = lane() / 4, minor = lane() % 4 * 2 + e;
            pair[e] = transposed ? rows[8 * matrix + minor].elements[major] : rows[8 * matrix + major].elements[minor];
        }
        *out[matrix] = pair[0] | pair[1] << 16;
    }
}
template <class Word> void ldmatrix_x4(Word &a, Word &b, Word &c, Word &d, const void *row) {
    ldmatrix<false>(a, b, c, d, row);
}
template <class Word> void ldmatrix_x4_trans(Word &a, Word &b, Word &c, Word &d, const void *row) {
    ldmatrix<true>(a, b, c, d, row);
}

// Products of bf16 are exact in single precision. A tensor core may keep fewer bits of their sum than this does.
inline void mma_m16n8k16_bf16(float &d0, float &d1, float &d2, float &d3, unsigned a0, unsigned a1, unsigned a2,
                              unsigned a3, unsigned b0, unsigned b1, float c0, float c1, float c2, float c3) {
    struct Registers {
        unsigned a[4], b[2];
    };
    const Registers *all = exchange(Registers{{a0, a1, a2, a3}, {b0, b1}});
    auto element = [](unsigned pair, int number) {
        Bf16 value;
        value.bits = pair >> 16 * number;
        return float(value);
    };
    float *out[] = {&d0, &d1, &d2, &d3};
    float in[] = {c0, c1, c2, c3};
    for (int e = 0; e < 4; ++e) {
        int row = lane() / 4 + e / 2 * 8, column = lane() % 4 * 2 + e % 2;
        float sum = in[e];
        for (int k = 0; k < 16; ++k) {
            unsigned a = all[row % 8 * 4 + k % 8 / 2].a[k / 8 * 2 + row / 8];
            unsigned b = all[column * 4 + k % 8 / 2].b[k / 8];
            sum += element(a, k % 2) * element(b, k % 2);
        }
        *out[e] = sum;
    }
}

// Cubes one after another.
template <class Kernel> void run(unsigned cubes, unsigned threads, Kernel kernel) {
    gridDim = {cubes, 1, 1};
    gpu::run(gridDim, threads, kernel);
}

inline void shfl_bfly(float &out, float value, unsigned across) { out = exchange(value)[lane() ^ across]; }

template <class Word> void cvt_bf16x2(Word &out, float upper, float lower) {
    out = unsigned(Bf16(upper).bits) << 16 | Bf16(lower).bits;
}
} // namespace bf16
