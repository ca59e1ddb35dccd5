// Group normalisation, scale, shift and SiLU: forward, backward, and the backward of the backward.
//
// With x^ = (x - mu) r over a group of n elements, h = w x^ + b, y = silu(h) (or h), and the projection
// P(z) = r (z - mean z - x^ mean(z x^)), which is its own adjoint:
//   backward         q = dy silu'(h), a = w q:  dx = P(a), dw = sum q x^, db = sum q
//   double backward  v, alpha, beta: cotangents of dx, dw, db; u = P(v), m = w u + alpha x^ + beta, e = dy m silu''(h)
//     ddy = m silu'(h)    dw = sum (q u + e x^)    db = sum e    with A = mean(a x^), V = mean(v x^), C = cov(v, a):
//     dx = P(w e + alpha q) - r^2 (A (v - mean v) + V (a - mean a) + x^ (C - 3 V A))
// All sums over a group are sums over the pixels of a channel, weighted: so one code serves both layouts, vectors
// lying along pixels (contiguous) or along channels (channels last). Where an image has fewer pixels than a vector
// has lanes, each of its C P elements counts as a channel of one pixel. A unit of work is the groups of one image
// that fill whole vectors; what a pass needs of the one before it waits in a scratch of float32 vectors.
#include <cstdlib>
#include <new>
#include <vector>

#include "common.h"

namespace {

struct Shape {
  int64_t batch, channels, pixels, groups;
  bool channels_last, per_image;  // per_image: weight and bias are (B, C), not (C,)
  int64_t repeat = 1;                   // elements that share one entry of weight and bias

