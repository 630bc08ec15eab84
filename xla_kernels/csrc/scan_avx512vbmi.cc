// Scans for AVX-512 with VBMI and VNNI (Ice Lake, Zen 4 and later).
//
// kDwords: vpermb looks up 64 bytes in a 64-entry table, here the four 16-entry tables of a group:
// the index is the code plus 16 times its place in the group. vpdpbusd by ones then adds the four
// entries of a point into the point's own 32-bit lane, so nothing saturates or crosses lanes.
// kBytes: one vpermb (64 entries), one vpermi2b (128) or two and a blend (256) a subspace.
#include "dot.h"
#include "scan.h"
#include "table.h"

#if defined(__x86_64__) && !defined(XLA_KERNELS_NO_SIMD)
#include <immintrin.h>

#include "target.h"

namespace xla_kernels {
namespace {

int64_t expanded_bytes(Layout layout, int64_t groups, int64_t stride) {
  if (layout == Layout::kDwords) return groups * 64;
  if (layout == Layout::kBytes) return groups * stride;
  return portable_kernels()->expanded_bytes(layout, groups, stride);
}

void expand(const uint8_t* rounded, Layout layout, int64_t groups, int64_t stride, void* out) {
  if (layout == Layout::kLanes) return portable_kernels()->expand(rounded, layout, groups, stride, out);
  auto* to = static_cast<uint8_t*>(out);
  const int64_t bytes = expanded_bytes(layout, groups, stride);
  for (int64_t i = 0; i < bytes; ++i) to[i] = rounded[i];
}

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,bmi2,popcnt")

// sums += the four products of each lane's bytes. GCC 12 copies the accumulator of the intrinsic
// into another register and back at every step.
inline void dot_accumulate(__m512i& sums, __m512i bytes, __m512i weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(bytes), "v"(weights));
}

#include "affine_avx512.inc"

template <int kVectors>
__attribute__((always_inline)) inline __m512i largest(const __m512i (&keys)[kVectors]) {
  __m512i most = keys[0];
  UNROLL
  for (int j = 1; j < kVectors; ++j) most = _mm512_max_epi32(most, keys[j]);
  return most;
}

// Appends the lanes of a mask whose rows may be returned. A whole vector is stored: make_room() leaves
// space for it.
__attribute__((always_inline)) inline void store_kept(const ScanQuery& query, __mmask16 mask,
                                                      __m512i keys, int64_t row, int64_t num_rows) {
  Collector& out = *query.collector;
  mask &= valid_mask(query.valid, row, num_rows);
  _mm512_storeu_si512(out.low + out.size, _mm512_maskz_compress_epi32(mask, keys));
  store_rows(out.rows + out.size, mask, row);
  out.size += _mm_popcnt_u32(mask);
}

// Keeps the rows that pass, once some do. Nothing is called while the sums are in registers; of two
// vectors of a query both are stored, the second over the lanes that the first left unused.
template <int kQueries, int kVectors>
__attribute__((always_inline)) inline void keep_passing(const ScanQuery* queries,
                                                        const __m512i (&keys)[kQueries][kVectors],
                                                        int64_t row, int64_t num_rows,
                                                        int32_t (&threshold)[kQueries]) {
  UNROLL
  for (int q = 0; q < kQueries; ++q) {
    const __m512i bar = _mm512_set1_epi32(threshold[q]);
    UNROLL
    for (int j = 0; j < kVectors; j += 2) {
      constexpr int kMore = kVectors > 1 ? 1 : 0;
      const __mmask16 low = _mm512_cmpgt_epi32_mask(keys[q][j], bar);
      const __mmask16 high = kMore != 0 ? _mm512_cmpgt_epi32_mask(keys[q][j + kMore], bar) : 0;
      if (_kortestz_mask16_u8(low, high)) continue;
      store_kept(queries[q], low, keys[q][j], row + 16 * j, num_rows);
      if (kMore != 0) {
        store_kept(queries[q], high, keys[q][j + kMore], row + 16 * (j + kMore), num_rows);
      }
    }
  }
  for (int q = 0; q < kQueries; ++q) {
    queries[q].collector->make_room();
    threshold[q] = queries[q].collector->threshold;
  }
}

// Keeps the rows of one query that pass, without asking whether any does: an answer that nobody could
// foresee costs more.
template <int kVectors>
__attribute__((always_inline)) inline void keep_always(const ScanQuery& query, const __m512i* keys,
                                                       int64_t row, int64_t num_rows,
                                                       int32_t& threshold) {
  Collector& out = *query.collector;
  // Copies that no store can change.
  int32_t* low = out.low + out.size;
  int32_t* rows = out.rows + out.size;
  const uint8_t* const valid = query.valid;
  const int32_t* const start = low;
  const __m512i bar = _mm512_set1_epi32(threshold);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i ids = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(row)), lanes);
  __mmask16 usable[kVectors];
  if (row + 16 * kVectors > num_rows) {
    UNROLL
    for (int j = 0; j < kVectors; ++j) usable[j] = valid_mask(valid, row + 16 * j, num_rows);
  } else {
    UNROLL
    for (int j = 0; j < kVectors; ++j) {
      usable[j] = 0xffff;
      if (valid == nullptr) continue;
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(valid + row + 16 * j));
      usable[j] = _mm_test_epi8_mask(bytes, bytes);
    }
  }
  UNROLL
  for (int j = 0; j < kVectors; ++j) {
    const __mmask16 kept = _mm512_mask_cmpgt_epi32_mask(usable[j], keys[j], bar);
    _mm512_storeu_si512(low, _mm512_maskz_compress_epi32(kept, keys[j]));
    _mm512_storeu_si512(rows, _mm512_maskz_compress_epi32(kept, ids));
    ids = _mm512_add_epi32(ids, _mm512_set1_epi32(16));
    const int64_t count = _mm_popcnt_u32(kept);
    low += count;
    rows += count;
  }
  out.size += low - start;
  out.make_room();
  threshold = out.threshold;
}

