// The nine sums of an image over the windows that the taps of a 3x3 convolution with padding 1 see, and the adjoint.
//
// Tap 0 of a direction reads one pixel back and so never sees the last line, tap 2 never the first. Lines of a
// direction fall into four classes: first, middle, last, and the only one of an image one pixel wide, which tap 1
// alone sees. Every pixel is read once, into its class; taps are sums of classes, so nothing cancels:
//   tap 0 = first + middle    tap 1 = first + middle + last + only    tap 2 = middle + last
// Vectors lie along columns (contiguous) or along channels (channels last), up to BLOCK of them at a time.
#include <algorithm>
#include <vector>

#include "common.h"

namespace {

constexpr int BLOCK = 4;
enum Line { FIRST, MIDDLE, LAST, ONLY };

struct Shape {
  int64_t batch, channels, height, width;
};

CDM_INLINE Line line(int64_t i, int64_t count) {
  return count == 1 ? ONLY : i == 0 ? FIRST : i == count - 1 ? LAST : MIDDLE;
}

template <class V> struct Taps {
  V tap[3];
};
template <class V> CDM_INLINE Taps<V> taps(V first, V middle, V last, V only) {
  V start = first + middle;
  return {{start, start + last + only, middle + last}};
}
// The adjoint of `taps`: what a line of each class gets.
template <class V> CDM_INLINE V spread(const V* tap, int64_t step, Line line) {
  V centre = tap[step];
  return line == ONLY ? centre : line == FIRST ? tap[0] + centre : line == LAST ? centre + tap[2 * step]
                                                                                : tap[0] + centre + tap[2 * step];
}

// body(first, std::integral_constant<int, N>, lanes): N whole vectors but for the last one's lanes.
template <int WIDTH, class F> CDM_INLINE void blocks(int64_t size, F&& body) {
  for (int64_t i = 0; i < size; i += BLOCK * WIDTH) {
    int64_t left = size - i, vectors = (left + WIDTH - 1) / WIDTH;
    int last = int(left - (vectors - 1) * WIDTH);
    if (vectors >= BLOCK) body(i, std::integral_constant<int, BLOCK>{}, vectors == BLOCK ? last : WIDTH);
    else if (vectors == 3) body(i, std::integral_constant<int, 3>{}, last);
    else if (vectors == 2) body(i, std::integral_constant<int, 2>{}, last);
    else body(i, std::integral_constant<int, 1>{}, last);
  }
}
template <int N, class T> CDM_INLINE auto at(const T* p, int k, int last) {
  constexpr int lanes = LANES<Accumulator<T>>;
  return k < N - 1 || last == lanes ? load(p + k * lanes) : load(p + k * lanes, last);
}
template <int N, class T, class V> CDM_INLINE void put(T* p, int k, int last, V value) {
  constexpr int lanes = LANES<Accumulator<T>>;
  if (k < N - 1 || last == lanes) store(p + k * lanes, value); else store(p + k * lanes, value, last);
}
// The sums of N vectors of columns over the lines that each tap sees, put side by side. WHOLE: vectors may reach into
// the next line, else the last one has `last` lanes.
template <int N, bool WHOLE, class T, class S = Accumulator<T>>
CDM_INLINE void row_taps(const T* x, int64_t height, int64_t width, int last, S* to, int64_t stride) {
  using V = typename Wide<S>::V;
  auto at = [&](int64_t h, int k) {
    const T* p = x + h * width + k * LANES<S>;
    return WHOLE || k < N - 1 ? load(p) : load(p, last);
  };
  V first[N], middle[N] = {}, odd[N] = {};
  for (int k = 0; k < N; ++k) first[k] = at(0, k);
  int64_t h = 1;
  for (; h + 2 < height; h += 2)
    for (int k = 0; k < N; ++k) middle[k] += at(h, k), odd[k] += at(h + 1, k);
  for (; h + 1 < height; ++h)
    for (int k = 0; k < N; ++k) middle[k] += at(h, k);
  for (int k = 0; k < N; ++k) {
    auto rows = height == 1 ? taps(V{}, V{}, V{}, first[k]) : taps(first[k], middle[k] + odd[k], at(h, k), V{});
    for (int i = 0; i < 3; ++i) store(to + i * stride + k * LANES<S>, rows.tap[i]);
  }
}

template <class T, class S = Accumulator<T>>
CDM_INLINE void plane_sums(const T* x, int64_t height, int64_t width, bool whole, S* rows, int64_t stride, S* out) {
  blocks<LANES<S>>(width, [&](int64_t column, auto n, int last) {
    if (whole) row_taps<n(), true>(x + column, height, width, last, rows + column, stride);
    else row_taps<n(), false>(x + column, height, width, last, rows + column, stride);
  });
  for (int i = 0; i < 3; ++i) {
    const S* row = rows + i * stride;
    S middle = 0;
#pragma omp simd reduction(+ : middle)
    for (int64_t w = 1; w < width - 1; ++w) middle += row[w];
    auto windows = width == 1 ? taps<S>(0, 0, 0, row[0]) : taps<S>(row[0], middle, row[width - 1], 0);
    for (int j = 0; j < 3; ++j) out[3 * i + j] = windows.tap[j];
  }
}

template <class T, class S = Accumulator<T>> void window_sums(const Shape& s, const T* x, S* out, int64_t threads) {
  const int64_t planes = s.batch * s.channels, pixels = s.height * s.width, stride = s.width + LANES<S>;
#pragma omp parallel num_threads(threads) if (planes * pixels > 16384)
  {
    std::vector<S> rows(3 * stride);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < planes; ++i) {
      // The last vectors of the last planes would reach past x.
      plane_sums(x + i * pixels, s.height, s.width, (planes - i - 1) * pixels >= LANES<S>, rows.data(), stride,
                 out + 9 * i);
    }
  }
}

