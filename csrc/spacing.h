// How the rows of a tensor lie, whoever holds it: the one place that decides what must be copied.
#pragma once

#include "equation.h"

namespace fusednorm {

// Finds how far the rows of a tensor are apart and where they jump. All but the first `leading`
// dimensions are the columns of a row. Returns false where columns are not adjacent, or rows jump
// in more places than `rows` can say.
inline bool find_spacing(const int64_t* sizes, const int64_t* strides, int64_t dims,
                         int64_t leading, Rows& rows) {
  int64_t expected = 1;  // the stride with which a dimension goes on as those inside of it
  for (int64_t i = dims - 1; i >= leading; --i) {
    if (sizes[i] == 1) continue;
    if (strides[i] != expected) return false;
    expected *= sizes[i];
  }
  rows.stride = expected;  // a lone row's is what it would have in a batch
  int64_t inside = 1;      // rows
  int jumps = 0;
  for (int64_t i = leading - 1; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (inside == 1) {
      rows.stride = strides[i];
    } else if (strides[i] != expected) {
      if (jumps == int(sizeof rows.jumps / sizeof *rows.jumps)) return false;
      rows.jumps[jumps++] = {inside, strides[i] - expected};
    }
    inside *= sizes[i];
    expected = strides[i] * sizes[i];
  }
  return true;
}

}  // namespace fusednorm