__attribute__((noinline)) void append_leveled(const ScanQuery& query, __m512i keys,
                                              const RowTerms& terms, int64_t row, int64_t num_rows) {
  append_affine(query, keys, load_terms(terms, row, num_rows), row, num_rows);
}

// With numbered gains and nothing else, as the leaves of a tree have them: no bounds but the scores.
template <int kQueries, int kVectors>
__attribute__((always_inline)) inline void collect_leveled(
    const ScanQuery* queries, const __m512i (&keys)[kQueries][kVectors], const RowTerms& terms,
    int64_t row, int64_t num_rows) {
  __m512 gain[kVectors];
  UNROLL
  for (int j = 0; j < kVectors; ++j) gain[j] = load_terms(terms, row + 16 * j, num_rows).gain;
  UNROLL
  for (int q = 0; q < kQueries; ++q) {
    const ScanQuery& query = queries[q];
    const __m512 delta = _mm512_set1_ps(query.delta), centre = _mm512_set1_ps(query.centre);
    const __m512 addend = _mm512_set1_ps(query.addend);
    const __m512 bar = _mm512_set1_ps(query.collector->float_threshold);
    __mmask16 mask[kVectors], any = 0;
    UNROLL
    for (int j = 0; j < kVectors; ++j) {
      const __m512 sum = _mm512_fmadd_ps(delta, _mm512_cvtepi32_ps(keys[q][j]), centre);
      mask[j] = _mm512_cmp_ps_mask(_mm512_fmadd_ps(gain[j], sum, addend), bar, _CMP_NLT_UQ);
      any |= mask[j];
    }
    if (__builtin_expect(any == 0, 1)) continue;
    UNROLL
    for (int j = 0; j < kVectors; ++j) {
      if (mask[j] != 0) append_leveled(query, keys[q][j], terms, row + 16 * j, num_rows);
    }
  }
}

// Sums of kVectors times 16 rows for kQueries queries, the terms of the rows read once for all.
template <int kQueries, int kVectors, bool kAffine>
__attribute__((always_inline)) inline void collect_all(const ScanQuery* queries,
                                                       const __m512i (&keys)[kQueries][kVectors],
                                                       const RowTerms& terms, int64_t row,
                                                       int64_t num_rows,
                                                       int32_t (&threshold)[kQueries]) {
  if (kAffine) {
    if (terms.level != nullptr && terms.offset == nullptr) {
      collect_leveled(queries, keys, terms, row, num_rows);
      return;
    }
    UNROLL
    for (int j = 0; j < kVectors; ++j) {
      const Terms16 own = load_terms(terms, row + 16 * j, num_rows);
      if (own.tail == 0) return;
      UNROLL
      for (int q = 0; q < kQueries; ++q) {
        append_affine(queries[q], keys[q][j], own, row + 16 * j, num_rows);
      }
    }
    return;
  }
  // One test for all rows and queries: most hold none that matters.
  __mmask16 any = 0;
  UNROLL
  for (int q = 0; q < kQueries; ++q) {
    const __m512i bar = _mm512_set1_epi32(threshold[q]);
    any = _kor_mask16(any, _mm512_cmpgt_epi32_mask(largest(keys[q]), bar));
  }
  if (__builtin_expect(any != 0, 0)) keep_passing(queries, keys, row, num_rows, threshold);
}

// Adds the sums of one query for blocks `apart` bytes from each other, as are those to be read soon.
// As sum_dwords, which keeps more registers for queries: here the pointers themselves move.
template <int kBlocks>
__attribute__((always_inline)) inline void add_apart(const uint8_t* block, int64_t apart,
                                                     const uint8_t* soon, const uint8_t* table,
                                                     int64_t bytes, __m512i (&sums)[2 * kBlocks]) {
  const __m512i nibble = _mm512_set1_epi8(0x0f);
  const __m512i place = _mm512_set1_epi32(0x30201000);
  const __m512i ones = _mm512_set1_epi8(1);
  const uint8_t* const end = block + bytes;
  for (; block != end; block += 64, soon += 64, table += 64) {
    const __m512i entries = _mm512_load_si512(table);
    UNROLL
    for (int b = 0; b < kBlocks; ++b) {
      __builtin_prefetch(soon + b * apart, 0, 0);
      const __m512i packed = _mm512_loadu_si512(block + b * apart);
      const __m512i low = _mm512_ternarylogic_epi32(packed, nibble, place, 0xea);
      const __m512i high =
          _mm512_ternarylogic_epi32(_mm512_srli_epi16(packed, 4), nibble, place, 0xea);
      dot_accumulate(sums[2 * b], _mm512_permutexvar_epi8(low, entries), ones);
      dot_accumulate(sums[2 * b + 1], _mm512_permutexvar_epi8(high, entries), ones);
    }
  }
}