  // Small images: every element a channel of its own, in rows that fill vectors.
  void flatten(int64_t lanes) {
    if (channels_last || pixels >= lanes) return;
    repeat = pixels;
    channels *= pixels;
    pixels = 1;
    channels_last = true;
  }
};

// Groups of one image whose channels are worked on together: first channel and how many.
struct Unit {
  int64_t image, channel, width;
  int64_t next;  // elements from here to where the thread's next unit begins; 0 on the last one
};

// One run of positions in memory that shares per-channel coefficients.
struct Strip {
  int64_t channel;        // from the unit's first
  int64_t offset, step;   // of the first position and between positions, in elements
  int64_t count, slot;    // positions; the first one's vector in the scratch
  int lanes, last;        // lanes of every position, and of the last one
};

// Whole groups: as many as fill vectors, where these lie along channels, and as make the work worth its bookkeeping.
int64_t unit_width(const Shape& s, int lanes) {
  int64_t group = s.channels / s.groups, width = group;
  auto wider = [&] { return (s.channels_last && width % lanes) || width * s.pixels < 2048; };
  while (wider() && width + group <= s.channels) width += group;
  return width;
}

template <class S, class F> CDM_INLINE void strips(const Shape& s, const Unit& unit, F&& body) {
  constexpr int lanes = LANES<S>;
  if (s.channels_last) {
    for (int64_t c = 0; c < unit.width; c += lanes) {
      int n = unit.width - c < lanes ? int(unit.width - c) : lanes;
      body(Strip{c, unit.image * s.pixels * s.channels + unit.channel + c, s.channels, s.pixels,
                 c / lanes * s.pixels, n, n});
    }
  } else {
    int64_t count = (s.pixels + lanes - 1) / lanes;
    for (int64_t c = 0; c < unit.width; ++c)
      body(Strip{c, (unit.image * s.channels + unit.channel + c) * s.pixels, lanes, count, c * count, lanes,
                 int(s.pixels - (count - 1) * lanes)});
  }
}

// body(i, full) for every position of a strip; full: a constant, whether all lanes are there.
#define CDM_BODY __attribute__((always_inline))
template <class S, class F> CDM_INLINE void sweep(const Strip& strip, F&& body) {
  int64_t i = 0;
  if (strip.lanes == LANES<S>)
    for (const int64_t full = strip.count - (strip.last < LANES<S>); i < full; ++i) body(i, std::true_type{});
  for (; i < strip.count; ++i) body(i, std::false_type{});
}

template <class T, class Full> CDM_INLINE auto at(const T* data, const Strip& strip, int64_t i, Full full) {
  const T* p = data + strip.offset + i * strip.step;
  if constexpr (full()) return load(p);
  else return load(p, i + 1 < strip.count ? strip.lanes : strip.last);
}
template <class T, class V, class Full>
CDM_INLINE void put(T* data, const Strip& strip, int64_t i, Full full, V value) {
  T* p = data + strip.offset + i * strip.step;
  if constexpr (full()) store(p, value);
  else store(p, value, i + 1 < strip.count ? strip.lanes : strip.last);
}
// What will be read in the next unit, and what will be written in this one, on its way to the L2 cache: without, a
// pass waits for memory while the sums of the other passes leave it idle.
template <class T> CDM_INLINE void fetch_ahead(const T* data, const Strip& strip, int64_t i, int64_t ahead) {
  __builtin_prefetch(data + strip.offset + i * strip.step + ahead, 0, 2);
}
template <class T> CDM_INLINE void claim(T* data, const Strip& strip, int64_t i) {
  __builtin_prefetch(data + strip.offset + i * strip.step, 1, 2);
}
// A per-channel coefficient of a strip, and a per-channel sum back from one.
template <class S> CDM_INLINE auto coefficient(const Shape& s, const S* values, const Strip& strip) {
  return s.channels_last ? load(values + strip.channel, strip.lanes) : splat(values[strip.channel]);
}
template <class S, class V> CDM_INLINE void collect(const Shape& s, S* sums, const Strip& strip, V sum) {
  if (s.channels_last) store(sums + strip.channel, sum, strip.lanes); else sums[strip.channel] = total(sum);
}

// Arrays of one value a channel, and the scratch, of one thread.
template <class S> struct Workspace {
  std::vector<S> arrays;
  S* scratch = nullptr;
  int64_t width;
  Workspace(const Shape& s, int64_t width, int rows, int buffers) : width(width + LANES<S>) {
    arrays.resize(rows * this->width);
    int64_t strips = s.channels_last ? (width + LANES<S> - 1) / LANES<S> * s.pixels
                                     : width * ((s.pixels + LANES<S> - 1) / LANES<S>);
    if (buffers) {
      scratch = static_cast<S*>(std::aligned_alloc(64, strips * 64 * buffers));
      if (!scratch) throw std::bad_alloc();
    }
    half = strips * LANES<S>;
  }
  ~Workspace() { std::free(scratch); }
  S* row(int i) { return arrays.data() + i * width; }
  int64_t half;  // elements of one buffer
};

// Where the unit of an image that begins at a channel begins in memory.
CDM_INLINE int64_t start(const Shape& s, int64_t image, int64_t channel) {
  return image * s.channels * s.pixels + channel * (s.channels_last ? 1 : s.pixels);
}

// Every unit of the batch over the threads; body(unit, workspace).
template <class S, class F>
void units(const Shape& s, int rows, int buffers, int64_t threads, F&& body) {
  const int64_t width = unit_width(s, LANES<S>), per_image = (s.channels + width - 1) / width;
  const int64_t all = s.batch * per_image, work = s.batch * s.channels * s.pixels;
#pragma omp parallel num_threads(threads) if (work > 16384)
  {
    Workspace<S> workspace(s, width, rows, buffers);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < all; ++i) {
      int64_t first = i % per_image * width, last = first + width >= s.channels;
      int64_t here = start(s, i / per_image, first), next = start(s, i / per_image + last, last ? 0 : first + width);
      body(Unit{i / per_image, first, last ? s.channels - first : width, i + 1 < all ? next - here : 0}, workspace);
    }
  }
}

// mean over each group of the unit of weight * sum (weight null: 1), put to every channel of the group.
template <class S>
CDM_INLINE void group_means(const Shape& s, const Unit& unit, const S* weight, const S* sums, S* means) {
  const int64_t group = s.channels / s.groups;
  const S share = S(1) / S(group * s.pixels);
  if (group <= LANES<S> && !(group & (group - 1))) {
    for (int64_t c = 0; c < unit.width; c += LANES<S>) {
      auto v = load(sums + c);
      if (weight) v *= load(weight + c);
      store(means + c, block_sums(v, int(group)) * share);
    }
    return;
  }
  for (int64_t g = 0; g < unit.width; g += group) {
    S sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = g; c < g + group; ++c) sum += weight ? weight[c] * sums[c] : sums[c];
    for (int64_t c = g; c < g + group; ++c) means[c] = sum * share;
  }
}

