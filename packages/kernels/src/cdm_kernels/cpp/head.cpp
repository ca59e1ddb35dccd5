// Noise-level head: forward, backward, and the backward of the backward.
//
// F_k is the running sum of a row o without o_0, p = softmax(F), S_j = sum_{k>=j} p_k, r the reference level:
//   forward          M = max F, spread = log sum exp(F - M):  cross-entropy = M - F_t + spread, log-ratio = F_r - F_t
//   backward         g, h: cotangents of those;  do_j = g (S_j - [j <= t]) + h ([j <= r] - [j <= t])
//   double backward  v: cotangent of do, c its running sum without v_0, d = c - c_peak, m = <p, d>
//     dg = m + c_peak - c_t    dh = c_r - c_t    do_j = sum_{k>=j} w_k with w = g p (d - m)
// S_j - [j <= t] is minus the sum of p before j where j <= t, and the w sum to 0: so a row is summed from both ends
// towards t, and nothing cancels. Running sums are in float64: F reaches 1e4, and p is as good as F - M. p is 0 where F
// is far below M: of a trained classifier's row everywhere but in a short window, to which backward passes keep.
#include "rows.h"

namespace {

// What generic vectors cannot do: the sum of the lanes before each, and from each on; the last lane in all.
#ifdef __AVX512F__
template <int N> CDM_INLINE VF up(VF v) {
  return (VF)_mm512_alignr_epi32((__m512i)v, _mm512_setzero_si512(), 16 - N);
}
template <int N> CDM_INLINE VD up(VD v) {
  return (VD)_mm512_alignr_epi64((__m512i)v, _mm512_setzero_si512(), 8 - N);
}
template <int N> CDM_INLINE VF down(VF v) { return (VF)_mm512_alignr_epi32(_mm512_setzero_si512(), (__m512i)v, N); }
template <int N> CDM_INLINE VD down(VD v) { return (VD)_mm512_alignr_epi64(_mm512_setzero_si512(), (__m512i)v, N); }
CDM_INLINE VF last(VF v) { return (VF)_mm512_permutexvar_ps(_mm512_set1_epi32(15), (__m512)v); }
CDM_INLINE VD last(VD v) { return (VD)_mm512_permutexvar_pd(_mm512_set1_epi64(7), (__m512d)v); }
template <class V> CDM_INLINE V through(V v) {
  v += up<1>(v);
  v += up<2>(v);
  v += up<4>(v);
  if constexpr (std::is_same_v<V, VF>) v += up<8>(v);
  return v;
}
template <class V> CDM_INLINE V before(V v) { return through(up<1>(v)); }
template <class V> CDM_INLINE V onward(V v) {
  v += down<1>(v);
  v += down<2>(v);
  v += down<4>(v);
  if constexpr (std::is_same_v<V, VF>) v += down<8>(v);
  return v;
}
#else
template <class V> constexpr int WIDTH = sizeof(V) / sizeof(Element<V>);
template <class V> CDM_INLINE V last(V v) { return v[WIDTH<V> - 1] - V{}; }
template <class V> CDM_INLINE V before(V v) {
  Element<V> part[WIDTH<V>], sum = 0;
  store(part, v);
  for (auto& x : part) {
    Element<V> next = sum + x;
    x = sum;
    sum = next;
  }
  return load(part);
}
template <class V> CDM_INLINE V onward(V v) {
  Element<V> part[WIDTH<V>];
  store(part, v);
  for (int i = WIDTH<V> - 2; i >= 0; --i) part[i] += part[i + 1];
  return load(part);
}
#endif

constexpr double LEAST = -1e300;  // below every sum

// sums[k] = sum_{1 <= j <= k} x[j], LEAST past the end; returns the largest, or NaN where there is one.
#ifdef __AVX512F__
CDM_INLINE VD wide(const float* p, int n) {
  return (VD)_mm512_cvtps_pd(_mm256_maskz_loadu_ps((__mmask8)((1u << n) - 1), p));
}
CDM_INLINE VD wide(const bfloat16* p, int n) {
  __m256i words = _mm256_cvtepu16_epi32(_mm_maskz_loadu_epi16((__mmask8)((1u << n) - 1), p));
  return (VD)_mm512_cvtps_pd((__m256)_mm256_slli_epi32(words, 16));
}
CDM_INLINE VD wide(const double* p, int n) { return load(p, n); }
template <class S, class T> CDM_INLINE double running_sums(const Row<S>& row, const T* x, double* sums) {
  VD carry{}, best = splat(LEAST);
  auto block = [&](int64_t k, VD part, int valid) {
    part = through(part);
    VD f = carry + part;
    carry += last(part);
    if (valid < 8) f = splice(valid, f, splat(LEAST));
    best = (VD)_mm512_max_pd((__m512d)best, (__m512d)f);
    store(sums + k, f);
  };
  auto valid = [&](int64_t k) { return int(std::clamp<int64_t>(row.n - k, 0, 8)); };
  block(0, splice(1, VD{}, wide(x, valid(0))), valid(0));
  int64_t k = 8;
  for (; k + 8 <= row.n; k += 8) block(k, wide(x + k, 8), 8);
  for (; k < row.padded(); k += 8) block(k, wide(x + k, valid(k)), valid(k));
  const double end = sums[row.n - 1];
  return end == end ? _mm512_reduce_max_pd((__m512d)best) : end;
}
// Whether a whole vector of S lies below floor; of NaN never.
template <class S> CDM_INLINE bool below(const double* sums, double floor) {
  unsigned lanes = _mm512_cmp_pd_mask((__m512d)load(sums), _mm512_set1_pd(floor), _CMP_LT_OQ);
  if (LANES<S> == 16) lanes &= _mm512_cmp_pd_mask((__m512d)load(sums + 8), _mm512_set1_pd(floor), _CMP_LT_OQ);
  return lanes == 255;
}
#else
CDM_INLINE double number(float x) { return x; }
CDM_INLINE double number(double x) { return x; }
CDM_INLINE double number(bfloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class S, class T> CDM_INLINE double running_sums(const Row<S>& row, const T* x, double* sums) {
  // Stretches of the row side by side, as each sum waits for the one before it; of four GCC would make slow vectors.
  constexpr int stretches = 5;
  const int64_t size = row.n / stretches;
  double part[stretches] = {}, sum = 0, best = LEAST;
  for (int64_t i = 0; i < size; ++i)
    for (int c = 0; c < stretches; ++c) {
      const int64_t k = c * size + i;
      sums[k] = part[c] += k ? number(x[k]) : 0.0;
    }
  for (int c = 0; c < stretches; ++c) {
    double* from = sums + c * size;
#pragma omp simd reduction(max : best)
    for (int64_t i = 0; i < size; ++i) {
      from[i] += sum;
      best = from[i] > best ? from[i] : best;
    }
    sum += part[c];
  }
  for (int64_t k = stretches * size; k < row.n; ++k) {
    sums[k] = sum += k ? number(x[k]) : 0.0;
    best = sum > best ? sum : best;
  }
  for (int64_t k = row.n; k < row.padded(); ++k) sums[k] = LEAST;
  return sum == sum ? best : sum;
}
template <class S> CDM_INLINE bool below(const double* sums, double floor) {
  int lanes = 0;
  for (int i = 0; i < LANES<S>; ++i) lanes += sums[i] < floor;
  return lanes == LANES<S>;
}
#endif

// What a forward pass leaves of each row for the backward passes.
template <class S> struct Summary {
  S spread, first, end;  // log sum exp(F - M); the blocks where p is not 0, from the first to before the end
};

// Of p, sums and weights in the scratch, those of the window: its first block is their first.
template <class S> struct Window {
  int64_t first, end;
  Row<S> part;
  Window(const Row<S>& row, const Summary<S>& summary)
      : first(int64_t(summary.first)),
        end(int64_t(summary.end)),
        part(std::min(row.n, end * LANES<S>) - first * LANES<S>) {}
  int64_t start() const { return first * LANES<S>; }
};

// p of the window, and M relative to the window's first element.
template <class S, class T>
CDM_INLINE double probabilities(const Window<S>& window, const Summary<S>& summary, const T* o, double* sums, S* p) {
  const double peak = running_sums(window.part, o + window.start(), sums), origin = peak + summary.spread;
  for (int64_t k = 0; k < window.part.padded(); ++k) p[k] = S(sums[k] - origin);
  exponentials(p, window.part.padded());
  return peak;
}

// put(block, v) with v_j minus the sum of the weights before j where j <= t, and their sum from j on where j > t.
template <class S, class P>
CDM_INLINE void from_both_ends(const Row<S>& row, const Window<S>& window, const S* weights, int64_t t, P&& put) {
  using V = typename Wide<S>::V;
  const int64_t middle = t / LANES<S>;
  auto weight = [&](int64_t i) { return load(weights + (i - window.first) * LANES<S>); };
  V left{}, right{};
  int64_t i = 0;
  for (; i < std::min(middle, window.first); ++i) put(i, left);
  for (; i < std::min(middle, window.end); ++i) {
    V w = weight(i), sums = before(w);
    put(i, 0 - (left + sums));
    left += last(sums + w);
  }
  for (; i < middle; ++i) put(i, 0 - left);
  i = row.blocks - 1;
  for (; i > middle && i >= window.end; --i) put(i, right);
  for (; i > middle && i >= window.first; --i) {
    V w = weight(i);
    put(i, right + onward(w));
    right += last(before(w) + w);
  }
  for (; i > middle; --i) put(i, right);
  V w = middle < window.first || middle >= window.end ? V{} : weight(middle);
  put(middle, splice(int(t - middle * LANES<S>) + 1, 0 - (left + before(w)), right + onward(w)));
}

template <class T, class S = Accumulator<T>>
void forward(int64_t batch, int64_t n, int64_t reference, const T* o, const int64_t* levels, S* cross_entropy,
             S* log_ratio, int64_t* estimate, Summary<S>* summary, int64_t* outside, int64_t threads) {
  const Row<S> row(n);
  each_row(batch, n, row.padded() * (sizeof(double) + sizeof(S)), threads, [&](int64_t b, char* scratch) {
    double* sums = as<double>(scratch);
    S* e = as<S>(sums + row.padded());
    const int64_t t = levels[b];
    if (t < 0 || t >= n) {
#pragma omp atomic write
      *outside = 1;
      return;
    }
    const double peak = running_sums(row, o + b * n, sums), floor = peak - NOTHING<S>;
    int64_t first = 0, end = row.blocks;
    while (first + 1 < end && below<S>(sums + first * LANES<S>, floor)) ++first;
    while (first + 1 < end && below<S>(sums + (end - 1) * LANES<S>, floor)) --end;
    int64_t k = first * LANES<S>;
    for (int64_t i = k; i < end * LANES<S>; ++i) e[i - k] = S(sums[i] - peak);
    const S spread = std::log(exponentials(e, end * LANES<S> - k));
    cross_entropy[b] = S(peak - sums[t]) + spread;
    if (summary) summary[b] = {spread, S(first), S(end)};
    if (!estimate) return;  // the cross-entropy alone
    while (k + LANES<S> < n && below<S>(sums + k, peak)) k += LANES<S>;
    while (k + 1 < n && sums[k] < peak) ++k;
    log_ratio[b] = S(sums[reference] - sums[t]);
    estimate[b] = k;
  });
}

template <class T, class S = Accumulator<T>>
void backward(int64_t batch, int64_t n, int64_t reference, const S* g, const S* h, const T* o,
              const int64_t* levels, const Summary<S>* summary, T* out, int64_t threads) {
  using V = typename Wide<S>::V;
  const Row<S> row(n);
  each_row(batch, n, row.padded() * (sizeof(double) + sizeof(S)), threads, [&](int64_t b, char* scratch) {
    double* sums = as<double>(scratch);
    S* p = as<S>(sums + row.padded());
    const int64_t t = levels[b], low = std::min(t, reference), high = std::max(t, reference);
    const V step = splat(h ? (reference > t ? h[b] : -h[b]) : S(0));
    auto put = [&](int64_t i, V v) {  // plus the step from after `low` to `high`
      const int64_t from = low + 1 - i * LANES<S>, to = high + 1 - i * LANES<S>;
      if (from <= 0 && to >= LANES<S>)
        v += step;
      else if (from < LANES<S> && to > 0)
        v += splice(std::max(int(from), 0), V{}, splice(std::min(int(to), LANES<S>), step, V{}));
      row.put(out + b * n, i, v);
    };
    if (!g) {
      for (int64_t i = 0; i < row.blocks; ++i) put(i, V{});
      return;
    }
    const Window<S> window(row, summary[b]);
    probabilities(window, summary[b], o + b * n, sums, p);
    for (int64_t k = 0; k < window.part.padded(); ++k) p[k] *= g[b];
    from_both_ends(row, window, p, t, put);
  });
}

template <class T, class S = Accumulator<T>>
void double_backward(int64_t batch, int64_t n, int64_t reference, const T* v, const S* g, const T* o,
                     const int64_t* levels, const Summary<S>* summary, S* dg, S* dh, T* out, int64_t threads) {
  using V = typename Wide<S>::V;
  const Row<S> row(n);
  each_row(batch, n, row.padded() * (2 * sizeof(double) + sizeof(S)), threads, [&](int64_t b, char* scratch) {
    double *sums = as<double>(scratch), *along = sums + row.padded();
    S* p = as<S>(along + row.padded());
    const int64_t t = levels[b];
    running_sums(row, v + b * n, along);
    for (int64_t k = n; k < row.padded(); ++k) along[k] = 0;  // p is 0 there, but 0 times LEAST is not
    const Window<S> window(row, summary[b]);
    const double peak = probabilities(window, summary[b], o + b * n, sums, p), *c = along + window.start();
    const double centre = c[std::find(sums, sums + window.part.n - 1, peak) - sums];
    S mean = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t k = 0; k < window.part.padded(); ++k) mean += p[k] * S(c[k] - centre);
    dg[b] = S(centre - along[t]) + mean;
    dh[b] = S(along[reference] - along[t]);
    const S scale = g ? g[b] : S(0);
    for (int64_t k = 0; k < window.part.padded(); ++k) p[k] *= scale * (S(c[k] - centre) - mean);
    from_both_ends(row, window, p, t, [&](int64_t i, V value) { row.put(out + b * n, i, value); });
  });
}

}  // namespace