template <int N, bool WHOLE, class T, class S = Accumulator<T>>
CDM_INLINE void put_rows(T* dx, int64_t rows, int64_t width, int last, const S* values) {
  typename Wide<S>::V v[N];
  for (int k = 0; k < N; ++k) v[k] = load(values + k * LANES<S>);
  for (int64_t h = 0; h < rows; ++h)
    for (int k = 0; k < N; ++k) {
      T* p = dx + h * width + k * LANES<S>;
      if (WHOLE || k < N - 1) store(p, v[k]); else store(p, v[k], last);
    }
}

template <class T, class S = Accumulator<T>>
CDM_INLINE void adjoint_plane(const S* sums, int64_t height, int64_t width, S* row, T* dx) {
  for (int64_t h = 0; h < height;) {
    Line kind = line(h, height);
    S columns[3];
    for (int j = 0; j < 3; ++j) columns[j] = spread(sums + j, 3, kind);
    for (int64_t w = 0; w < width; ++w) row[w] = spread(columns, 1, MIDDLE);
    row[0] = spread(columns, 1, line(0, width));
    if (width > 1) row[width - 1] = spread(columns, 1, LAST);
    int64_t rows = kind == MIDDLE ? height - 2 : 1;
    blocks<LANES<S>>(width, [&](int64_t column, auto n, int last) {
      // A vector may reach into later rows of the plane: they are still to be written.
      int64_t beyond = (LANES<S> - last + width - 1) / width;
      int64_t whole = beyond && column ? 0 : std::clamp<int64_t>(height - beyond - h, 0, rows);
      T* p = dx + h * width + column;
      put_rows<n(), true>(p, whole, width, last, row + column);
      put_rows<n(), false>(p + whole * width, rows - whole, width, last, row + column);
    });
    h += rows;
  }
}

template <class T, class S = Accumulator<T>> void adjoint(const Shape& s, const S* sums, T* dx, int64_t threads) {
  const int64_t planes = s.batch * s.channels, pixels = s.height * s.width;
#pragma omp parallel num_threads(threads) if (planes * pixels > 16384)
  {
    std::vector<S> row(s.width + LANES<S>);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < planes; ++i) adjoint_plane(sums + 9 * i, s.height, s.width, row.data(), dx + i * pixels);
  }
}

// -- channels last ------------------------------------------------------------------------------------------------

// body(image, first channel, integral_constant N, lanes of the last vector) over the threads.
template <class S, class F> void channel_blocks(const Shape& s, int64_t threads, F&& body) {
  const int64_t width = BLOCK * LANES<S>, per_image = (s.channels + width - 1) / width;
#pragma omp parallel for num_threads(threads) schedule(static) if (s.batch * s.channels * s.height * s.width > 16384)
  for (int64_t i = 0; i < s.batch * per_image; ++i) {
    int64_t first = i % per_image * width;
    blocks<LANES<S>>(s.channels - first < width ? s.channels - first : width,
                     [&](int64_t, auto n, int last) { body(i / per_image, first, n, last); });
  }
}

