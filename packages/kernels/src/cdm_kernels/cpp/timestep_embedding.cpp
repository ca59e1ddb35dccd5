// Sines and cosines of t (factor w), side by side: sinusoidal embeddings.
//
// x = n pi/2 + r with |r| <= pi/4 gives both from two polynomials in r, here in float64 whatever the storage.
// float32 results take Cephes' short ones, and n pi/2 with one constant, right to 1e-16 |x|; float64 results take
// fdlibm's, and pi/2 in two parts, of which the first has 33 bits and so exact multiples. Rows with phases beyond
// `largest`, where that ends, go to the C library.
#include <algorithm>

#include "common.h"

namespace {

constexpr int WIDTH = LANES<double>;
constexpr double TWO_OVER_PI = 0.63661977236758134308;
constexpr double TO_INTEGER = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves an integer in the lowest bits

template <class T> struct Series;
template <> struct Series<float> {
  static constexpr double largest = 1e8, half_pi[] = {1.57079632679489661923};
  static constexpr double sine[] = {-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1};
  static constexpr double cosine[] = {2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2};
};
template <> struct Series<double> {
  static constexpr double largest = 1e6, half_pi[] = {1.57079632673412561417, 6.07710050650619224932e-11};
  static constexpr double sine[] = {1.58969099521155010221e-10, -2.50507602534068634195e-8, 2.75573137070700676789e-6,
                                    -1.98412698298579493134e-4, 8.33333333332248946124e-3,  -1.66666666666666324348e-1};
  static constexpr double cosine[] = {-1.13596475577881948265e-11, 2.08757232129817482790e-9,
                                      -2.75573143513906633035e-7,  2.48015872894767294178e-5,
                                      -1.38888888888741095749e-3,  4.16666666666666019037e-2};
};

template <int N> CDM_INLINE VD polynomial(const double (&coefficients)[N], VD z) {
  VD p = splat(coefficients[0]);
  for (int i = 1; i < N; ++i) p = p * z + coefficients[i];
  return p;
}

template <class T> CDM_INLINE void sine_and_cosine(VD x, VD& sine, VD& cosine) {
  using C = Series<T>;
  VD shifted = x * TWO_OVER_PI + TO_INTEGER, n = shifted - TO_INTEGER, r = x;
  for (double part : C::half_pi) r -= n * part;
  VD z = r * r, s = r + r * z * polynomial(C::sine, z), c = 1 - (0.5 * z - z * z * polynomial(C::cosine, z));
  ID quarter = (ID)shifted;
  ID swap = ((ID)s ^ (ID)c) & -(quarter & 1);
  sine = (VD)((ID)s ^ swap ^ ((quarter & 2) << 62));
  cosine = (VD)((ID)c ^ swap ^ (((quarter + 1) & 2) << 62));
}

// Eight values of T, or the first n of them, the others 0.
template <class T> struct Eight { typedef T V __attribute__((vector_size(WIDTH * sizeof(T)))); };
template <class T> CDM_INLINE typename Eight<T>::V fetch(const T* p, int n) {
  typename Eight<T>::V v{};
  if (n == WIDTH) std::memcpy(&v, p, sizeof v);
  else for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
template <class T> CDM_INLINE void put(T* p, VD value, int n) {
  auto v = __builtin_convertvector(value, typename Eight<T>::V);
  if (n == WIDTH) std::memcpy(p, &v, sizeof v);
  else for (int i = 0; i < n; ++i) p[i] = v[i];
}

// The last eight overlap the ones before.
template <class T> void embed_row(T t, T factor, const T* frequencies, int64_t half, T* sines, T* cosines) {
  const int n = half < WIDTH ? int(half) : WIDTH;
  for (int64_t i = 0; i < half; i += WIDTH) {
    int64_t first = std::min(i, half - n);
    VD sine, cosine;
    sine_and_cosine<T>(__builtin_convertvector(t * (factor * fetch(frequencies + first, n)), VD), sine, cosine);
    put(sines + first, sine, n);
    put(cosines + first, cosine, n);
  }
}

template <class T>
void embed(int64_t batch, int64_t half, int64_t dim, bool sin_first, int64_t threads, T factor, const T* t,
           const T* frequencies, T* out) {
  T highest = 0;
  for (int64_t i = 0; i < half; ++i) highest = std::max(highest, std::fabs(factor * frequencies[i]));
#pragma omp parallel for num_threads(threads) schedule(static) if (batch * half > 8192)
  for (int64_t b = 0; b < batch; ++b) {
    T *row = out + b * dim, *sines = row + (sin_first ? 0 : half), *cosines = row + (sin_first ? half : 0);
    if (std::fabs(t[b]) * highest > Series<T>::largest) {
      for (int64_t i = 0; i < half; ++i) {
        T phase = t[b] * (factor * frequencies[i]);
        sines[i] = std::sin(phase);
        cosines[i] = std::cos(phase);
      }
    } else {
      embed_row(t[b], factor, frequencies, half, sines, cosines);
    }
    for (int64_t i = 2 * half; i < dim; ++i) row[i] = 0;
  }
}

// The derivative in t: out = sum factor w (p c - q s), dy = (p, q) being the cotangents of sines s and cosines c.
template <class T>
void slope(int64_t batch, int64_t half, int64_t dim, bool sin_first, int64_t threads, T factor, const T* dy, const T* y,
           const T* frequencies, T* out) {
  const int64_t sine = sin_first ? 0 : half, cosine = sin_first ? half : 0;
#pragma omp parallel for num_threads(threads) schedule(static) if (batch * half > 8192)
  for (int64_t b = 0; b < batch; ++b) {
    const T *p = dy + b * dim + sine, *q = dy + b * dim + cosine, *s = y + b * dim + sine, *c = y + b * dim + cosine;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < half; ++i) sum += frequencies[i] * (p[i] * c[i] - q[i] * s[i]);
    out[b] = factor * sum;
  }
}

}  // namespace

CDM_EXPORT void CDM_NAME(cdm_sinusoidal_embedding)(int64_t batch, int64_t half, int64_t dim, int64_t sin_first,
                                                   int64_t dtype, int64_t threads, double factor,
                                                   const void* t, const void* frequencies, void* out) {
  auto run = [&](auto tag) {
    using T = decltype(tag);
    embed(batch, half, dim, sin_first, threads, T(factor), static_cast<const T*>(t),
          static_cast<const T*>(frequencies), static_cast<T*>(out));
  };
  if (dtype == FLOAT64) run(double{}); else run(float{});
}

CDM_EXPORT void CDM_NAME(cdm_sinusoidal_embedding_slope)(int64_t batch, int64_t half, int64_t dim, int64_t sin_first,
                                                         int64_t dtype, int64_t threads, double factor,
                                                         const void* dy, const void* y, const void* frequencies,
                                                         void* out) {
  auto run = [&](auto tag) {
    using T = decltype(tag);
    slope(batch, half, dim, sin_first, threads, T(factor), static_cast<const T*>(dy), static_cast<const T*>(y),
          static_cast<const T*>(frequencies), static_cast<T*>(out));
  };
  if (dtype == FLOAT64) run(double{}); else run(float{});
}