// add_apart<4>, which GCC 12 spoils now and then: it copies sums or moves addresses through other
// registers at every step, for a tenth of the time. Here it has no say, nor in the order: with two
// blocks side by side fewer shuffles, shifts and sums wait for the same ports of Zen 5. kOnce: what is
// read soon will not be read again, and need not stay in the caches.
template <bool kOnce>
__attribute__((always_inline)) inline void add_four(const uint8_t* block, int64_t apart,
                                                    const uint8_t* soon, const uint8_t* table,
                                                    int64_t bytes, __m512i (&sums)[8]) {
#if defined(__SANITIZE_ADDRESS__)
  add_apart<4>(block, apart, soon, table, bytes, sums);  // whose reads are checked
#else
  if (bytes == 0) return;
#define TWO_BLOCKS(first, second, low_1, high_1, low_2, high_2) \
  "vmovdqu32 (%[block]" first "), %%zmm17\n\t"                  \
  "vmovdqu32 (%[block]" second "), %%zmm18\n\t"                 \
  "vpsrlw $4, %%zmm17, %%zmm19\n\t"                             \
  "vpsrlw $4, %%zmm18, %%zmm20\n\t"                             \
  "vpternlogd $0xea, %[place], %[nibble], %%zmm17\n\t"          \
  "vpternlogd $0xea, %[place], %[nibble], %%zmm18\n\t"          \
  "vpternlogd $0xea, %[place], %[nibble], %%zmm19\n\t"          \
  "vpternlogd $0xea, %[place], %[nibble], %%zmm20\n\t"          \
  "vpermb %%zmm16, %%zmm17, %%zmm17\n\t"                        \
  "vpermb %%zmm16, %%zmm18, %%zmm18\n\t"                        \
  "vpermb %%zmm16, %%zmm19, %%zmm19\n\t"                        \
  "vpermb %%zmm16, %%zmm20, %%zmm20\n\t"                        \
  "vpdpbusd %[ones], %%zmm17, " low_1 "\n\t"                    \
  "vpdpbusd %[ones], %%zmm18, " low_2 "\n\t"                    \
  "vpdpbusd %[ones], %%zmm19, " high_1 "\n\t"                   \
  "vpdpbusd %[ones], %%zmm20, " high_2 "\n\t"
#define ADD_FOUR(prefetch)                                                                           \
  asm(".p2align 5\n"                                                                                 \
      "2:\n\t"                                                                                       \
      "vmovdqa64 (%[table]), %%zmm16\n\t"                                                            \
      prefetch " (%[soon])\n\t"                                                                      \
      prefetch " (%[soon],%[apart])\n\t"                                                             \
      prefetch " (%[soon],%[apart],2)\n\t"                                                           \
      prefetch " (%[soon],%[thrice])\n\t"                                                            \
      TWO_BLOCKS("", ",%[apart]", "%0", "%1", "%2", "%3")                                            \
      TWO_BLOCKS(",%[apart],2", ",%[thrice]", "%4", "%5", "%6", "%7")                                \
      "add $64, %[table]\n\t"                                                                        \
      "add $64, %[soon]\n\t"                                                                         \
      "add $64, %[block]\n\t"                                                                        \
      "cmp %[end], %[block]\n\t"                                                                     \
      "jne 2b"                                                                                       \
      : "+v"(sums[0]), "+v"(sums[1]), "+v"(sums[2]), "+v"(sums[3]), "+v"(sums[4]), "+v"(sums[5]),    \
        "+v"(sums[6]), "+v"(sums[7]), [block] "+r"(block), [soon] "+r"(soon), [table] "+r"(table)    \
      : [end] "r"(block + bytes), [apart] "r"(apart), [thrice] "r"(3 * apart),                       \
        [nibble] "v"(_mm512_set1_epi8(0x0f)), [place] "v"(_mm512_set1_epi32(0x30201000)),            \
        [ones] "v"(_mm512_set1_epi8(1))                                                              \
      : "zmm16", "zmm17", "zmm18", "zmm19", "zmm20", "cc", "memory")
  if constexpr (kOnce) {
    ADD_FOUR("prefetchnta");
  } else {
    ADD_FOUR("prefetcht0");
  }
#undef ADD_FOUR
#undef TWO_BLOCKS
#endif
}

// What a scan reads of its queries at every block, where the compiler knows that nobody else writes.
template <int kQueries>
struct Local {
  const uint8_t* table[kQueries];
  int32_t shift[kQueries];  // what sums begin with
  int32_t threshold[kQueries];
};

// Sums of kBlocks blocks from block i on: kQueries queries share their indices, which never leave the
// registers. What will be read later lies at `soon`.
template <int kQueries, int kBlocks>
__attribute__((always_inline)) inline void sum_dwords(const Codes& codes, int64_t i,
                                                      const uint8_t* soon, const Local<kQueries>& local,
                                                      __m512i (&sums)[kQueries][2 * kBlocks]) {
  const __m512i nibble = _mm512_set1_epi8(0x0f);
  const __m512i place = _mm512_set1_epi32(0x30201000);  // 16 times the place in the group
  const __m512i ones = _mm512_set1_epi8(1);
  const int64_t bytes = codes.groups * 64;
  const uint8_t* block[kBlocks];
  UNROLL
  for (int b = 0; b < kBlocks; ++b) block[b] = codes.block(i + b);
  UNROLL
  for (int q = 0; q < kQueries; ++q) {
    UNROLL
    for (int b = 0; b < 2 * kBlocks; ++b) sums[q][b] = _mm512_set1_epi32(local.shift[q]);
  }
  if constexpr (kQueries == 1 && kBlocks == 4) {
    add_four<false>(block[0], bytes, soon, local.table[0], bytes, sums[0]);
    return;
  }
  for (int64_t g = 0; g < bytes; g += 64) {
    asm("" : "+r"(g));  // one offset for all pointers
    __m512i index[2 * kBlocks];
    UNROLL
    for (int b = 0; b < kBlocks; ++b) {
      const __m512i packed = _mm512_loadu_si512(block[b] + g);
      __builtin_prefetch(soon + (b * bytes + g));
      // (packed & nibble) | place in one instruction
      index[2 * b] = _mm512_ternarylogic_epi32(packed, nibble, place, 0xea);
      index[2 * b + 1] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(packed, 4), nibble, place, 0xea);
    }
    UNROLL
    for (int q = 0; q < kQueries; ++q) {
      __m512i entries = _mm512_load_si512(local.table[q] + g);
      asm("" : "+v"(entries));  // in a register: GCC 12 would load them again for every vector
      UNROLL
      for (int b = 0; b < 2 * kBlocks; ++b) {
        const __m512i found = _mm512_permutexvar_epi8(index[b], entries);
        dot_accumulate(sums[q][b], found, ones);
      }
    }
  }
}

