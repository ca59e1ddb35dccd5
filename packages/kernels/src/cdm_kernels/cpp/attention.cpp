// Self-attention of one head, image by image: forward, backward, and the backward of the backward.
//
// q, k, v (N, C), s = 1 / sqrt C, P = softmax(s q k^T) by rows, y = P v. With (z)_P = P (z - rowsum(P z)), elementwise,
// which is the derivative of the softmax and its own adjoint:
//   backward         dP = dy v^T, G = (dP)_P:  dq = s G k, dk = s G^T q, dv = P^T dy
//   double backward  a, b, c: cotangents of dq, dk, dv; T = s (a k^T + q b^T), t = rowsum(P T), L = (T)_P,
//     H = (T (dP - rowsum(P dP)) - t dP + dy c^T)_P:
//     ddy = L v + P c    dq = s (H k + G b)    dk = s (H^T q + G^T a)    dv = L^T dy
// An image's matrices are small enough to stay in a cache, where all of this happens; P alone is kept in memory.
#include "product.h"
#include "rows.h"

namespace {

struct Shape {
  int64_t batch, channels, pixels;
  bool channels_last;

  // Part `part` of an image's `parts`, each (pixels, channels).
  template <class T> View<T> image(T* data, int64_t image, int64_t part, int64_t parts) const {
    data += image * parts * channels * pixels;
    if (channels_last) return {data + part * channels, parts * channels, 1};
    return {data + part * channels * pixels, 1, pixels};
  }
};

// body(image, arena) for every image; `wide` matrices over channels and `square` ones over pixels fit the arena.
template <class S, class F> void images(const Shape& s, int wide, int square, int64_t threads, F&& body) {
  const int64_t over_channels = std::max(s.pixels * Matrix<S>::padded(s.channels), s.channels * Matrix<S>::padded(s.pixels));
  const int64_t over_pixels = s.pixels * Matrix<S>::padded(s.pixels);
#pragma omp parallel num_threads(threads) if (s.batch * s.channels * s.pixels > 16384)
  {
    Arena<S> arena(wide * over_channels + square * over_pixels);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < s.batch; ++i) {
      arena.reset();
      body(i, arena);
    }
  }
}

template <class S> S scale_of(const Shape& s) { return S(1 / std::sqrt(double(s.channels))); }

// Vectors of the rows of square matrices.
template <class S, class F> CDM_INLINE void vectors(const Matrix<S>& m, F&& body) {
  for (int64_t j = 0; j < m.columns; j += LANES<S>) body(j);
}

template <class S> void softmax(const Matrix<S>& m) {
  for (int64_t i = 0; i < m.rows; ++i) {
    S *row = m[i], most = row[0];
    const int64_t padded = Matrix<S>::vectors(m.columns) * LANES<S>;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < m.columns; ++j) most = row[j] > most ? row[j] : most;
    for (int64_t j = 0; j < m.columns; ++j) row[j] -= most;
    for (int64_t j = m.columns; j < padded; ++j) row[j] = -NOTHING<S>;
    const S share = 1 / exponentials(row, padded);
    for (int64_t j = 0; j < m.columns; ++j) row[j] *= share;
    for (int64_t j = m.columns; j < padded; ++j) row[j] = 0;
  }
}

template <class T, class S = Accumulator<T>>
void forward(const Shape& s, const T* qkv, T* y, S* weights, int64_t threads) {
  images<S>(s, 4, 1, threads, [&](int64_t image, Arena<S>& arena) {
    auto q = arena.matrix(s.pixels, s.channels), v = arena.matrix(s.pixels, s.channels);
    auto out = arena.matrix(s.pixels, s.channels), k_t = arena.matrix(s.channels, s.pixels);
    auto p = arena.matrix(s.pixels, s.pixels);
    gather(s.image(qkv, image, 0, 3), q);
    gather(s.image(qkv, image, 1, 3).transposed(), k_t, scale_of<S>(s));
    gather(s.image(qkv, image, 2, 3), v);
    multiply(q.view(), k_t, p);
    softmax(p);
    multiply(p.view(), v, out);
    scatter(out, s.image(y, image, 0, 1));
    scatter(p, View<S>{weights + image * s.pixels * s.pixels, s.pixels, 1});
  });
}

template <class S> View<const S> kept(const Shape& s, const S* weights, int64_t image) {
  return {weights + image * s.pixels * s.pixels, s.pixels, 1};
}

template <class T, class S = Accumulator<T>>
void backward(const Shape& s, const T* dy, const T* qkv, const S* weights, T* dqkv, int64_t threads) {
  images<S>(s, 5, 2, threads, [&](int64_t image, Arena<S>& arena) {
    auto q = arena.matrix(s.pixels, s.channels), k = arena.matrix(s.pixels, s.channels);
    auto d = arena.matrix(s.pixels, s.channels), out = arena.matrix(s.pixels, s.channels);
    auto v_t = arena.matrix(s.channels, s.pixels);
    auto p = arena.matrix(s.pixels, s.pixels), g = arena.matrix(s.pixels, s.pixels);
    gather(s.image(qkv, image, 0, 3), q);
    gather(s.image(qkv, image, 1, 3), k);
    gather(s.image(qkv, image, 2, 3).transposed(), v_t);
    gather(s.image(dy, image, 0, 1), d);
    gather(kept(s, weights, image), p);
    multiply(d.view(), v_t, g);
    for (int64_t i = 0; i < s.pixels; ++i) {
      typename Wide<S>::V along{};
      vectors(p, [&](int64_t j) { along += load(p[i] + j) * load(g[i] + j); });
      const S mean = total(along), scale = scale_of<S>(s);
      vectors(p, [&](int64_t j) { store(g[i] + j, load(p[i] + j) * (load(g[i] + j) - mean) * scale); });
    }
    multiply(g.view(), k, out);
    scatter(out, s.image(dqkv, image, 0, 3));
    multiply(g.transposed(), q, out);
    scatter(out, s.image(dqkv, image, 1, 3));
    multiply(p.transposed(), d, out);
    scatter(out, s.image(dqkv, image, 2, 3));
  });
}

