// Tempered log-likelihood of a class and its gradient in the logits: forward, backward, and the backward of the backward.
//
// p = softmax(tau2 f), q the labels, f* the logit of the largest p; <x> = sum p x, and x' = x - <x>:
//   forward          spread = log sum exp(tau2 (f - f*)):  value = tau1 <q, f> - tau2 f* - spread
//                    cotangent = tau1 q - tau2 p
//   backward         a, b: cotangents of those;  df = a (tau1 q - tau2 p) - tau2^2 p b'
//   double backward  u: cotangent of df
//     da = tau1 <q, u> - tau2 <u>    db = -tau2^2 p u'    df = -tau2^2 p (a u' + tau2 (b' u' - <b' u'>))
// Differences to f* are taken before they are scaled: of logits of 1e4 products would lose what matters. And x' is
// taken of x less its entry there: where p is almost one there, nothing cancels.
#include "rows.h"

namespace {

// The labels of one row: a class, or soft labels.
template <class S> struct Labels {
  int64_t hard;
  const S* soft;
};

template <class S> struct Statistics {
  S top, spread;  // f* and log sum exp(tau2 (f - f*))
};

struct Temperatures {
  double tau1, tau2;
};

// A row of T to whole vectors of S, and back.
template <class S, class T> CDM_INLINE void widen_row(const Row<S>& row, const T* from, S* to) {
  for (int64_t i = 0; i < row.blocks; ++i) store(to + i * LANES<S>, row.get(from, i));
}
template <class S, class T> CDM_INLINE void narrow_row(const Row<S>& row, const S* from, T* to) {
  for (int64_t i = 0; i < row.blocks; ++i) row.put(to, i, load(from + i * LANES<S>));
}

// p of a row in place of its f.
template <class S> CDM_INLINE void probabilities(const Row<S>& row, S tau2, const Statistics<S>& statistics, S* x) {
  for (int64_t k = 0; k < row.n; ++k) x[k] = tau2 * (x[k] - statistics.top) - statistics.spread;
  for (int64_t k = row.n; k < row.padded(); ++k) x[k] = -NOTHING<S>;
  exponentials(x, row.padded());
}

// The first entry of x that is `value`, or the last entry.
template <class S> CDM_INLINE int64_t find(int64_t n, const S* x, S value) {
  const int last = int(n) - 1;
  int found = last;
#pragma omp simd reduction(min : found)
  for (int k = 0; k < last; ++k) {
    const int here = x[k] == value ? k : last;
    found = here < found ? here : found;
  }
  return found;
}

// <x - centre>.
template <class S> CDM_INLINE S mean(int64_t n, const S* p, const S* x, S centre) {
  S sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < n; ++k) sum += p[k] * (x[k] - centre);
  return sum;
}

template <class S> Labels<S> labels_of(const int64_t* hard, const S* soft, int64_t b, int64_t n) {
  return hard ? Labels<S>{hard[b], nullptr} : Labels<S>{0, soft + b * n};
}
// <q, x> in R, and x + scale q.
template <class R, class S> CDM_INLINE R aligned(const Labels<S>& q, int64_t n, const S* x) {
  if (!q.soft) return x[q.hard];
  R sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < n; ++k) sum += R(q.soft[k]) * R(x[k]);
  return sum;
}
template <class S> CDM_INLINE void add(const Labels<S>& q, int64_t n, S scale, S* x) {
  if (!q.soft) x[q.hard] += scale;
  else
    for (int64_t k = 0; k < n; ++k) x[k] += scale * q.soft[k];
}

template <class T, class S = Accumulator<T>>
void forward(int64_t batch, int64_t n, Temperatures tau, const T* f, const int64_t* hard, const S* soft, S* value,
             S* cotangent, Statistics<S>* statistics, int64_t* outside, int64_t threads) {
  const Row<S> row(n);
  const S tau2 = S(tau.tau2);
  each_row(batch, n, row.padded() * sizeof(S), threads, [&](int64_t b, char* scratch) {
    const Labels<S> q = labels_of(hard, soft, b, n);
    if (q.hard < 0 || q.hard >= n) {
#pragma omp atomic write
      *outside = 1;
      return;
    }
    S *x = as<S>(scratch), *out = cotangent + b * n;
    widen_row(row, f + b * n, x);
    const double energy = aligned<double>(q, n, x);  // it may cancel with tau2 f*
    S top = x[0];
    if (tau2 >= 0) {
#pragma omp simd reduction(max : top)
      for (int64_t k = 0; k < n; ++k) top = x[k] > top ? x[k] : top;
    } else {
#pragma omp simd reduction(min : top)
      for (int64_t k = 0; k < n; ++k) top = x[k] < top ? x[k] : top;
    }
    for (int64_t k = 0; k < n; ++k) x[k] = tau2 * (x[k] - top);
    for (int64_t k = n; k < row.padded(); ++k) x[k] = -NOTHING<S>;
    const S sum = exponentials(x, row.padded()), scale = -tau2 / sum;
    for (int64_t k = 0; k < n; ++k) out[k] = scale * x[k];
    add(q, n, S(tau.tau1), out);
    statistics[b] = {top, std::log(sum)};
    value[b] = S(tau.tau1 * energy - tau.tau2 * double(top)) - statistics[b].spread;
  });
}

