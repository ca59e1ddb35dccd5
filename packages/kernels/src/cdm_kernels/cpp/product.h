// Products of small matrices that lie in a cache, in rows padded with zeros to whole vectors.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "common.h"

namespace {

// Accumulators of a tile, in registers: 16 of 32 with AVX-512, and 8 of 16 where a vector is two or four of them.
#ifdef __AVX512F__
constexpr int TILE_ROWS = 8, TILE_VECTORS = 2;
#elif defined(__AVX2__)
constexpr int TILE_ROWS = 4, TILE_VECTORS = 1;
#else
constexpr int TILE_ROWS = 2, TILE_VECTORS = 1;
#endif

// A matrix wherever it is: element (i, j) at data[i * row + j * column].
template <class T> struct View {
  T* data;
  int64_t row, column;

  View transposed() const { return {data, column, row}; }
};

// A matrix in scratch: rows of an odd number of vectors, lest a column of it fall into few sets of the cache.
template <class S> struct Matrix {
  S* data;
  int64_t rows, columns, row;  // row: elements between rows

  static int64_t vectors(int64_t columns) { return (columns + LANES<S> - 1) / LANES<S>; }
  static int64_t padded(int64_t columns) { return (vectors(columns) | 1) * LANES<S>; }
  View<const S> view() const { return {data, row, 1}; }
  View<const S> transposed() const { return {data, 1, row}; }
  S* operator[](int64_t i) const { return data + i * row; }
};

// Matrices of one thread, one after another in memory aligned to a vector; `reset` begins anew.
template <class S> class Arena {
  struct Free {
    void operator()(S* p) const { std::free(p); }
  };
  std::unique_ptr<S, Free> memory;
  int64_t used = 0;

 public:
  explicit Arena(int64_t elements) : memory(static_cast<S*>(std::aligned_alloc(64, elements * sizeof(S)))) {
    if (!memory) throw std::bad_alloc();
  }
  void reset() { used = 0; }
  Matrix<S> matrix(int64_t rows, int64_t columns) { return matrix(rows, columns, Matrix<S>::padded(columns)); }
  Matrix<S> matrix(int64_t rows, int64_t columns, int64_t row) {
    Matrix<S> found{memory.get() + used, rows, columns, row};
    used += rows * found.row;
    return found;
  }
};

template <class S, int R, int N>
CDM_INLINE void tile(View<const S> a, const Matrix<S>& b, const Matrix<S>& c, int64_t i, int64_t j, int64_t depth,
                     bool add) {
  typename Wide<S>::V sums[R][N] = {};
  const S *left = a.data + i * a.row, *right = b.data + j;
  for (int64_t k = 0; k < depth; ++k, left += a.column, right += b.row) {
    typename Wide<S>::V part[N];
    for (int n = 0; n < N; ++n) part[n] = load(right + n * LANES<S>);
    for (int r = 0; r < R; ++r) {
      auto value = splat(left[r * a.row]);
      for (int n = 0; n < N; ++n) sums[r][n] += value * part[n];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) {
      S* p = c[i + r] + j + n * LANES<S>;
      store(p, add ? load(p) + sums[r][n] : sums[r][n]);  // a long sum is one of short ones
    }
}

template <class S, int R, int N>
CDM_INLINE void column(View<const S> a, const Matrix<S>& b, const Matrix<S>& c, int64_t i, int64_t j, int64_t depth,
                       bool add) {
  for (; i + R <= c.rows; i += R) tile<S, R, N>(a, b, c, i, j, depth, add);
  if constexpr (R > 1) column<S, R / 2, N>(a, b, c, i, j, depth, add);
}

// c = a b, or c += a b; a (c.rows, b.rows). What lies past the last column of b comes along: zeros.
template <class S> void multiply(View<const S> a, const Matrix<S>& b, const Matrix<S>& c, bool add = false) {
  const int64_t vectors = Matrix<S>::vectors(b.columns);
  int64_t n = 0;
  for (; n + TILE_VECTORS <= vectors; n += TILE_VECTORS)
    column<S, TILE_ROWS, TILE_VECTORS>(a, b, c, 0, n * LANES<S>, b.rows, add);
  if constexpr (TILE_VECTORS > 1)
    for (; n < vectors; ++n) column<S, TILE_ROWS, 1>(a, b, c, 0, n * LANES<S>, b.rows, add);
}

// Blocks of `step` lanes exchanged between a pair of rows: a stage of a transposition.
template <class V> CDM_INLINE void exchange(V& a, V& b, int step) {
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
#ifdef __clang__
  V x = a, y = b;
  for (int i = 0; i < lanes; ++i) {
    a[i] = i & step ? y[i ^ step] : x[i];
    b[i] = i & step ? y[i] : x[i ^ step];
  }
#else
  std::conditional_t<lanes == 16, IF, ID> first, second;
  for (int i = 0; i < lanes; ++i) {
    first[i] = i & step ? lanes + (i ^ step) : i;
    second[i] = i & step ? lanes + i : i ^ step;
  }
  V x = __builtin_shuffle(a, b, first);
  b = __builtin_shuffle(a, b, second);
  a = x;
#endif
}

// LANES rows of as many elements each, in place.
template <class S> CDM_INLINE void transpose_block(typename Wide<S>::V (&rows)[LANES<S>]) {
#pragma GCC unroll 4
  for (int step = 1; step < LANES<S>; step *= 2)
#pragma GCC unroll 16
    for (int i = 0; i < LANES<S>; ++i)
      if (!(i & step)) exchange(rows[i], rows[i | step], step);
}

// to = scale * from, converted; zeros past the last column. One of from's strides is 1.
template <class T, class S> void gather(View<const T> from, const Matrix<S>& to, S scale = 1) {
  constexpr int lanes = LANES<S>;
  typename Wide<S>::V block[lanes];
  for (int64_t j = 0; j < to.columns; j += lanes) {
    const int width = int(std::min<int64_t>(lanes, to.columns - j));
    if (from.column == 1) {
      for (int64_t i = 0; i < to.rows; ++i) {
        const T* p = from.data + i * from.row + j;
        store(to[i] + j, (width == lanes ? load(p) : load(p, width)) * scale);
      }
      continue;
    }
    for (int64_t i = 0; i < to.rows; i += lanes) {
      const int height = int(std::min<int64_t>(lanes, to.rows - i));
      const T* p = from.data + i + j * from.column;
      for (int k = 0; k < lanes; ++k) {
        if (k >= width) block[k] = typename Wide<S>::V{};
        else block[k] = (height == lanes ? load(p + k * from.column) : load(p + k * from.column, height)) * scale;
      }
      transpose_block<S>(block);
      for (int k = 0; k < height; ++k) store(to[i + k] + j, block[k]);
    }
  }
}

// to = scale * from, converted. One of to's strides is 1.
template <class T, class S> void scatter(const Matrix<S>& from, View<T> to, S scale = 1) {
  constexpr int lanes = LANES<S>;
  typename Wide<S>::V block[lanes];
  for (int64_t j = 0; j < from.columns; j += lanes) {
    const int width = int(std::min<int64_t>(lanes, from.columns - j));
    if (to.column == 1) {
      for (int64_t i = 0; i < from.rows; ++i) {
        T* p = to.data + i * to.row + j;
        auto value = load(from[i] + j) * scale;
        if (width == lanes) store(p, value); else store(p, value, width);
      }
      continue;
    }
    for (int64_t i = 0; i < from.rows; i += lanes) {
      const int height = int(std::min<int64_t>(lanes, from.rows - i));
      for (int k = 0; k < lanes; ++k)
        block[k] = k < height ? load(from[i + k] + j) * scale : typename Wide<S>::V{};
      transpose_block<S>(block);
      for (int k = 0; k < width; ++k) {
        T* p = to.data + i + (j + k) * to.column;
        if (height == lanes) store(p, block[k]); else store(p, block[k], height);
      }
    }
  }
}

}  // namespace