template <int kQueries, int kBlocks, bool kAffine, bool kAlone>
__attribute__((always_inline)) inline void scan_dwords(const Codes& codes, const RowTerms& terms,
                                                       int64_t i, const uint8_t* soon,
                                                       const ScanQuery* queries,
                                                       Local<kQueries>& local) {
  __m512i sums[kQueries][2 * kBlocks];
  sum_dwords<kQueries, kBlocks>(codes, i, soon, local, sums);
  if constexpr (kAlone && !kAffine) {
    // A collector makes room for two blocks.
    constexpr int kVectors = kBlocks == 1 ? 2 : 4;
    UNROLL
    for (int j = 0; j < 2 * kBlocks; j += kVectors) {
      keep_always<kVectors>(queries[0], sums[0] + j, i * 32 + 16 * j, codes.num_rows,
                            local.threshold[0]);
    }
  } else {
    collect_all<kQueries, 2 * kBlocks, kAffine>(queries, sums, terms, i * 32, codes.num_rows,
                                                local.threshold);
  }
}

// Codes of no subspaces fill no bytes.
inline int64_t blocks_ahead(const Codes& codes, int64_t bytes) {
  return bytes / (64 * codes.groups + 1) + 1;
}

// The block that is read some time after block i of [begin, end), where block `next` follows the last.
inline int64_t later_block(int64_t i, int64_t ahead, int64_t begin, int64_t end, int64_t next) {
  const int64_t past = i + ahead - end;
  return past < 0 ? past + end : next + (past < i - begin ? past : i - begin);
}

template <int kQueries, int kBlocks, bool kAffine, bool kAlone>
void range_dwords(const Codes& codes, const RowTerms& terms, int64_t begin, int64_t end,
                  int64_t next, const ScanQuery* queries) {
  const int64_t ahead = blocks_ahead(codes, kPrefetchBytes);
  Local<kQueries> local;
  for (int q = 0; q < kQueries; ++q) {
    local.table[q] = static_cast<const uint8_t*>(queries[q].table);
    local.shift[q] = queries[q].shift;
    local.threshold[q] = queries[q].collector->threshold;
  }
  int64_t i = begin;
  if constexpr (kAlone && !kAffine) {
    for (; i + 4 <= end; i += 4) {
      const int64_t later = later_block(i, ahead, begin, end, next);
      if (queries[0].valid != nullptr) __builtin_prefetch(queries[0].valid + 32 * later);
      scan_dwords<kQueries, 4, kAffine, kAlone>(codes, terms, i, codes.block(later), queries, local);
    }
  }
  for (; i + kBlocks <= end; i += kBlocks) {
    const int64_t later = later_block(i, ahead, begin, end, next);
    if (kAffine && terms.level != nullptr) __builtin_prefetch(terms.level + 32 * later);
    if constexpr (kAlone) {
      if (queries[0].valid != nullptr) __builtin_prefetch(queries[0].valid + 32 * later);
    }
    scan_dwords<kQueries, kBlocks, kAffine, kAlone>(codes, terms, i, codes.block(later), queries, local);
  }
  for (; i < end; ++i) {
    scan_dwords<kQueries, 1, kAffine, kAlone>(codes, terms, i, codes.block(i), queries, local);
  }
}

template <int kStride>
inline __m512i look_up(const uint8_t* entries, __m512i index) {
  if (kStride == 64) return _mm512_permutexvar_epi8(index, _mm512_load_si512(entries));
  const __m512i low =
      _mm512_permutex2var_epi8(_mm512_load_si512(entries), index, _mm512_load_si512(entries + 64));
  if (kStride == 128) return low;
  const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(entries + 128), index,
                                                _mm512_load_si512(entries + 192));
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
}