// The unit's part of a weight (null: zeros), and back: sums into the image's row of (B, C).
template <class S> void fetch(const Shape& s, const Unit& unit, const S* values, S* out) {
  if (values) values += ((s.per_image ? unit.image * s.channels : 0) + unit.channel) / s.repeat;
  if (!values)
    std::memset(out, 0, unit.width * sizeof(S));
  else if (s.repeat == 1)
    std::memcpy(out, values, unit.width * sizeof(S));
  else
    for (int64_t c = 0; c < unit.width; c += s.repeat)
      for (int64_t i = 0; i < s.repeat; ++i) out[c + i] = values[c / s.repeat];
}
template <class S> void deposit(const Shape& s, const Unit& unit, const S* sums, S* parts) {
  parts += (unit.image * s.channels + unit.channel) / s.repeat;
  for (int64_t c = 0; c < unit.width; c += s.repeat) {
    S sum = 0;
    for (int64_t i = 0; i < s.repeat; ++i) sum += sums[c + i];
    parts[c / s.repeat] = sum;
  }
}

// body(g, c): group g of all (image by image), whose channels start at the unit's c.
template <class F> CDM_INLINE void groups_of(const Shape& s, const Unit& unit, F&& body) {
  const int64_t group = s.channels / s.groups;
  int64_t g = unit.image * s.groups + unit.channel / group;
  for (int64_t c = 0; c < unit.width; c += group) body(g++, c);
}

template <class S>
void spread_statistics(const Shape& s, const Unit& unit, const S* mean, const S* rstd, S* mu, S* r) {
  const int64_t group = s.channels / s.groups;
  groups_of(s, unit, [&](int64_t g, int64_t first) {
    for (int64_t c = first; c < first + group; ++c) mu[c] = mean[g], r[c] = rstd[g];
  });
}

// The sum over images of (B, C) into (C,).
template <class S> void sum_images(const Shape& s, const S* parts, S* sums) {
  const int64_t channels = s.channels / s.repeat;
  std::memset(sums, 0, channels * sizeof(S));
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t c = 0; c < channels; ++c) sums[c] += parts[b * channels + c];
}

template <class T, bool SILU, class S = Accumulator<T>>
void forward(const Shape& s, const T* x, const S* weight, const S* bias, double eps, T* y, S* mean, S* rstd,
             int64_t threads) {
  using V = typename Wide<S>::V;
  units<S>(s, 4, 0, threads, [&](const Unit& unit, Workspace<S>& work) {
    S *sums = work.row(0), *squares = work.row(1), *mu = work.row(2), *r = work.row(3);
    strips<S>(s, unit, [&](const Strip& strip) {
      V sum{};
      sweep<S>(strip, [&](int64_t i, auto full) CDM_BODY { sum += at(x, strip, i, full); });
      collect(s, sums, strip, sum);
    });
    group_means<S>(s, unit, nullptr, sums, mu);
    // The second pass corrects the first mean's rounding; lanes past the end must not count.
    strips<S>(s, unit, [&](const Strip& strip) {
      V m = coefficient(s, mu, strip), sum{}, square{};
      sweep<S>(strip, [&](int64_t i, auto full) CDM_BODY {
        V d = at(x, strip, i, full) - m;
        if constexpr (!full())
          for (int lane = i + 1 < strip.count ? strip.lanes : strip.last; lane < LANES<S>; ++lane) d[lane] = 0;
        claim(y, strip, i);
        sum += d;
        square += d * d;
      });
      collect(s, sums, strip, sum);
      collect(s, squares, strip, square);
    });
    group_means<S>(s, unit, nullptr, sums, sums);
    group_means<S>(s, unit, nullptr, squares, squares);
    for (int64_t c = 0; c < unit.width; c += LANES<S>) {
      V shift = load(sums + c), variance = load(squares + c) - shift * shift;
      for (int lane = 0; lane < LANES<S>; ++lane)  // of equal numbers, rounding could make it less than 0
        variance[lane] = variance[lane] < 0 ? 0 : variance[lane];
      store(mu + c, load(mu + c) + shift);
      store(r + c, reciprocal_root(variance + S(eps)));
    }
    groups_of(s, unit, [&](int64_t g, int64_t first) { mean[g] = mu[first], rstd[g] = r[first]; });
    fetch(s, unit, weight, sums);
    fetch(s, unit, bias, squares);
    strips<S>(s, unit, [&](const Strip& strip) {
      V m = coefficient(s, mu, strip), scale = coefficient(s, r, strip) * coefficient(s, sums, strip),
        shift = coefficient(s, squares, strip);
      sweep<S>(strip, [&](int64_t i, auto full) CDM_BODY {
        fetch_ahead(x, strip, i, unit.next);
        V h = (at(x, strip, i, full) - m) * scale + shift;
        put(y, strip, i, full, SILU ? h * sigmoid(h) : h);
      });
    });
  });
}

