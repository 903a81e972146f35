// The paged cache of one layer: [block][kv head], and there the rows of 32 tokens of one head.
//
//   f16    [32 tokens][HS] f16
//   8 bit  [32 tokens][HS rounded up to 32] bytes q + 128, then [groups of 32 elements][32 tokens] f16 scales: 34 bytes a group and
//          token, as Q8_0 takes, with every part aligned to 16 bytes.   Reference: backend/cpu/kv.rs
#pragma once
#include "common.cuh"

constexpr int KV_BLOCK_TOKENS = 32;

__host__ __device__ constexpr int half_head_bytes(int hs) { return KV_BLOCK_TOKENS * hs * 2; }
__host__ __device__ constexpr int byte_row(int hs) { return (hs + 31) / 32 * 32; }
__host__ __device__ constexpr int byte_head_bytes(int hs) { return KV_BLOCK_TOKENS * byte_row(hs) / 32 * 34; }
static_assert(byte_head_bytes(64) == KV_BLOCK_TOKENS * 2 * 34, "34 bytes per 32 elements");
static_assert(byte_head_bytes(16) % 16 == 0, "heads are aligned");
