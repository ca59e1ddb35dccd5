// What the CPU kernels share: one vector type, loads and stores of every storage type, exp and sigmoid.
//
// Each source is compiled once per architecture level with CDM_ARCH naming it (v4bf16, v4, v3, base): its functions end in
// that name, and Python picks the highest level that the processor has. Vectors are GCC's and clang's generic
// ones, 64 bytes wide; the compiler splits them where registers are narrower. float32 and bfloat16 are computed in
// float32, float64 in float64.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define CDM_JOIN_(name, arch) name##_##arch
#define CDM_JOIN(name, arch) CDM_JOIN_(name, arch)
#define CDM_NAME(name) CDM_JOIN(name, CDM_ARCH)
#define CDM_EXPORT extern "C" __attribute__((visibility("default")))
#define CDM_INLINE static inline __attribute__((always_inline))

namespace {

struct bfloat16 {
  uint16_t bits;
};

enum Dtype : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT64 = 2 };

// The type that T is computed in.
template <class T> using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class S> struct Wide;
template <> struct Wide<float> {
  static constexpr int lanes = 16;
  typedef float V __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));
};
template <> struct Wide<double> {
  static constexpr int lanes = 8;
  typedef double V __attribute__((vector_size(64)));
  typedef int64_t I __attribute__((vector_size(64)));
};
using VF = Wide<float>::V;
using IF = Wide<float>::I;
using VD = Wide<double>::V;
using ID = Wide<double>::I;
typedef uint16_t Half __attribute__((vector_size(32)));
typedef uint32_t Word __attribute__((vector_size(64)));
template <class S> constexpr int LANES = Wide<S>::lanes;

template <class S> CDM_INLINE typename Wide<S>::V splat(S value) {
  return value - typename Wide<S>::V{};
}

CDM_INLINE VF widen(Half half) { return (VF)(__builtin_convertvector(half, Word) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
CDM_INLINE Half narrow(VF v) {
#ifdef __AVX512BF16__
  return (Half)_mm512_cvtneps_pbh((__m512)v);
#else
  Word u = (Word)v;
  Word rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  // All ones for NaN, by arithmetic: GCC makes branches of a comparison wider than the registers.
  Word nan = (Word)((IF)(0x7f800000u - (u & 0x7fffffffu)) >> 31);
  return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), Half);
#endif
}

CDM_INLINE VF load(const float* p) { VF v; std::memcpy(&v, p, sizeof v); return v; }
CDM_INLINE VD load(const double* p) { VD v; std::memcpy(&v, p, sizeof v); return v; }
CDM_INLINE VF load(const bfloat16* p) { Half h; std::memcpy(&h, p, sizeof h); return widen(h); }
CDM_INLINE void store(float* p, VF v) { std::memcpy(p, &v, sizeof v); }
CDM_INLINE void store(double* p, VD v) { std::memcpy(p, &v, sizeof v); }
CDM_INLINE void store(bfloat16* p, VF v) { Half h = narrow(v); std::memcpy(p, &h, sizeof h); }

// The first n lanes, 0 in the others. AVX-512 has masks; elsewhere through the stack.
#ifdef __AVX512F__
CDM_INLINE VF load(const float* p, int n) { return (VF)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
CDM_INLINE VF load(const bfloat16* p, int n) {
  return widen((Half)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p));
}
CDM_INLINE VD load(const double* p, int n) { return (VD)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p); }
CDM_INLINE void store(float* p, VF v, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v); }
CDM_INLINE void store(bfloat16* p, VF v, int n) {
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)narrow(v));
}
CDM_INLINE void store(double* p, VD v, int n) { _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v); }
#else
template <class T> CDM_INLINE typename Wide<Accumulator<T>>::V load(const T* p, int n) {
  T part[LANES<Accumulator<T>>] = {};
  std::memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <class T> CDM_INLINE void store(T* p, typename Wide<Accumulator<T>>::V v, int n) {
  T part[LANES<Accumulator<T>>];
  store(part, v);
  std::memcpy(p, part, n * sizeof(T));
}
#endif

// Summed by halves.
#ifdef __AVX512F__
CDM_INLINE float total(VF v) { return _mm512_reduce_add_ps((__m512)v); }
CDM_INLINE double total(VD v) { return _mm512_reduce_add_pd((__m512d)v); }
#else
template <class V> CDM_INLINE auto total(V v) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  std::remove_reference_t<decltype(v[0])> part[lanes];
  std::memcpy(part, &v, sizeof v);
  for (int half = lanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}
#endif

// Every lane gets the sum of its block of `size` lanes, a power of two.
template <class V> CDM_INLINE V block_sums(V v, int size) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  for (int step = 1; step < size; step *= 2) {
#ifdef __clang__
    V other;
    for (int i = 0; i < lanes; ++i) other[i] = v[i ^ step];
#else
    std::conditional_t<lanes == 16, IF, ID> index;
    for (int i = 0; i < lanes; ++i) index[i] = i ^ step;
    V other = __builtin_shuffle(v, index);
#endif
    v += other;
  }
  return v;
}

// e^x to 2 units in the last place: Cephes' polynomial on |r| <= ln 2 / 2. Arguments are clamped at +-87, so logits of
// 1e4 cost no more than others (libmvec's expf leaves its fast path beyond -87).
CDM_INLINE VF exponential(VF x) {
#ifdef __AVX512F__
  x = (VF)_mm512_max_ps(_mm512_set1_ps(-87.0f), (__m512)x);  // in this order NaN stays NaN
  x = (VF)_mm512_min_ps(_mm512_set1_ps(87.0f), (__m512)x);
  VF f = (VF)_mm512_roundscale_ps((__m512)(x * 1.44269504088896341f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  // Lane by lane: GCC makes branches of comparisons and selections of vectors wider than the registers.
  float part[LANES<float>];
  int32_t whole[LANES<float>];
  store(part, x);
  for (int i = 0; i < LANES<float>; ++i) {
    float v = part[i] < -87.0f ? -87.0f : part[i];
    part[i] = v > 87.0f ? 87.0f : v;
    float y = part[i] * 1.44269504088896341f;
    whole[i] = int32_t(y + (y < 0.0f ? -0.5f : 0.5f));
  }
  x = load(part);
  IF n;
  std::memcpy(&n, whole, sizeof n);
  VF f = __builtin_convertvector(n, VF);
#endif
  VF r = (x - f * 0.693359375f) - f * -2.12194440e-4f;
  VF p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
#ifdef __AVX512F__
  return (VF)_mm512_scalef_ps((__m512)p, (__m512)f);
#else
  return p * (VF)((n + 127) << 23);
#endif
}
template <class V> CDM_INLINE V reciprocal_root(V v) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<V, VF>) return 1 / (VF)_mm512_sqrt_ps((__m512)v);
#endif
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) v[i] = 1 / std::sqrt(v[i]);
  return v;
}

CDM_INLINE VD exponential(VD x) {
  for (int i = 0; i < LANES<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// 1 / (1 + e^-h). AVX-512 has a reciprocal of 14 bits; one step of Newton's makes them 28 and beats a division.
CDM_INLINE VD sigmoid(VD h) { return 1 / (1 + exponential(-h)); }
CDM_INLINE VF sigmoid(VF h) {
  VF d = 1 + exponential(-h);
#ifdef __AVX512F__
  VF guess = (VF)_mm512_rcp14_ps((__m512)d);
  return guess * (2 - d * guess);
#else
  return 1 / d;
#endif
}

}  // namespace