template <class T, bool SILU, class S = Accumulator<T>>
void backward(const Shape& s, const T* dy, const T* x, const S* mean, const S* rstd, const S* weight, const S* bias,
              T* dx, S* dweight, S* dbias, int64_t threads) {
  using V = typename Wide<S>::V;
  const int64_t rows = s.batch * s.channels / s.repeat;
  std::vector<S> parts(s.per_image ? 0 : 2 * rows);
  S* part_w = s.per_image ? dweight : parts.data();
  S* part_b = s.per_image ? dbias : parts.data() + rows;
  units<S>(s, 8, 1, threads, [&](const Unit& unit, Workspace<S>& work) {
    S *mu = work.row(0), *r = work.row(1), *w = work.row(2), *b = work.row(3), *q_sum = work.row(4),
      *qx_sum = work.row(5), *a_mean = work.row(6), *ax_mean = work.row(7), *scratch = work.scratch;
    spread_statistics(s, unit, mean, rstd, mu, r);
    fetch(s, unit, weight, w);
    fetch(s, unit, bias, b);
    strips<S>(s, unit, [&](const Strip& strip) {
      V m = coefficient(s, mu, strip), scale = coefficient(s, r, strip), gain = coefficient(s, w, strip),
        shift = coefficient(s, b, strip), q_acc{}, qx_acc{};
      sweep<S>(strip, [&](int64_t i, auto full) CDM_BODY {
        fetch_ahead(x, strip, i, unit.next), fetch_ahead(dy, strip, i, unit.next), claim(dx, strip, i);
        V normal = (at(x, strip, i, full) - m) * scale, q = at(dy, strip, i, full);
        if (SILU) {
          V h = normal * gain + shift, sig = sigmoid(h);
          q *= sig * (1 + h * (1 - sig));
          store(scratch + (strip.slot + i) * LANES<S>, q);
        }
        q_acc += q;
        qx_acc += q * normal;
      });
      collect(s, q_sum, strip, q_acc);
      collect(s, qx_sum, strip, qx_acc);
    });
    deposit(s, unit, q_sum, part_b);
    deposit(s, unit, qx_sum, part_w);
    group_means(s, unit, w, q_sum, a_mean);
    group_means(s, unit, w, qx_sum, ax_mean);
    strips<S>(s, unit, [&](const Strip& strip) {
      V m = coefficient(s, mu, strip), scale = coefficient(s, r, strip), gain = scale * coefficient(s, w, strip),
        on_x = -scale * scale * coefficient(s, ax_mean, strip), constant = -scale * coefficient(s, a_mean, strip);
      sweep<S>(strip, [&](int64_t i, auto full) CDM_BODY {
        V q = SILU ? load(scratch + (strip.slot + i) * LANES<S>) : at(dy, strip, i, full);
        put(dx, strip, i, full, gain * q + (on_x * (at(x, strip, i, full) - m) + constant));
      });
    });
  });
  if (!s.per_image) sum_images(s, part_w, dweight), sum_images(s, part_b, dbias);
}