// Of dP, T and dy c^T, in place: G, L and H, the first and the last times s.
template <class S>
void differentiate_softmax(const Matrix<S>& p, const Matrix<S>& dp, const Matrix<S>& t, const Matrix<S>& h, S scale) {
  for (int64_t i = 0; i < p.rows; ++i) {
    typename Wide<S>::V dp_sum{}, t_sum{}, h_sum{};
    vectors(p, [&](int64_t j) {
      auto weight = load(p[i] + j);
      dp_sum += weight * load(dp[i] + j);
      t_sum += weight * load(t[i] + j);
    });
    const S dp_mean = total(dp_sum), t_mean = total(t_sum);
    vectors(p, [&](int64_t j) {
      auto weight = load(p[i] + j), slope = load(dp[i] + j), tangent = load(t[i] + j);
      auto bent = tangent * (slope - dp_mean) - t_mean * slope + load(h[i] + j);
      h_sum += weight * bent;
      store(h[i] + j, bent);
      store(dp[i] + j, weight * (slope - dp_mean) * scale);
      store(t[i] + j, weight * (tangent - t_mean));
    });
    const S h_mean = total(h_sum);
    vectors(p, [&](int64_t j) { store(h[i] + j, load(p[i] + j) * (load(h[i] + j) - h_mean) * scale); });
  }
}

template <class T, class S = Accumulator<T>>
void double_backward(const Shape& s, const T* cotangent, const T* dy, const T* qkv, const S* weights, T* ddy, T* dqkv,
                     int64_t threads) {
  images<S>(s, 12, 4, threads, [&](int64_t image, Arena<S>& arena) {
    Matrix<S> q, k, v, a, b, c, d, out, k_t, v_t, b_t, c_t, p, dp, t, h;
    for (auto each : {&q, &k, &v, &a, &b, &c, &d, &out}) *each = arena.matrix(s.pixels, s.channels);
    for (auto each : {&k_t, &v_t, &b_t, &c_t}) *each = arena.matrix(s.channels, s.pixels);
    for (auto each : {&p, &dp, &t, &h}) *each = arena.matrix(s.pixels, s.pixels);
    const S scale = scale_of<S>(s);
    gather(kept(s, weights, image), p);
    gather(s.image(dy, image, 0, 1), d);
    gather(s.image(qkv, image, 0, 3), q);
    gather(s.image(qkv, image, 1, 3), k);
    gather(s.image(qkv, image, 2, 3), v);
    gather(s.image(cotangent, image, 0, 3), a);
    gather(s.image(cotangent, image, 1, 3), b);
    gather(s.image(cotangent, image, 2, 3), c);
    gather(k.transposed(), k_t, scale);
    gather(v.transposed(), v_t);
    gather(b.transposed(), b_t, scale);
    gather(c.transposed(), c_t);
    multiply(d.view(), v_t, dp);
    multiply(a.view(), k_t, t);
    multiply(q.view(), b_t, t, true);
    multiply(d.view(), c_t, h);
    differentiate_softmax(p, dp, t, h, scale);
    multiply(t.view(), v, out);
    multiply(p.view(), c, out, true);
    scatter(out, s.image(ddy, image, 0, 1));
    multiply(h.view(), k, out);
    multiply(dp.view(), b, out, true);
    scatter(out, s.image(dqkv, image, 0, 3));
    multiply(h.transposed(), q, out);
    multiply(dp.transposed(), a, out, true);
    scatter(out, s.image(dqkv, image, 1, 3));
    multiply(t.transposed(), d, out);
    scatter(out, s.image(dqkv, image, 2, 3));
  });
}

}  // namespace

#define SHAPE_ARGUMENTS \
  int64_t batch, int64_t channels, int64_t pixels, int64_t channels_last, int64_t dtype, int64_t threads
#define SHAPE Shape{batch, channels, pixels, bool(channels_last)}

CDM_EXPORT void CDM_NAME(cdm_attention)(SHAPE_ARGUMENTS, const void* qkv, void* y, void* weights) {
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    forward<T>(SHAPE, as<T>(qkv), as<T>(y), as<Accumulator<T>>(weights), threads);
  });
}

CDM_EXPORT void CDM_NAME(cdm_attention_backward)(SHAPE_ARGUMENTS, const void* dy, const void* qkv, const void* weights,
                                                 void* dqkv) {
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    backward<T>(SHAPE, as<T>(dy), as<T>(qkv), as<Accumulator<T>>(weights), as<T>(dqkv), threads);
  });
}

CDM_EXPORT void CDM_NAME(cdm_attention_double_backward)(SHAPE_ARGUMENTS, const void* cotangent, const void* dy,
                                                        const void* qkv, const void* weights, void* ddy, void* dqkv) {
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    double_backward<T>(SHAPE, as<T>(cotangent), as<T>(dy), as<T>(qkv), as<Accumulator<T>>(weights), as<T>(ddy), as<T>(dqkv),
                       threads);
  });
}