template <class T, class S = Accumulator<T>>
void backward(int64_t batch, int64_t n, Temperatures tau, const S* a, const S* b, const T* f, const int64_t* hard,
              const S* soft, const Statistics<S>* statistics, T* out, int64_t threads) {
  const Row<S> row(n);
  const S tau1 = S(tau.tau1), tau2 = S(tau.tau2);
  each_row(batch, n, row.padded() * sizeof(S), threads, [&](int64_t r, char* scratch) {
    S* p = as<S>(scratch);
    widen_row(row, f + r * n, p);
    const int64_t top = b ? find(n, p, statistics[r].top) : 0;
    probabilities(row, tau2, statistics[r], p);
    const S first = a ? tau2 * a[r] : S(0);
    if (b) {
      const S *x = b + r * n, centre = x[top], b_mean = mean(n, p, x, centre);
      for (int64_t k = 0; k < n; ++k) p[k] *= -first - tau2 * tau2 * (x[k] - centre - b_mean);
    } else {
      for (int64_t k = 0; k < n; ++k) p[k] *= -first;
    }
    if (a) add(labels_of(hard, soft, r, n), n, tau1 * a[r], p);
    narrow_row(row, p, out + r * n);
  });
}

template <class T, class S = Accumulator<T>>
void double_backward(int64_t batch, int64_t n, Temperatures tau, const T* u, const S* a, const S* b, const T* f,
                     const int64_t* hard, const S* soft, const Statistics<S>* statistics, S* da, S* db, T* df,
                     int64_t threads) {
  const Row<S> row(n);
  const S tau1 = S(tau.tau1), tau2 = S(tau.tau2), square = tau2 * tau2;
  each_row(batch, n, 2 * row.padded() * sizeof(S), threads, [&](int64_t r, char* scratch) {
    S *p = as<S>(scratch), *x = p + row.padded(), *second = db + r * n;
    widen_row(row, f + r * n, p);
    const int64_t top = find(n, p, statistics[r].top);
    probabilities(row, tau2, statistics[r], p);
    widen_row(row, u + r * n, x);
    const S x_top = x[top], x_mean = mean(n, p, x, x_top), first = a ? a[r] : S(0);
    da[r] = tau1 * aligned<S>(labels_of(hard, soft, r, n), n, x) - tau2 * (x_top + x_mean);
    for (int64_t k = 0; k < n; ++k) {
      x[k] = x[k] - x_top - x_mean;  // u'
      second[k] = -square * p[k] * x[k];
    }
    if (b) {
      const S *y = b + r * n, y_top = y[top], y_mean = mean(n, p, y, y_top);
      S covariance = 0;
#pragma omp simd reduction(+ : covariance)
      for (int64_t k = 0; k < n; ++k) covariance += p[k] * (y[k] - y_top - y_mean) * x[k];
      for (int64_t k = 0; k < n; ++k)
        p[k] *= -square * (first * x[k] + tau2 * ((y[k] - y_top - y_mean) * x[k] - covariance));
    } else {
      for (int64_t k = 0; k < n; ++k) p[k] = first * second[k];
    }
    narrow_row(row, p, df + r * n);
  });
}

}  // namespace

#define ROWS int64_t batch, int64_t classes, int64_t dtype, int64_t threads, double tau1, double tau2

CDM_EXPORT void CDM_NAME(cdm_softmax_gradient)(ROWS, const void* f, const void* hard, const void* soft, void* value,
                                               void* cotangent, void* statistics, void* outside) {
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    using S = Accumulator<T>;
    forward<T>(batch, classes, {tau1, tau2}, as<T>(f), as<int64_t>(hard), as<S>(soft), as<S>(value),
               as<S>(cotangent), as<Statistics<S>>(statistics), as<int64_t>(outside), threads);
  });
}

CDM_EXPORT void CDM_NAME(cdm_softmax_gradient_backward)(ROWS, const void* a, const void* b, const void* f,
                                                        const void* hard, const void* soft, const void* statistics,
                                                        void* out) {
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    using S = Accumulator<T>;
    backward<T>(batch, classes, {tau1, tau2}, as<S>(a), as<S>(b), as<T>(f), as<int64_t>(hard), as<S>(soft),
                as<Statistics<S>>(statistics), as<T>(out), threads);
  });
}

CDM_EXPORT void CDM_NAME(cdm_softmax_gradient_double_backward)(ROWS, const void* u, const void* a, const void* b,
                                                               const void* f, const void* hard, const void* soft,
                                                               const void* statistics, void* da, void* db,
                                                               void* df) {
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    using S = Accumulator<T>;
    double_backward<T>(batch, classes, {tau1, tau2}, as<T>(u), as<S>(a), as<S>(b), as<T>(f), as<int64_t>(hard),
                       as<S>(soft), as<Statistics<S>>(statistics), as<S>(da), as<S>(db), as<T>(df), threads);
  });
}