template <class T, bool SILU, class S = Accumulator<T>>
void double_backward(const Shape& s, const T* v, const S* alpha, const S* beta, const T* dy, const T* x,
                     const S* mean, const S* rstd, const S* weight, const S* bias, T* ddy, T* dx, S* dweight,
                     S* dbias, int64_t threads) {
  using V = typename Wide<S>::V;
  const int64_t rows = s.batch * s.channels / s.repeat;
  std::vector<S> parts(s.per_image ? 0 : 2 * rows);
  S* part_w = s.per_image ? dweight : parts.data();
  S* part_b = s.per_image ? dbias : parts.data() + rows;
  units<S>(s, 18, 2, threads, [&](const Unit& unit, Workspace<S>& work) {
    S *mu = work.row(0), *r = work.row(1), *w = work.row(2), *b = work.row(3), *al = work.row(4), *be = work.row(5),
      *v_mean = work.row(6), *vx_mean = work.row(7), *q_sum = work.row(8), *qx_sum = work.row(9),
      *qu_sum = work.row(10), *e_sum = work.row(11), *ex_sum = work.row(12), *t0 = work.row(13), *t1 = work.row(14),
      *t2 = work.row(15), *t3 = work.row(16), *t4 = work.row(17);
    S *kept_q = work.scratch, *kept_e = work.scratch + work.half;
    spread_statistics(s, unit, mean, rstd, mu, r);
    fetch(s, unit, weight, w);
    fetch(s, unit, bias, b);
    fetch(s, unit, alpha, al);
    fetch(s, unit, beta, be);
    // mean v and V = mean(v x^): u = P(v) then needs no other sum.
    strips<S>(s, unit, [&](const Strip& strip) {
      V m = coefficient(s, mu, strip), scale = coefficient(s, r, strip), sum{}, along{};
      sweep<S>(strip, [&](int64_t i, auto full) CDM_BODY {
        claim(ddy, strip, i);
        V value = at(v, strip, i, full);
        sum += value;
        along += value * ((at(x, strip, i, full) - m) * scale);
      });
      collect(s, t0, strip, sum);
      collect(s, t1, strip, along);
    });
    group_means<S>(s, unit, nullptr, t0, v_mean);
    group_means<S>(s, unit, nullptr, t1, vx_mean);
    strips<S>(s, unit, [&](const Strip& strip) {
      V m = coefficient(s, mu, strip), scale = coefficient(s, r, strip), gain = coefficient(s, w, strip),
        shift = coefficient(s, b, strip), on_x = coefficient(s, al, strip), constant = coefficient(s, be, strip),
        centre = coefficient(s, v_mean, strip), along = coefficient(s, vx_mean, strip);
      V q_acc{}, qx_acc{}, qu_acc{}, e_acc{}, ex_acc{};
      sweep<S>(strip, [&](int64_t i, auto full) CDM_BODY {
        fetch_ahead(x, strip, i, unit.next), fetch_ahead(v, strip, i, unit.next);
        fetch_ahead(dy, strip, i, unit.next), claim(dx, strip, i);
        V normal = (at(x, strip, i, full) - m) * scale, cotangent = at(dy, strip, i, full);
        V u = scale * (at(v, strip, i, full) - centre - normal * along);
        V inner = gain * u + on_x * normal + constant, q = cotangent, e{};
        if (SILU) {
          V h = normal * gain + shift, sig = sigmoid(h), rest = 1 - sig;
          V first = sig * (1 + h * rest);
          q = cotangent * first;
          e = cotangent * inner * (sig * rest * (2 + h * (1 - 2 * sig)));
          store(kept_q + (strip.slot + i) * LANES<S>, q);
          store(kept_e + (strip.slot + i) * LANES<S>, e);
          put(ddy, strip, i, full, inner * first);
        } else {
          put(ddy, strip, i, full, inner);
        }
        q_acc += q;
        qx_acc += q * normal;
        qu_acc += q * u;
        e_acc += e;
        ex_acc += e * normal;
      });
      collect(s, q_sum, strip, q_acc);
      collect(s, qx_sum, strip, qx_acc);
      collect(s, qu_sum, strip, qu_acc);
      collect(s, e_sum, strip, e_acc);
      collect(s, ex_sum, strip, ex_acc);
    });
    for (int64_t c = 0; c < unit.width; ++c) t2[c] = qu_sum[c] + ex_sum[c];
    deposit(s, unit, t2, part_w);
    deposit(s, unit, e_sum, part_b);
    for (int64_t c = 0; c < unit.width; ++c) {
      t0[c] = w[c] * e_sum[c] + al[c] * q_sum[c];    // z = w e + alpha q
      t1[c] = w[c] * ex_sum[c] + al[c] * qx_sum[c];  // z x^
    }
    group_means<S>(s, unit, nullptr, t0, t0);   // mean z
    group_means<S>(s, unit, nullptr, t1, t1);   // mean(z x^)
    group_means<S>(s, unit, w, q_sum, t2);      // mean a
    group_means<S>(s, unit, w, qx_sum, t3);     // A = mean(a x^)
    group_means<S>(s, unit, w, qu_sum, t4);     // mean(a u) = r (C - V A)
    // dx = r w e + (r alpha - r^2 V w) q - r^2 A v + (...) (x - mu) + constant
    for (int64_t c = 0; c < unit.width; ++c) {
      S r2 = r[c] * r[c], covariance = t4[c] / r[c] + vx_mean[c] * t3[c];
      S constant = -r[c] * t0[c] + r2 * (t3[c] * v_mean[c] + vx_mean[c] * t2[c]);
      S on_x = r[c] * (-r[c] * t1[c] - r2 * (covariance - 3 * vx_mean[c] * t3[c]));
      t0[c] = r[c] * w[c];
      t1[c] = r[c] * al[c] - r2 * vx_mean[c] * w[c];
      t2[c] = -r2 * t3[c];
      t3[c] = on_x;
      t4[c] = constant;
    }
    strips<S>(s, unit, [&](const Strip& strip) {
      V m = coefficient(s, mu, strip), on_e = coefficient(s, t0, strip), on_q = coefficient(s, t1, strip),
        on_v = coefficient(s, t2, strip), on_x = coefficient(s, t3, strip), constant = coefficient(s, t4, strip);
      sweep<S>(strip, [&](int64_t i, auto full) CDM_BODY {
        V sum = on_v * at(v, strip, i, full) + on_x * (at(x, strip, i, full) - m) + constant;
        if (SILU) {
          sum += on_q * load(kept_q + (strip.slot + i) * LANES<S>);
          sum += on_e * load(kept_e + (strip.slot + i) * LANES<S>);
        } else {
          sum += on_q * at(dy, strip, i, full);
        }
        put(dx, strip, i, full, sum);
      });
    });
  });
  if (!s.per_image) sum_images(s, part_w, dweight), sum_images(s, part_b, dbias);
}

