// As calls.h, for the gated norm; its arguments are those of the launchers in
// fusednorm/triton_kernels/gated.py.
#pragma once

#include "equation.h"

namespace fusednorm {

template <class Layout>
struct GatedForwardArguments {
  typename Layout::Tensor x, gate_input, weight, bias;
  typename Layout::Shape normalized_shape;
  int64_t group_size;
  double eps;
  bool rms, norm_before_gate;
  DType out_dtype, x_hat_dtype;
  bool save_stats;
};

template <class Layout>
struct GatedBackwardArguments {
  typename Layout::Tensor dz, x, gate_input, mean, rstd, weight, bias;
  typename Layout::Shape normalized_shape;
  int64_t group_size;
  bool norm_before_gate;
  DType x_hat_dtype;
  bool wanted[4];
};

// Describes what both directions are given.
template <class Layout, class Arguments>
void describe_gated(Gated& p, Layout& layout, const Arguments& a) {
  p.rows = p.rows_per_sample = layout.row_count();
  p.cols = layout.cols();
  p.group_size = a.group_size;
  p.gate_first = !a.norm_before_gate;
  p.x_hat_dtype = a.x_hat_dtype;
  p.x = layout.rows(a.x);
  p.gate_input = layout.rows(a.gate_input);
  p.weight = layout.vector(a.weight);
  p.bias = layout.vector(a.bias);
}

template <class Layout>
class GatedForwardCall {
  using Owned = typename Layout::Owned;

 public:
  explicit GatedForwardCall(const GatedForwardArguments<Layout>& a)
      : layout_(a.x, a.normalized_shape) {
    const bool is_double =
        Layout::dtype_of(a.x) == DType::f64 || Layout::dtype_of(a.gate_input) == DType::f64;
    p.compute = is_double ? DType::f64 : DType::f32;
    p.rms = a.rms;
    p.eps = a.eps;
    if (a.save_stats) {
      const int64_t size = layout_.cols() == 0 ? 1 : a.group_size;
      rstd = Layout::new_vector(a.x, layout_.row_count() * layout_.cols() / size, p.compute);
      if (!p.rms) mean = Layout::empty_like(rstd.get(), p.compute);
    }
    z = Layout::empty_like(a.x, a.out_dtype);
    if (is_empty()) return;
    describe_gated(p, layout_, a);
    p.z = layout_.fresh(z, a.out_dtype);
    p.mean = Layout::address(mean.get());
    p.rstd = Layout::address(rstd.get());
  }

  bool is_empty() const { return layout_.is_empty(); }

  GatedForward p;
  Owned z, mean, rstd;

 private:
  Layout layout_;
};

// B is the GatedBackward of a device.
template <class B, class Layout>
class GatedBackwardCall {
 public:
  explicit GatedBackwardCall(const GatedBackwardArguments<Layout>& a)
      : layout_(a.x, a.normalized_shape) {
    const typename Layout::Tensor inputs[] = {a.x, a.gate_input, a.weight, a.bias};
    for (int i = 0; i < 4; ++i)
      if (a.wanted[i] && inputs[i])
        gradients[i] = Layout::empty_like(inputs[i], Layout::dtype_of(inputs[i]));
    if (is_empty()) {
      for (const auto& gradient : gradients)
        if (gradient) Layout::zero(gradient.get());
      return;
    }
    describe_gated(p, layout_, a);
    p.rms = a.mean == nullptr;
    p.compute = Layout::dtype_of(a.rstd);
    p.dz = layout_.rows(a.dz);
    p.mean = Layout::address(a.mean);
    p.rstd = Layout::address(a.rstd);
    p.dx = layout_.fresh(gradients[0], p.x.dtype);
    p.dgate_input = layout_.fresh(gradients[1], p.gate_input.dtype);
  }

  bool is_empty() const { return layout_.is_empty(); }

  Term dweight() { return layout_.vector(gradients[2].get()); }
  Term dbias() { return layout_.vector(gradients[3].get()); }

  B p;
  typename Layout::Owned gradients[4];  // of x, gate_input, weight and bias

 private:
  Layout layout_;
};

}  // namespace fusednorm
