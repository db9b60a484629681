// A layer norm and its gradients by the kernels alone, on whatever processor this is compiled for.
//
//     main DTYPE ROWS COLS EPS    stdin: x, dz, weight, bias    stdout: z, dx, dweight, dbias
//
// All are of the dtype with that number in DType, but for dweight and dbias in the compute type.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/levels.h"

using namespace fusednorm;

namespace {

using Bytes = std::vector<char>;

Bytes read(size_t size) {
  Bytes bytes(size);
  if (fread(bytes.data(), 1, size, stdin) != size) exit(1);
  return bytes;
}

void write(const Bytes& bytes) {
  if (fwrite(bytes.data(), 1, bytes.size(), stdout) != bytes.size()) exit(1);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 5) return 2;
  const DType dtype = DType(atoi(arguments[1]));
  const int64_t rows = atoll(arguments[2]), cols = atoll(arguments[3]);
  const DType compute = dtype == DType::f64 ? DType::f64 : DType::f32;
  const size_t size = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
  const size_t wide = dtype == DType::f64 ? 8 : 4;

  Bytes x = read(rows * cols * size), dz = read(rows * cols * size);
  const Bytes weight = read(cols * size), bias = read(cols * size);
  Bytes z(x.size()), dx(x.size()), mean(rows * wide), rstd(rows * wide);
  Bytes dweight(cols * wide), dbias(cols * wide);

  Forward forward;
  forward.rows = forward.rows_per_sample = rows;
  forward.cols = cols;
  forward.compute = compute;
  forward.weight = {weight.data(), 0, false, dtype};
  forward.bias = {bias.data(), 0, false, dtype};
  cpu::Backward backward;
  static_cast<Problem&>(backward) = forward;

  forward.eps = atof(arguments[4]);
  forward.x = {x.data(), cols, dtype};
  forward.z = {z.data(), cols, dtype};
  forward.mean = mean.data();
  forward.rstd = rstd.data();
  cpu::portable_kernels.forward(forward, 0, rows);

  backward.dz = {dz.data(), cols, dtype};
  backward.h = forward.x;
  backward.dx = {dx.data(), cols, dtype};
  backward.mean = mean.data();
  backward.rstd = rstd.data();
  backward.dweight = dweight.data();
  backward.dbias = dbias.data();
  cpu::portable_kernels.backward(backward, 0, 1);

  for (const Bytes* result : {&z, &dx, &dweight, &dbias}) write(*result);
}