template <class F> void with_dtype(int64_t dtype, bool silu, F&& body) {
  auto with = [&](auto tag) { silu ? body(tag, std::true_type{}) : body(tag, std::false_type{}); };
  if (dtype == FLOAT32) with(float{});
  if (dtype == BFLOAT16) with(bfloat16{});
  if (dtype == FLOAT64) with(double{});
}

template <class T> const T* as(const void* p) { return static_cast<const T*>(p); }
template <class T> T* as(void* p) { return static_cast<T*>(p); }

}  // namespace

#define SHAPE_ARGUMENTS                                                                                        \
  int64_t batch, int64_t channels, int64_t pixels, int64_t groups, int64_t channels_last, int64_t silu,        \
      int64_t per_image, int64_t dtype, int64_t threads
#define SHAPE                                                                                                  \
  Shape shape{batch, channels, pixels, groups, bool(channels_last), bool(per_image)};                          \
  shape.flatten(LANES<S>)

CDM_EXPORT void CDM_NAME(cdm_group_norm_silu)(SHAPE_ARGUMENTS, double eps, const void* x, const void* weight,
                                              const void* bias, void* y, void* mean, void* rstd) {
  with_dtype(dtype, silu, [&](auto tag, auto activation) {
    using T = decltype(tag);
    using S = Accumulator<T>;
    SHAPE;
    forward<T, activation()>(shape, as<T>(x), as<S>(weight), as<S>(bias), eps, as<T>(y), as<S>(mean), as<S>(rstd), threads);
  });
}

CDM_EXPORT void CDM_NAME(cdm_group_norm_silu_backward)(SHAPE_ARGUMENTS, const void* dy, const void* x,
                                                       const void* mean, const void* rstd, const void* weight,
                                                       const void* bias, void* dx, void* dweight, void* dbias) {
  with_dtype(dtype, silu, [&](auto tag, auto activation) {
    using T = decltype(tag);
    using S = Accumulator<T>;
    SHAPE;
    backward<T, activation()>(shape, as<T>(dy), as<T>(x), as<S>(mean), as<S>(rstd), as<S>(weight), as<S>(bias), as<T>(dx),
                as<S>(dweight), as<S>(dbias), threads);
  });
}

CDM_EXPORT void CDM_NAME(cdm_group_norm_silu_double_backward)(SHAPE_ARGUMENTS, const void* v, const void* alpha,
                                                              const void* beta, const void* dy, const void* x,
                                                              const void* mean, const void* rstd,
                                                              const void* weight, const void* bias, void* ddy,
                                                              void* dx, void* dweight, void* dbias) {
  with_dtype(dtype, silu, [&](auto tag, auto activation) {
    using T = decltype(tag);
    using S = Accumulator<T>;
    SHAPE;
    double_backward<T, activation()>(shape, as<T>(v), as<S>(alpha), as<S>(beta), as<T>(dy), as<T>(x), as<S>(mean), as<S>(rstd),
                       as<S>(weight), as<S>(bias), as<T>(ddy), as<T>(dx), as<S>(dweight), as<S>(dbias), threads);
  });
}