template <class T, class S = Accumulator<T>>
void window_sums_last(const Shape& s, const T* x, S* out, int64_t threads) {
  using V = typename Wide<S>::V;
  channel_blocks<S>(s, threads, [&](int64_t image, int64_t first, auto n, int last) {
    constexpr int N = n();
    V sums[4][4][N] = {};
    const T* row = x + image * s.height * s.width * s.channels + first;
    for (int64_t h = 0; h < s.height; ++h, row += s.width * s.channels) {
      auto& into = sums[line(h, s.height)];
      V middle[N] = {};
      for (int64_t w = 1; w < s.width - 1; ++w)
        for (int k = 0; k < N; ++k) middle[k] += at<N>(row + w * s.channels, k, last);
      for (int k = 0; k < N; ++k) {
        into[MIDDLE][k] += middle[k];
        into[line(0, s.width)][k] += at<N>(row, k, last);
        if (s.width > 1) into[LAST][k] += at<N>(row + (s.width - 1) * s.channels, k, last);
      }
    }
    for (int k = 0; k < N; ++k) {
      Taps<V> rows[4];
      for (int l = FIRST; l <= ONLY; ++l)
        rows[l] = taps(sums[FIRST][l][k], sums[MIDDLE][l][k], sums[LAST][l][k], sums[ONLY][l][k]);
      S windows[9][LANES<S>];
      for (int i = 0; i < 3; ++i) {
        auto columns = taps(rows[FIRST].tap[i], rows[MIDDLE].tap[i], rows[LAST].tap[i], rows[ONLY].tap[i]);
        for (int j = 0; j < 3; ++j) store(windows[3 * i + j], columns.tap[j]);
      }
      S* to = out + (image * s.channels + first + k * LANES<S>) * 9;
      for (int lane = 0; lane < (k < N - 1 ? LANES<S> : last); ++lane)
        for (int i = 0; i < 9; ++i) *to++ = windows[i][lane];
    }
  });
}

template <class T, class S = Accumulator<T>> void adjoint_last(const Shape& s, const S* sums, T* dx, int64_t threads) {
  using V = typename Wide<S>::V;
  channel_blocks<S>(s, threads, [&](int64_t image, int64_t first, auto n, int last) {
    constexpr int N = n();
    V windows[9][N];
    const S* from = sums + (image * s.channels + first) * 9;
    for (int k = 0; k < N; ++k) {
      S gathered[9][LANES<S>] = {};
      for (int lane = 0; lane < (k < N - 1 ? LANES<S> : last); ++lane)
        for (int i = 0; i < 9; ++i) gathered[i][lane] = *from++;
      for (int i = 0; i < 9; ++i) windows[i][k] = load(gathered[i]);
    }
    T* row = dx + image * s.height * s.width * s.channels + first;
    for (int64_t h = 0; h < s.height; ++h, row += s.width * s.channels) {
      V values[4][N];
      for (int k = 0; k < N; ++k) {
        V columns[3];
        for (int j = 0; j < 3; ++j) columns[j] = spread(&windows[j][k], 3 * N, line(h, s.height));
        for (int l = FIRST; l <= ONLY; ++l) values[l][k] = spread(columns, 1, Line(l));
      }
      for (int k = 0; k < N; ++k) put<N>(row, k, last, values[line(0, s.width)][k]);
      for (int64_t w = 1; w < s.width - 1; ++w)
        for (int k = 0; k < N; ++k) put<N>(row + w * s.channels, k, last, values[MIDDLE][k]);
      if (s.width > 1)
        for (int k = 0; k < N; ++k) put<N>(row + (s.width - 1) * s.channels, k, last, values[LAST][k]);
    }
  });
}

template <class F> void with_dtype(int64_t dtype, F&& body) {
  if (dtype == FLOAT32) body(float{});
  if (dtype == BFLOAT16) body(bfloat16{});
  if (dtype == FLOAT64) body(double{});
}

}  // namespace

CDM_EXPORT void CDM_NAME(cdm_window_sums)(int64_t batch, int64_t channels, int64_t height, int64_t width,
                                          int64_t channels_last, int64_t dtype, int64_t threads, const void* x,
                                          void* sums) {
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    auto run = channels_last ? window_sums_last<T> : window_sums<T>;
    run({batch, channels, height, width}, static_cast<const T*>(x), static_cast<Accumulator<T>*>(sums), threads);
  });
}

CDM_EXPORT void CDM_NAME(cdm_window_sums_adjoint)(int64_t batch, int64_t channels, int64_t height, int64_t width,
                                                  int64_t channels_last, int64_t dtype, int64_t threads,
                                                  const void* sums, void* dx) {
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    auto run = channels_last ? adjoint_last<T> : adjoint<T>;
    run({batch, channels, height, width}, static_cast<const Accumulator<T>*>(sums), static_cast<T*>(dx), threads);
  });
}
