// Matrix products of a thread's own block of rows with the keys. They are not torch.mm's because
// each thread then runs its whole sweep alone: a thread that waits for another at every block
// loses several times over on a machine whose cores are shared, as with data-loading workers.
#pragma once

#include <cstdint>

namespace ctt {

// B of a product A B, (depth, columns), repacked as panels of `width` columns: [panel][depth][width].
// Columns beyond the last are zeros.
template <class T>
struct Panels {
  const T* data;
  std::int64_t depth;
  std::int64_t columns;
};

template <class T>
struct Product {
  std::int64_t width;   // columns of a panel
  std::int64_t height;  // rows must come in multiples of this

  // c (rows, columns rounded up to width) <- a (rows, depth) b, or is added to
  void (*multiply)(const T* a, std::int64_t a_stride, std::int64_t rows, const Panels<T>& b,
                   bool add, T* c, std::int64_t c_stride);
};

// The tile that suits this machine's registers.
template <class T>
const Product<T>& product();

// One panel of b (depth, columns), element (k, j) at b[k * row_stride + j * column_stride].
template <class T>
void pack_panel(const T* b, std::int64_t depth, std::int64_t columns, std::int64_t row_stride,
                std::int64_t column_stride, std::int64_t width, std::int64_t panel, T* out);

constexpr std::int64_t round_up(std::int64_t x, std::int64_t step) {
  return (x + step - 1) / step * step;
}

}  // namespace ctt
