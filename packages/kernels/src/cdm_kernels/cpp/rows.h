// What the kernels over rows of logits share: rows over threads, their tails, and e^d of d <= 0.
#pragma once

#include <algorithm>
#include <memory>

#include "common.h"

namespace {

template <class V> using Element = std::remove_reference_t<decltype(std::declval<V&>()[0])>;

// A row of n elements, in blocks of one vector of S.
template <class S> struct Row {
  int64_t n, blocks;
  explicit Row(int64_t n) : n(n), blocks((n + LANES<S> - 1) / LANES<S>) {}

  int64_t padded() const { return blocks * LANES<S>; }
  int lanes(int64_t block) const { return block + 1 < blocks ? LANES<S> : int(n - block * LANES<S>); }
  template <class T> auto get(const T* row, int64_t block) const {
    const T* p = row + block * LANES<S>;
    return lanes(block) == LANES<S> ? load(p) : load(p, lanes(block));
  }
  template <class T, class V> void put(T* row, int64_t block, V value) const {
    T* p = row + block * LANES<S>;
    if (lanes(block) == LANES<S>) store(p, value); else store(p, value, lanes(block));
  }
};

// body(row, scratch) for each of `batch` rows; the scratch: `bytes` of the thread's own, aligned to a vector.
template <class F> void each_row(int64_t batch, int64_t n, int64_t bytes, int64_t threads, F&& body) {
#pragma omp parallel num_threads(threads) if (batch * n > 16384)
  {
    std::unique_ptr<char[]> memory(new char[bytes + 64]);
    char* scratch = memory.get() + (-reinterpret_cast<uintptr_t>(memory.get()) & 63);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < batch; ++row) body(row, scratch);
  }
}

// The first n lanes of a, the others of b; n from 0 to all.
#ifdef __AVX512F__
CDM_INLINE VF splice(int n, VF a, VF b) {
  return (VF)_mm512_mask_mov_ps((__m512)b, (__mmask16)((1u << n) - 1), (__m512)a);
}
CDM_INLINE VD splice(int n, VD a, VD b) {
  return (VD)_mm512_mask_mov_pd((__m512d)b, (__mmask8)((1u << n) - 1), (__m512d)a);
}
#else
template <class V> CDM_INLINE V splice(int n, V a, V b) {
  std::memcpy(&b, &a, n * sizeof(a[0]));
  return b;
}
#endif

// Where e^-d is 0, or too little to count beside 1.
template <class S> constexpr S NOTHING = std::is_same_v<S, float> ? 104 : 746;

// x[k] = e^x[k] for whole vectors of x <= 0, and their sum; clamped, as -inf would make it NaN.
template <class S> CDM_INLINE S exponentials(S* x, int64_t padded) {
  typename Wide<S>::V sum{};
  for (int64_t k = 0; k < padded; ++k) x[k] = x[k] < -NOTHING<S> ? -NOTHING<S> : x[k];
  for (int64_t k = 0; k < padded; k += LANES<S>) {
    auto e = exponential(load(x + k));
    store(x + k, e);
    sum += e;
  }
  return total(sum);
}

template <class T> const T* as(const void* p) { return static_cast<const T*>(p); }
template <class T> T* as(void* p) { return static_cast<T*>(p); }

template <class F> void with_dtype(int64_t dtype, F&& body) {
  if (dtype == FLOAT32) body(float{});
  if (dtype == BFLOAT16) body(bfloat16{});
  if (dtype == FLOAT64) body(double{});
}

}  // namespace