#define ROWS int64_t batch, int64_t levels, int64_t dtype, int64_t threads, int64_t reference

CDM_EXPORT void CDM_NAME(cdm_head)(ROWS, const void* o, const void* t, void* cross_entropy, void* log_ratio,
                                   void* estimate, void* summary, void* outside) {
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    using S = Accumulator<T>;
    forward<T>(batch, levels, reference, as<T>(o), as<int64_t>(t), as<S>(cross_entropy), as<S>(log_ratio),
               as<int64_t>(estimate), as<Summary<S>>(summary), as<int64_t>(outside), threads);
  });
}

CDM_EXPORT void CDM_NAME(cdm_head_backward)(ROWS, const void* g, const void* h, const void* o, const void* t,
                                            const void* summary, void* out) {
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    using S = Accumulator<T>;
    backward<T>(batch, levels, reference, as<S>(g), as<S>(h), as<T>(o), as<int64_t>(t), as<Summary<S>>(summary),
                as<T>(out), threads);
  });
}

CDM_EXPORT void CDM_NAME(cdm_head_double_backward)(ROWS, const void* v, const void* g, const void* o,
                                                   const void* t, const void* summary, void* dg, void* dh,
                                                   void* out) {
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    using S = Accumulator<T>;
    double_backward<T>(batch, levels, reference, as<T>(v), as<S>(g), as<T>(o), as<int64_t>(t),
                       as<Summary<S>>(summary), as<S>(dg), as<S>(dh), as<T>(out), threads);
  });
}
