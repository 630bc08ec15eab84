#include "table.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace xla_kernels {

int64_t table_stride(Layout layout, int64_t num_codewords) {
  if (layout != Layout::kBytes) return 16;
  return num_codewords <= 64 ? 64 : num_codewords <= 128 ? 128 : 256;
}

namespace {

void measure_table(const float* table, int64_t num_subspaces, int64_t num_codewords, float* lows,
                   TableMeasures* out) {
  float poison = 0;
  bool integers = true;
  for (int64_t s = 0; s < num_subspaces; ++s) {
    const float* entries = table + s * num_codewords;
    float low = entries[0], high = entries[0], not_finite = 0;
    for (int64_t j = 0; j < num_codewords; ++j) {
      const float t = entries[j];
      low = t < low ? t : low;
      high = t > high ? t : high;
      not_finite += t * 0.0f;
    }
    poison += not_finite;
    // The first fraction ends the search for integers.
    for (int64_t j = 0; integers && j < num_codewords; ++j) {
      const float t = entries[j];
      integers = t < 1e9f && t > -1e9f && static_cast<float>(static_cast<int32_t>(t)) == t;
    }
    lows[s] = low;
    out->add(low, high);
  }
  out->finite = poison == 0.0f;
  out->integers = integers;
}

void round_entries(const float* table, int64_t num_subspaces, int64_t num_codewords, int64_t stride,
                   const float* lows, float scale, int32_t top, uint8_t* out, TableLosses* losses) {
  for (int64_t s = 0; s < num_subspaces; ++s) {
    const float* entries = table + s * num_codewords;
    const float low = lows[s];
    // Sixteen lanes, so that neither the largest remainder nor the sum is a chain.
    float worst[16] = {}, sum[16] = {};
    uint8_t* to = out + s * stride;
    for (int64_t first = 0; first < num_codewords; first += 16) {
      const int64_t count = std::min<int64_t>(16, num_codewords - first);
      for (int64_t j = 0; j < count; ++j) {
        const float x = (entries[first + j] - low) * scale;
        int32_t q = static_cast<int32_t>(x);
        q = q < top ? q : top;
        const float remainder = x - static_cast<float>(q);
        worst[j] = remainder > worst[j] ? remainder : worst[j];
        sum[j] += remainder;
        to[first + j] = static_cast<uint8_t>(q);
      }
    }
    for (int64_t half = 8; half > 0; half /= 2) {
      for (int64_t j = 0; j < half; ++j) {
        worst[j] = worst[j] > worst[j + half] ? worst[j] : worst[j + half];
        sum[j] += sum[j + half];
      }
    }
    losses->largest += worst[0];
    losses->total += sum[0];
  }
}

}  // namespace

TableBounds round_table(const float* table, Layout layout, int64_t num_subspaces,
                        int64_t num_codewords, const Kernels& kernels, uint8_t* out) {
  TableBounds bounds;
  const int64_t stride = table_stride(layout, num_codewords);
  std::memset(out, 0, static_cast<size_t>(rounded_table_bytes(layout, num_subspaces, num_codewords)));

  std::vector<float> low_storage(static_cast<size_t>(num_subspaces));
  float* lows = low_storage.data();
  const bool sixteen = num_codewords == 16 && stride == 16 && kernels.measure16 != nullptr;
  TableMeasures measures;
  if (sixteen) {
    kernels.measure16(table, num_subspaces, lows, &measures);
  } else {
    measure_table(table, num_subspaces, num_codewords, lows, &measures);
  }
  const float range = measures.range, magnitude = measures.magnitude;
  bounds.finite = measures.finite;
  bounds.bounded = bounds.finite && magnitude < 1e37f && range < 1e37f;
  bounds.base = static_cast<float>(measures.base);
  if (!bounds.bounded) return bounds;

  const int32_t top = table_max(layout);
  // Small integers are their own rounding, and float sums of them are exact.
  const bool exact =
      measures.integers && range <= static_cast<float>(top) && magnitude < 16777216.0f;
  // Not below the rounding of the sums: a step that is lost in it would make the width overflow.
  const float finest = std::max(range / static_cast<float>(top), magnitude * 1e-8f);
  bounds.delta = exact ? 1.0f : finest;
  // A constant table, or one of denormals: every sum rounds to 0.
  if (!(bounds.delta > 1e-30f)) bounds.delta = 1.0f;
  const float scale = 1.0f / bounds.delta;
  TableLosses losses;
  if (sixteen) {
    kernels.round_down16(table, num_subspaces, lows, scale, top, out, &losses);
  } else {
    round_entries(table, num_subspaces, num_codewords, stride, lows, scale, top, out, &losses);
  }
  if (exact) return bounds;
  bounds.lost = losses.total / static_cast<float>(num_codewords);
  // Error of a float32 sum of m terms (Higham 2002, eq. 4.4), of base, and of the scaling above.
  const double m = static_cast<double>(num_subspaces);
  const double sum_error = (m + 4) * 1.2e-7 * (static_cast<double>(magnitude) + std::fabs(measures.base));
  const double width = losses.largest * (1 + 1e-5) + m * 1e-4 + 2 * sum_error / bounds.delta + 1;
  bounds.width = width < 1e9 ? static_cast<int32_t>(std::ceil(width)) : 1000000000;
  return bounds;
}

}  // namespace xla_kernels
