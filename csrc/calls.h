// A forward and a backward, whoever calls: the problem that the kernels solve, and what is
// returned.
//
// Tensors are Python's (tensors.h) or the dispatcher's (boxed.h): their Layout says which, and
// knows how to describe and allocate them. One that is absent is null.
#pragma once

#include <algorithm>
#include <cmath>

#include "equation.h"

namespace fusednorm {

// The arguments of the launchers in fusednorm/triton_kernels/forward.py and backward.py, by name.
template <class Layout>
struct ForwardArguments {
  typename Layout::Tensor x, residual, gate, weight, bias, scale, shift, seed;
  typename Layout::Shape normalized_shape;
  double eps;
  bool rms;
  double dropout_p;
  DType out_dtype, h_dtype, x_hat_dtype;
  bool save_stats, store_h;
};

template <class Layout>
struct BackwardArguments {
  typename Layout::Tensor dz, dh, x, h, mean, rstd, gate, weight, bias, scale, shift, seed;
  typename Layout::Shape normalized_shape;
  double dropout_p;
  DType x_dtype, residual_dtype, x_hat_dtype;
  bool wanted[7];
};

// Describes what both directions are given.
template <class Layout, class Arguments>
void describe(Problem& p, Layout& layout, const Arguments& a) {
  p.rows = layout.row_count();
  p.cols = layout.cols();
  int64_t samples = 1;
  for (const auto term : {a.gate, a.scale, a.shift})
    if (term) samples = std::max(samples, Layout::size(term, 0));
  p.rows_per_sample = p.rows / samples;
  p.x_hat_dtype = a.x_hat_dtype;
  p.dropout.seed = static_cast<const int64_t*>(Layout::address(a.seed));
  p.dropout.drop_below =
      uint32_t(std::min(std::nearbyint(a.dropout_p * 4294967296.0), 4294967295.0));
  p.dropout.inverse_keep = 1.0 / (1.0 - a.dropout_p);
  p.gate = layout.term(a.gate);
  p.weight = layout.vector(a.weight);
  p.bias = layout.vector(a.bias);
  p.scale = layout.term(a.scale);
}

template <class Layout>
class ForwardCall {
  using Owned = typename Layout::Owned;

 public:
  explicit ForwardCall(const ForwardArguments<Layout>& a) : layout_(a.x, a.normalized_shape) {
    const DType x_dtype = Layout::dtype_of(a.x);
    p.h_dtype = a.h_dtype;
    p.rms = a.rms;
    p.eps = a.eps;
    p.compute = x_dtype == DType::f64 || a.h_dtype == DType::f64 ? DType::f64 : DType::f32;
    if (a.h_dtype != DType::none && a.store_h) h = Layout::empty_like(a.x, a.h_dtype);
    if (a.save_stats) {
      rstd = Layout::new_vector(a.x, layout_.row_count(), p.compute);
      if (!p.rms) mean = Layout::empty_like(rstd.get(), p.compute);
    }
    z = Layout::empty_like(a.x, a.out_dtype);
    if (is_empty()) return;
    describe(p, layout_, a);
    p.shift = layout_.term(a.shift);
    p.x = layout_.rows(a.x);
    p.residual = layout_.rows(a.residual);
    p.z = layout_.fresh(z, a.out_dtype);
    p.h = layout_.fresh(h, a.h_dtype);
    p.mean = Layout::address(mean.get());
    p.rstd = Layout::address(rstd.get());
  }

  bool is_empty() const { return layout_.is_empty(); }

  Forward p;
  Owned z, h, mean, rstd;

 private:
  Layout layout_;
};

// B is the Backward of a device.
template <class B, class Layout>
class BackwardCall {
 public:
  explicit BackwardCall(const BackwardArguments<Layout>& a) : layout_(a.h, a.normalized_shape) {
    allocate(a);
    if (is_empty()) {
      for (const auto& gradient : gradients)
        if (gradient) Layout::zero(gradient.get());
      return;
    }
    describe(p, layout_, a);
    p.rms = a.mean == nullptr;
    p.compute = Layout::dtype_of(a.rstd);
    p.dz = layout_.rows(a.dz);
    p.dh = layout_.rows(a.dh);
    p.h = layout_.rows(a.h);
    p.mean = Layout::address(a.mean);
    p.rstd = Layout::address(a.rstd);
    p.dx = layout_.fresh(gradients[0], a.x_dtype);
    p.dresidual = layout_.fresh(gradients[1], a.residual_dtype);
    if (gradients[2]) p.x = layout_.rows(a.x);
  }

  bool is_empty() const { return layout_.is_empty(); }

  Term dgate() { return layout_.term(gradients[2].get()); }
  Term dweight() { return layout_.vector(gradients[3].get()); }
  Term dbias() { return layout_.vector(gradients[4].get()); }
  Term dscale() { return layout_.term(gradients[5].get()); }
  Term dshift() { return layout_.term(gradients[6].get()); }

  B p;
  typename Layout::Owned gradients[7];  // of x, residual, gate, weight, bias, scale and shift

 private:
  // Without a gradient of z there is none but those of x, residual and gate.
  void allocate(const BackwardArguments<Layout>& a) {
    const DType streams[] = {a.x_dtype, a.residual_dtype};
    for (int i = 0; i < 2; ++i)
      if (a.wanted[i]) gradients[i] = Layout::empty_like(a.h, streams[i]);
    const typename Layout::Tensor parameters[] = {a.gate, a.weight, a.bias, a.scale, a.shift};
    for (int i = 0; i < (a.dz ? 5 : 1); ++i)
      if (parameters[i] && a.wanted[2 + i])
        gradients[2 + i] = Layout::empty_like(parameters[i], Layout::dtype_of(parameters[i]));
  }

  Layout layout_;
};

}  // namespace fusednorm