// Pairs of 7-bit entries are added as bytes, then as 16-bit sums of the even and odd points; 128
// pairs (256 subspaces) fill 16 bits, which is when a part ends.
template <int kQueries, int kStride, bool kAffine>
void scan_bytes(const Codes& codes, const RowTerms& terms, int64_t i, const ScanQuery* queries) {
  __m512i keys[kQueries][4];
  UNROLL
  for (int q = 0; q < kQueries; ++q) {
    UNROLL
    for (int j = 0; j < 4; ++j) keys[q][j] = _mm512_set1_epi32(queries[q].shift);
  }
  const uint8_t* block = codes.block(i);
  for (int64_t part = 0; part < codes.groups; part += 256) {
    const int64_t stop = part + 256 < codes.groups ? part + 256 : codes.groups;
    __m512i even[kQueries], odd[kQueries];
    UNROLL
    for (int q = 0; q < kQueries; ++q) even[q] = odd[q] = _mm512_setzero_si512();
    for (int64_t s = part; s < stop; s += 2) {
      const __m512i first = _mm512_loadu_si512(block + 64 * s);
      prefetch_ahead(block + 64 * s);
      prefetch_ahead(block + 64 * s + 64);
      const bool pair = s + 1 < stop;
      const __m512i second = pair ? _mm512_loadu_si512(block + 64 * (s + 1)) : first;
      UNROLL
      for (int q = 0; q < kQueries; ++q) {
        const uint8_t* entries = static_cast<const uint8_t*>(queries[q].table) + kStride * s;
        __m512i found = look_up<kStride>(entries, first);
        if (pair) found = _mm512_add_epi8(found, look_up<kStride>(entries + kStride, second));
        even[q] = _mm512_add_epi16(even[q], found);  // the odd points overflow out of the top
        odd[q] = _mm512_add_epi16(odd[q], _mm512_srli_epi16(found, 8));
      }
    }
    UNROLL
    for (int q = 0; q < kQueries; ++q) {
      even[q] = _mm512_sub_epi16(even[q], _mm512_slli_epi16(odd[q], 8));
      // Interleaving within 128-bit lanes gives points 16 l + 0..7 and 16 l + 8..15 of lane l.
      const __m512i a = _mm512_unpacklo_epi16(even[q], odd[q]);
      const __m512i b = _mm512_unpackhi_epi16(even[q], odd[q]);
      const __m512i front = _mm512_permutex2var_epi64(
          a, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), b);
      const __m512i back = _mm512_permutex2var_epi64(
          a, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), b);
      const __m512i halves[2] = {front, back};
      UNROLL
      for (int h = 0; h < 2; ++h) {
        const __m512i x = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves[h]));
        const __m512i y = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(halves[h], 1));
        keys[q][2 * h] = _mm512_add_epi32(keys[q][2 * h], x);
        keys[q][2 * h + 1] = _mm512_add_epi32(keys[q][2 * h + 1], y);
      }
    }
  }
  int32_t threshold[kQueries];
  for (int q = 0; q < kQueries; ++q) threshold[q] = queries[q].collector->threshold;
  collect_all<kQueries, 4, kAffine>(queries, keys, terms, i * 64, codes.num_rows, threshold);
}

template <int kQueries, bool kAffine, bool kAlone = false>
void scan_range(const Codes& codes, const RowTerms& terms, int64_t begin, int64_t end,
                int64_t next, int64_t stride, const ScanQuery* queries) {
  if (codes.layout == Layout::kDwords) {
    constexpr int kBlocks = kQueries == 1 ? 2 : 1;
    range_dwords<kQueries, kBlocks, kAffine, kAlone>(codes, terms, begin, end, next, queries);
    return;
  }
  for (int64_t i = begin; i < end; ++i) {
    if (stride == 64) {
      scan_bytes<kQueries, 64, kAffine>(codes, terms, i, queries);
    } else if (stride == 128) {
      scan_bytes<kQueries, 128, kAffine>(codes, terms, i, queries);
    } else {
      scan_bytes<kQueries, 256, kAffine>(codes, terms, i, queries);
    }
  }
}

template <bool kAffine>
void scan_all(const Codes& codes, const RowTerms& terms, int64_t begin, int64_t end, int64_t next,
              int64_t stride, const ScanQuery* queries, int64_t num_queries) {
  // Eight queries share a piece of the codes that stays in the second-level cache.
  const int64_t piece = 1 + (256 << 10) / (codes.groups * 64 + 1);
  for (int64_t from = begin, to; from < end; from = to) {
    to = from + piece < end ? from + piece : end;
    const int64_t then = to < end ? to : next;
    const auto some = [&](auto range, int64_t q) {
      range(codes, terms, from, to, then, stride, queries + q);
    };
    if (num_queries == 1) {
      some(scan_range<1, kAffine, true>, 0);
      continue;
    }
    int64_t q = 0;
    for (; q + 8 <= num_queries; q += 8) some(scan_range<8, kAffine>, q);
    for (; q + 4 <= num_queries; q += 4) some(scan_range<4, kAffine>, q);
    for (; q + 2 <= num_queries; q += 2) some(scan_range<2, kAffine>, q);
    for (; q < num_queries; ++q) some(scan_range<1, kAffine>, q);
  }
}

void scan(const Codes& codes, const RowTerms& terms, int64_t begin, int64_t end, int64_t next,
          int64_t stride, const ScanQuery* queries, int64_t num_queries) {
  if (codes.layout == Layout::kLanes) {
    portable_kernels()->scan(codes, terms, begin, end, next, stride, queries, num_queries);
  } else if (terms.affine()) {
    scan_all<true>(codes, terms, begin, end, next, stride, queries, num_queries);
  } else {
    scan_all<false>(codes, terms, begin, end, next, stride, queries, num_queries);
  }
}

