// The calls of norms over dimension 1 that the extension's launchers get from Python.
#pragma once

#include "cpu_launch.h"
#include "tensors.h"

namespace fusednorm {

// The arguments of the launchers in fusednorm/triton_kernels/channels.py, by name.
struct ChannelsForwardArguments {
  PyObject *x, *weight, *bias, *eps, *rms, *out_dtype, *save_stats;
};

struct ChannelsBackwardArguments {
  PyObject *dz, *x, *mean, *rstd, *weight, *bias, *output_mask;
};

// Describes tensors [B, C, *spatial]. What it has to copy lives as long as it does.
class ChannelLayout {
 public:
  explicit ChannelLayout(PyObject* x) : batches_(size(x, 0)), channels_(size(x, 1)) {
    const Ref shape = attribute(x, names().shape.get());
    for (Py_ssize_t i = 2; i < PyTuple_Size(shape.get()); ++i) positions_ *= item(shape.get(), i);
  }

  bool is_empty() const { return batches_ == 0 || channels_ == 0 || positions_ == 0; }
  int64_t rows() const { return batches_ * positions_; }

  // A tensor as [B, C, S], copied where its positions are not adjacent.
  cpu::Planes planes(PyObject* tensor) {
    int64_t batch_stride = channels_ * positions_, channel_stride = positions_;
    if (!is_contiguous(tensor)) {
      const Ref shape(Py_BuildValue("LLL", static_cast<long long>(batches_),
                                    static_cast<long long>(channels_),
                                    static_cast<long long>(positions_)));
      tensor = keep(invoke(tensor, names().reshape.get(), shape.get()));
      if (positions_ > 1 && stride(tensor, 2) != 1)
        tensor = keep(invoke(tensor, names().contiguous.get()));
      batch_stride = stride(tensor, 0);
      channel_stride = stride(tensor, 1);
    }
    return {address(tensor), batch_stride, channel_stride, dtype_of(tensor)};
  }

  // Planes that have just been allocated, or none.
  cpu::Planes fresh(const Ref& tensor, DType dtype) const {
    if (!tensor) return {};
    return {address(tensor.get()), channels_ * positions_, positions_, dtype};
  }

  // A weight, a bias, or the gradient of one, if any.
  Term vector(PyObject* tensor) {
    if (tensor == nullptr || tensor == Py_None) return {};
    if (!is_contiguous(tensor)) tensor = keep(invoke(tensor, names().contiguous.get()));
    return {address(tensor), 0, false, dtype_of(tensor)};
  }

  void describe(cpu::Channels& p) const {
    p.rows = rows();
    p.cols = channels_;
    p.rows_per_sample = positions_;
  }

 private:
  PyObject* keep(Ref copy) {
    kept_.push_back(std::move(copy));
    return kept_.back().get();
  }

  int64_t batches_, channels_, positions_ = 1;
  std::vector<Ref> kept_;
};

class ChannelsForwardCall {
 public:
  explicit ChannelsForwardCall(const ChannelsForwardArguments& a) : layout_(a.x) {
    const DType out_dtype = dtype(a.out_dtype);
    p.rms = flag(a.rms);
    p.eps = number(a.eps);
    p.compute = dtype_of(a.x) == DType::f64 ? DType::f64 : DType::f32;
    if (flag(a.save_stats)) {
      rstd_ = new_vector(a.x, layout_.rows(), p.compute);
      if (!p.rms) mean_ = empty_like(rstd_.get(), p.compute);
    }
    z_ = empty_like(a.x, out_dtype);
    if (is_empty()) return;
    layout_.describe(p);
    p.weight = layout_.vector(a.weight);
    p.bias = layout_.vector(a.bias);
    p.x = layout_.planes(a.x);
    p.z = layout_.fresh(z_, out_dtype);
    if (mean_) p.mean = address(mean_.get());
    if (rstd_) p.rstd = address(rstd_.get());
  }

  bool is_empty() const { return layout_.is_empty(); }
  PyObject* outputs() const { return pack(z_, mean_, rstd_); }

  cpu::ChannelsForward p;

 private:
  ChannelLayout layout_;
  Ref z_, mean_, rstd_;
};

class ChannelsBackwardCall {
 public:
  explicit ChannelsBackwardCall(const ChannelsBackwardArguments& a) : layout_(a.x) {
    PyObject* const likes[] = {a.x, a.weight, a.bias};
    for (int i = 0; i < 3; ++i) {
      const bool wanted = flag(Ref(PySequence_GetItem(a.output_mask, i)).get());
      if (likes[i] == Py_None || !wanted) continue;
      gradients_[i] = empty_like(likes[i], dtype_of(likes[i]));
      if (is_empty()) invoke(gradients_[i].get(), names().zero.get());
    }
    if (is_empty()) return;
    layout_.describe(p);
    p.rms = a.mean == Py_None;
    p.compute = dtype_of(a.rstd);
    p.weight = layout_.vector(a.weight);
    p.dz = layout_.planes(a.dz);
    p.x = layout_.planes(a.x);
    p.mean = address(a.mean);
    p.rstd = address(a.rstd);
    p.dx = layout_.fresh(gradients_[0], p.x.dtype);
    terms.dweight = layout_.vector(gradients_[1].get());
    terms.dbias = layout_.vector(gradients_[2].get());
  }

  bool is_empty() const { return layout_.is_empty(); }
  PyObject* outputs() const { return pack(gradients_[0], gradients_[1], gradients_[2]); }

  cpu::ChannelsBackward p;
  cpu::Terms terms;

 private:
  ChannelLayout layout_;
  Ref gradients_[3];  // of x, weight and bias
};

}  // namespace fusednorm
