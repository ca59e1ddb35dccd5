// dy^T x and the column sums of dy, for matrices x (pixels, C) and dy (pixels, D): the gradients of a 1x1 convolution's
// weight and bias, channels last. C fills whole vectors.
#include <vector>

#include "product.h"

namespace {

constexpr int64_t BLOCK = 128;  // pixels at a time: their part of x and of dy stays in the L1 cache

// column_sums += the sums of `count` rows.
void add_rows(const float* rows, int64_t count, int64_t columns, float* column_sums) {
  for (int64_t j = 0; j < columns; j += LANES<float>) {
    const int lanes = int(std::min<int64_t>(LANES<float>, columns - j));
    VF sum{};
    for (int64_t i = 0; i < count; ++i) sum += load(rows + i * columns + j, lanes);
    store(column_sums + j, load(column_sums + j, lanes) + sum, lanes);
  }
}

void pixel_product(int64_t pixels, int64_t outputs, int64_t inputs, const float* dy, const float* x, float* dweight,
                   float* dbias, int64_t threads) {
  // Row `outputs` of a thread's part: the sums of dy.
  const int64_t row = std::max(Matrix<float>::padded(inputs), Matrix<float>::padded(outputs));
  Arena<float> arena(threads * (outputs + 1) * row);
  std::vector<Matrix<float>> parts;
  for (int64_t i = 0; i < threads; ++i) parts.push_back(arena.matrix(outputs, inputs, row)), arena.matrix(1, row, row);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t thread = 0; thread < threads; ++thread) {
    Matrix<float>& part = parts[thread];
    std::fill_n(part.data, (outputs + 1) * row, 0.0f);
    const int64_t end = pixels * (thread + 1) / threads;
    for (int64_t first = pixels * thread / threads; first < end; first += BLOCK) {
      const int64_t count = std::min(BLOCK, end - first);
      // Rows of x are whole vectors, so it serves as it is; it is only read.
      Matrix<float> right{const_cast<float*>(x) + first * inputs, count, inputs, inputs};
      multiply(View<const float>{dy + first * outputs, 1, outputs}, right, part, true);
      if (dbias) add_rows(dy + first * outputs, count, outputs, part[outputs]);
    }
  }
  for (int64_t i = 0; i < outputs; ++i) {
    float* out = dweight + i * inputs;
    std::copy_n(parts[0][i], inputs, out);
    for (int64_t thread = 1; thread < threads; ++thread)
      for (int64_t j = 0; j < inputs; ++j) out[j] += parts[thread][i][j];
  }
  for (int64_t j = 0; dbias && j < outputs; ++j) {
    dbias[j] = 0;
    for (auto& part : parts) dbias[j] += part[outputs][j];
  }
}

}  // namespace

CDM_EXPORT void CDM_NAME(cdm_pixel_product)(int64_t pixels, int64_t outputs, int64_t inputs, int64_t threads,
                                            const void* dy, const void* x, void* dweight, void* dbias) {
  pixel_product(pixels, outputs, inputs, static_cast<const float*>(dy), static_cast<const float*>(x),
                static_cast<float*>(dweight), static_cast<float*>(dbias), threads);
}