template <int kQueries>
void maxima_of(const Codes& codes, int64_t begin, int64_t end, int64_t step, int64_t together,
               const uint8_t* const* tables, const uint8_t* valid, int32_t* out, int64_t stride) {
  constexpr int64_t kSoon = 4;  // pairs
  const int64_t bytes = codes.groups * 64;
  Local<kQueries> local = {};
  for (int q = 0; q < kQueries; ++q) local.table[q] = tables[q];
  for (int64_t i = begin; i < end; out += 16) {
    __m512i most[kQueries];
    UNROLL
    for (int q = 0; q < kQueries; ++q) most[q] = _mm512_set1_epi32(INT32_MIN);
    for (int64_t t = 0; t < together && i < end; ++t, i += 2 * step) {
      const int64_t later = i + 2 * kSoon * step, other = i + 1 < end ? 1 : 0;
      const uint8_t* soon = codes.block(later < end ? later : i);
      __mmask16 kept[4];  // of the halves of both blocks
      for (int64_t h = 0; h < 4; ++h) {
        kept[h] = valid_mask(valid, 32 * (i + h / 2 * other) + 16 * (h % 2), codes.num_rows);
      }
      if constexpr (kQueries == 1) {
        __m512i sums[4] = {};
        add_apart<2>(codes.block(i), other * bytes, soon, tables[0], bytes, sums);
        UNROLL
        for (int h = 0; h < 4; ++h) {
          most[0] = _mm512_mask_max_epi32(most[0], kept[h], most[0], sums[h]);
        }
      } else {
        for (int64_t b = 0; b < 2; ++b) {
          __m512i sums[kQueries][2];
          sum_dwords<kQueries, 1>(codes, i + b * other, soon + b * bytes, local, sums);
          UNROLL
          for (int q = 0; q < kQueries; ++q) {
            most[q] = _mm512_mask_max_epi32(most[q], kept[2 * b], most[q], sums[q][0]);
            most[q] = _mm512_mask_max_epi32(most[q], kept[2 * b + 1], most[q], sums[q][1]);
          }
        }
      }
    }
    UNROLL
    for (int q = 0; q < kQueries; ++q) _mm512_storeu_si512(out + q * stride, most[q]);
  }
}

void maxima(const Codes& codes, int64_t begin, int64_t end, int64_t step, int64_t together,
            const uint8_t* const* tables, const uint8_t* valid, int64_t num_queries, int32_t* out,
            int64_t stride) {
  const auto of = num_queries == 8   ? maxima_of<8>
                  : num_queries == 4 ? maxima_of<4>
                  : num_queries == 2 ? maxima_of<2>
                                     : maxima_of<1>;
  of(codes, begin, end, step, together, tables, valid, out, stride);
}

// Sums begin at -threshold - 1: those that pass are not negative. The sign bits of all queries are
// shifted into the lane of their row, and the bytes of a block are written over those of the last
// one unless a row of that passed: nothing here waits for a sum.
template <int kQueries, bool kMasked>
__attribute__((always_inline)) inline int64_t flag_dwords(const Codes& codes, int64_t i,
                                                          const uint8_t* soon,
                                                          const Local<kQueries>& local,
                                                          const uint8_t* valid, uint8_t* flags,
                                                          int32_t* found, int64_t num_found) {
  const __m512i none = _mm512_set1_epi32((1 << kQueries) - 1);
  __m512i sums[kQueries][2];
  sum_dwords<kQueries, 1>(codes, i, soon, local, sums);
  __m512i signs[2];
  UNROLL
  for (int h = 0; h < 2; ++h) {
    signs[h] = _mm512_srli_epi32(sums[kQueries - 1][h], 31);
    UNROLL
    for (int q = kQueries - 2; q >= 0; --q) signs[h] = _mm512_shldi_epi32(signs[h], sums[q][h], 1);
    signs[h] = _mm512_xor_si512(signs[h], none);
    if (kMasked) {
      const __mmask16 kept = valid_mask(valid, 32 * i + 16 * h, codes.num_rows);
      signs[h] = _mm512_maskz_mov_epi32(kept, signs[h]);
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(flags + 32 * num_found + 16 * h),
                     _mm512_cvtepi32_epi8(signs[h]));
  }
  found[num_found] = static_cast<int32_t>(i);
  const __m512i any = _mm512_or_si512(signs[0], signs[1]);
  return num_found + (_mm512_test_epi32_mask(any, any) != 0);
}

template <int kQueries, bool kMasked>
int64_t flag_of(const Codes& codes, int64_t begin, int64_t end, int64_t next,
                const uint8_t* const* tables, const int32_t* thresholds, const uint8_t* valid,
                uint8_t* flags, int32_t* found) {
  Local<kQueries> local = {};
  for (int q = 0; q < kQueries; ++q) {
    local.table[q] = tables[q];
    local.shift[q] = -thresholds[q] - 1;
  }
  const int64_t ahead = blocks_ahead(codes, kPrefetchBytes);
  int64_t num_found = 0;
  for (int64_t i = begin; i < end; ++i) {
    const uint8_t* soon = codes.block(later_block(i, ahead, begin, end, next));
    num_found = flag_dwords<kQueries, kMasked>(codes, i, soon, local, valid, flags, found, num_found);
  }
  return num_found;
}

// The signs of four vectors of sums: that of lane 4 l + j of vector v is bit 16 l + 4 v + j.
inline uint64_t sign_bits(__m512i first, __m512i second, __m512i third, __m512i fourth) {
  // Saturation keeps signs.
  return _mm512_movepi8_mask(
      _mm512_packs_epi16(_mm512_packs_epi32(first, second), _mm512_packs_epi32(third, fourth)));
}

// Which rows of two blocks are valid, in the order of sign_bits().
inline uint64_t valid_bits(const uint8_t* valid, int64_t first, int64_t second, int64_t num_rows) {
  uint64_t bits = 0;
  UNROLL
  for (int v = 0; v < 4; ++v) {
    const int64_t row = 32 * (v < 2 ? first : second) + 16 * (v % 2);
    bits |= _pdep_u64(valid_mask(valid, row, num_rows), 0x000f000f000f000full << (4 * v));
  }
  return bits;
}

