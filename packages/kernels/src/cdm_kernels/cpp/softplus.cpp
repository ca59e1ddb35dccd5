// Softplus of sharpness beta, y = log(1 + e^(beta z)) / beta, and its gradient.
//   forward   y = max(z, 0) + log(1 + e) / beta with e = e^(-beta |z|) <= 1
//   backward  dz = dy / (1 + e^(-beta z))
// log(1 + e) = 2 artanh r with r = e / (2 + e) <= 1/3: a series of positive terms, so right to the last bits however
// small e is.
#include <algorithm>

#include "common.h"

namespace {

CDM_INLINE VF log_of_one_and(VF e) {
  const VF r = e / (2 + e), s = r * r;
  VF p = splat(1 / 15.0f);
  for (float coefficient : {1 / 13.0f, 1 / 11.0f, 1 / 9.0f, 1 / 7.0f, 1 / 5.0f, 1 / 3.0f}) p = p * s + coefficient;
  return 2 * r + 2 * r * s * p;
}
CDM_INLINE VD log_of_one_and(VD e) {
  for (int i = 0; i < LANES<double>; ++i) e[i] = std::log1p(e[i]);
  return e;
}

CDM_INLINE VF positive(VF z) { return (VF)((IF)z & ~((IF)z >> 31)); }
CDM_INLINE VD positive(VD z) { return (VD)((ID)z & ~((ID)z >> 63)); }
CDM_INLINE VF size(VF z) { return (VF)((IF)z & 0x7fffffff); }
CDM_INLINE VD size(VD z) { return (VD)((ID)z & 0x7fffffffffffffff); }

template <class S> struct Value {
  S beta, inverse;
  template <class V> V operator()(V z) const {
    return positive(z) + inverse * log_of_one_and(exponential(-beta * size(z)));
  }
};

template <class S> struct Slope {
  S beta;
  template <class V> V operator()(V dy, V z) const { return dy * sigmoid(beta * z); }
};

// out = body(of each part), a thread a stretch of whole vectors.
template <class T, class F, class... P>
void elementwise(int64_t n, int64_t threads, F body, T* out, const P*... parts) {
  constexpr int64_t lanes = LANES<Accumulator<T>>, stretch = 256 * lanes;
#pragma omp parallel for num_threads(threads) schedule(static) if (n > 16384)
  for (int64_t first = 0; first < n; first += stretch) {
    const int64_t end = std::min(first + stretch, n);
    int64_t i = first;
    for (; i + lanes <= end; i += lanes) store(out + i, body(load(parts + i)...));
    if (i < end) store(out + i, body(load(parts + i, int(end - i))...), int(end - i));
  }
}

template <class F> void with_dtype(int64_t dtype, F&& body) {
  if (dtype == FLOAT32) body(float());
  else if (dtype == BFLOAT16) body(bfloat16());
  else body(double());
}

}  // namespace

CDM_EXPORT void CDM_NAME(cdm_softplus)(int64_t n, int64_t dtype, int64_t threads, double beta, const void* z, void* y) {
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    using S = Accumulator<T>;
    elementwise(n, threads, Value<S>{S(beta), S(1 / beta)}, static_cast<T*>(y), static_cast<const T*>(z));
  });
}

CDM_EXPORT void CDM_NAME(cdm_softplus_backward)(int64_t n, int64_t dtype, int64_t threads, double beta, const void* dy,
                                                const void* z, void* dz) {
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    elementwise(n, threads, Slope<Accumulator<T>>{Accumulator<T>(beta)}, static_cast<T*>(dz),
                static_cast<const T*>(dy), static_cast<const T*>(z));
  });
}