// Reads the blocks as four ranges, in step: of several streams more is on its way from memory. Nothing
// waits for a sum: every word of signs is written, over the last one unless a row of that passed.
template <bool kMasked>
int64_t flag_rows_of(const Codes& all, int64_t begin, int64_t end, int64_t next, const uint8_t* table,
                     int32_t threshold, const uint8_t* valid, uint64_t* scratch, int32_t* rows) {
  constexpr int64_t kStreams = 4;
  const Codes codes = all;  // which nobody else can write
  const int64_t bytes = codes.groups * 64, part = (end - begin) / kStreams;
  const int64_t ahead = blocks_ahead(codes, 5 << 9);
  const __m512i start = _mm512_set1_epi32(-threshold - 1);  // sums that pass are not negative
  auto* const places = reinterpret_cast<int32_t*>(scratch + 2 * part + 8);
  const auto note = [&](int64_t at, uint64_t signs, int64_t block) {
    uint64_t passed = ~signs;
    if (kMasked) passed &= valid_bits(valid, block, block + part, codes.num_rows);
    scratch[at] = passed;
    places[at] = static_cast<int32_t>(block);
    return at + (passed != 0);
  };
  int64_t num_words = 0;
  const uint8_t* soon = codes.block(begin + ahead);
  for (int64_t i = begin; i < begin + part; ++i, soon += bytes) {
    if (i + ahead == begin + part) soon = codes.block(next);
    __m512i sums[2 * kStreams] = {start, start, start, start, start, start, start, start};
    add_four<true>(codes.block(i), part * bytes, soon, table, bytes, sums);
    num_words = note(num_words, sign_bits(sums[0], sums[1], sums[2], sums[3]), i);
    num_words = note(num_words, sign_bits(sums[4], sums[5], sums[6], sums[7]), i + 2 * part);
  }
  for (int64_t i = begin + kStreams * part; i < end; ++i) {
    __m512i sums[2] = {start, start};
    add_apart<1>(codes.block(i), bytes, codes.block(i), table, bytes, sums);
    const __m512i none = _mm512_set1_epi32(-1);
    num_words = note(num_words, sign_bits(sums[0], sums[1], none, none), i);
  }
  int64_t num_found = 0;
  for (int64_t w = 0; w < num_words; ++w) {
    for (uint64_t bits = scratch[w]; bits != 0; bits &= bits - 1) {
      const int64_t bit = __builtin_ctzll(bits);
      const int64_t block = places[w] + ((bit & 8) != 0 ? part : 0);
      const int64_t row = 32 * block + 4 * (bit & 4) + bit / 16 * 4 + (bit & 3);
      rows[num_found] = static_cast<int32_t>(row);
      num_found += row < codes.num_rows;
    }
  }
  return num_found;
}

int64_t flag_rows(const Codes& codes, int64_t begin, int64_t end, int64_t next, const uint8_t* table,
                  int32_t threshold, const uint8_t* valid, uint64_t* scratch, int32_t* rows) {
  return (valid != nullptr ? flag_rows_of<true> : flag_rows_of<false>)(
      codes, begin, end, next, table, threshold, valid, scratch, rows);
}

template <bool kMasked>
auto flag_for(int64_t num_queries) {
  return num_queries == 8   ? flag_of<8, kMasked>
         : num_queries == 4 ? flag_of<4, kMasked>
                            : flag_of<2, kMasked>;
}

int64_t flag(const Codes& codes, int64_t begin, int64_t end, int64_t next,
             const uint8_t* const* tables, const int32_t* thresholds, const uint8_t* valid,
             int64_t num_queries, uint8_t* flags, int32_t* found) {
  const auto of = valid != nullptr ? flag_for<true>(num_queries) : flag_for<false>(num_queries);
  return of(codes, begin, end, next, tables, thresholds, valid, flags, found);
}

// int8 rows, 16 a block: one vpdpbusd adds four products to each row's sum.
template <int kQueries, bool kAffine>
void dot_blocks(const ByteRows& rows, const RowTerms& terms, int64_t begin, int64_t end,
                const ScanQuery* queries) {
  for (int64_t i = begin; i < end; ++i) {
    const uint8_t* block = rows.block(i);
    __m512i sums[kQueries][1];
    const int8_t* components[kQueries];
    UNROLL
    for (int q = 0; q < kQueries; ++q) {
      sums[q][0] = _mm512_set1_epi32(queries[q].shift);
      components[q] = static_cast<const int8_t*>(queries[q].table);
    }
    for (int64_t g = 0; g < rows.groups; ++g) {
      const __m512i bytes = _mm512_loadu_si512(block + 64 * g);
      prefetch_ahead(block + 64 * g);
      UNROLL
      for (int q = 0; q < kQueries; ++q) {
        int32_t four;
        __builtin_memcpy(&four, components[q] + 4 * g, 4);
        dot_accumulate(sums[q][0], bytes, _mm512_set1_epi32(four));
      }
    }
    // The shift is in the sums already.
    int32_t threshold[kQueries];
    for (int q = 0; q < kQueries; ++q) threshold[q] = queries[q].collector->threshold;
    collect_all<kQueries, 1, kAffine>(queries, sums, terms, i * 16, rows.num_rows, threshold);
  }
}

template <bool kAffine>
void dot_all(const ByteRows& rows, const RowTerms& terms, int64_t begin, int64_t end,
             const ScanQuery* queries, int64_t num_queries) {
  const int64_t piece = 1 + (256 << 10) / (rows.groups * 64 + 1);
  for (int64_t from = begin; from < end; from += piece) {
    const int64_t to = from + piece < end ? from + piece : end;
    int64_t q = 0;
    for (; q + 8 <= num_queries; q += 8) dot_blocks<8, kAffine>(rows, terms, from, to, queries + q);
    for (; q + 2 <= num_queries; q += 2) dot_blocks<2, kAffine>(rows, terms, from, to, queries + q);
    for (; q < num_queries; ++q) dot_blocks<1, kAffine>(rows, terms, from, to, queries + q);
  }
}

void dot_scan(const ByteRows& rows, const RowTerms& terms, int64_t begin, int64_t end,
              const ScanQuery* queries, int64_t num_queries) {
  if (terms.gain != nullptr) {
    dot_all<true>(rows, terms, begin, end, queries, num_queries);
  } else {
    dot_all<false>(rows, terms, begin, end, queries, num_queries);
  }
}

int64_t count(const int32_t* keys, int64_t size, int32_t pivot) {
  const __m512i bar = _mm512_set1_epi32(pivot);
  int64_t total = 0, i = 0;
  for (; i + 16 <= size; i += 16) {
    total += _mm_popcnt_u32(_mm512_cmpge_epi32_mask(_mm512_loadu_si512(keys + i), bar));
  }
  const auto tail = static_cast<__mmask16>((1u << (size - i)) - 1u);
  return total + _mm_popcnt_u32(_mm512_mask_cmpge_epi32_mask(
                     tail, _mm512_maskz_loadu_epi32(tail, keys + i), bar));
}

// kDwords: the code of subspace c of a group, of point v, is bits 8 c .. 8 c + 3 of lane v, and
// vpermps ignores all higher bits of its index: a shift and a look-up a subspace, summed in order.
void exact_scores(const float* padded_table, const Codes& codes, int64_t begin, int64_t end,
                  float* out) {
  for (int64_t i = begin; i < end; ++i) {
    const uint8_t* block = codes.block(i);
    __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
    for (int64_t s = 0; s < codes.num_subspaces; ++s) {
      const __m512i bytes = _mm512_loadu_si512(block + 64 * (s >> 2));
      const __m512 entries = _mm512_loadu_ps(padded_table + 16 * s);
      const __m512i at = _mm512_srl_epi32(bytes, _mm_cvtsi32_si128(static_cast<int>(8 * (s & 3))));
      low = _mm512_add_ps(low, _mm512_permutexvar_ps(at, entries));
      high = _mm512_add_ps(high, _mm512_permutexvar_ps(_mm512_srli_epi32(at, 4), entries));
    }
    _mm512_storeu_ps(out + 32 * (i - begin), low);
    _mm512_storeu_ps(out + 32 * (i - begin) + 16, high);
  }
}

// Sixteen rows at a time, and twice as many side by side: the 32-bit word of a row in a group holds its
// four codes, in the low nibbles of the bytes for points 0-15 of the block and in the high ones for 16-31.
template <int kVectors>
__attribute__((always_inline)) inline void exact_some(const float* padded_table, const Codes& codes,
                                                      const int32_t* rows, int64_t count, float* out) {
  const __m512i stride = _mm512_set1_epi32(static_cast<int32_t>(codes.groups * 16));
  __mmask16 tail[kVectors];
  __m512i shift[kVectors], word[kVectors];
  __m512 sum[kVectors];
  UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const int64_t left = count - 16 * v;
    tail[v] = static_cast<__mmask16>(left >= 16 ? 0xffffu : (1u << left) - 1u);
    const __m512i row = _mm512_maskz_loadu_epi32(tail[v], rows + 16 * v);
    const __m512i point = _mm512_and_si512(row, _mm512_set1_epi32(15));
    // 4 where the row lies in the upper half of its block: the shift to its nibbles.
    shift[v] = _mm512_srli_epi32(_mm512_and_si512(row, _mm512_set1_epi32(16)), 2);
    word[v] = _mm512_add_epi32(_mm512_mullo_epi32(_mm512_srli_epi32(row, 5), stride), point);
    sum[v] = _mm512_setzero_ps();
  }
  for (int64_t s = 0; s < codes.num_subspaces; s += 4) {
    __m512i four[kVectors];
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      four[v] = _mm512_srlv_epi32(_mm512_i32gather_epi32(word[v], codes.data, 4), shift[v]);
      word[v] = _mm512_add_epi32(word[v], _mm512_set1_epi32(16));
    }
    const int64_t stop = s + 4 < codes.num_subspaces ? s + 4 : codes.num_subspaces;
    for (int64_t c = s; c < stop; ++c) {
      const __m512 entries = _mm512_loadu_ps(padded_table + 16 * c);
      UNROLL
      for (int v = 0; v < kVectors; ++v) {
        sum[v] = _mm512_add_ps(sum[v], _mm512_permutexvar_ps(four[v], entries));
        four[v] = _mm512_srli_epi32(four[v], 8);
      }
    }
  }
  UNROLL
  for (int v = 0; v < kVectors; ++v) _mm512_mask_storeu_ps(out + 16 * v, tail[v], sum[v]);
}

void exact_rows(const float* padded_table, const Codes& codes, const int32_t* rows, int64_t count,
                float* out) {
  int64_t i = 0;
  for (; i + 16 < count; i += 32) exact_some<2>(padded_table, codes, rows + i, count - i, out + i);
  if (i < count) exact_some<1>(padded_table, codes, rows + i, count - i, out + i);
}

TARGET_END

const Kernels kKernels = {"avx512vbmi", expanded_bytes,   expand, scan,
                          count,        exact_scores,     exact_rows,
                          maxima,       flag,             flag_rows,
                          measure16_avx512, round_down16_avx512};

}  // namespace

const Kernels* avx512vbmi_kernels() {
  const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                    __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("bmi2");
  return runs ? &kKernels : nullptr;
}

DotScan dot_scan_avx512vnni() { return dot_scan; }

}  // namespace xla_kernels

#else

namespace xla_kernels {
DotScan dot_scan_avx512vnni() { return nullptr; }
const Kernels* avx512vbmi_kernels() { return nullptr; }
}  // namespace xla_kernels

#endif
