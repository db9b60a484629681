// Tensors and arguments as the dispatcher hands them to a boxed kernel, through torch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "spacing.h"

namespace fusednorm::boxed {

struct Delete {
  void operator()(AtenTensorHandle tensor) const { aoti_torch_delete_tensor_object(tensor); }
};
using Tensor = std::unique_ptr<AtenTensorOpaque, Delete>;

// dtypes by DType, as torch numbers them; 'none' has none.
inline int32_t code(DType dtype) {
  static const int32_t codes[] = {-1, aoti_torch_dtype_float16(), aoti_torch_dtype_bfloat16(),
                                  aoti_torch_dtype_float32(), aoti_torch_dtype_float64()};
  return codes[int(dtype)];
}

// Returns none for a dtype that the kernels do not have.
inline DType dtype(int32_t number) {
  for (DType dtype : {DType::f16, DType::bf16, DType::f32, DType::f64})
    if (code(dtype) == number) return dtype;
  return DType::none;
}

inline DType dtype_of(AtenTensorHandle tensor) {
  int32_t number;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &number));
  return dtype(number);
}

inline bool is_half(DType dtype) { return dtype == DType::f16 || dtype == DType::bf16; }

inline void* address(AtenTensorHandle tensor) {
  void* data = nullptr;
  if (tensor) TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &data));
  return data;
}

inline bool is_on_cpu(AtenTensorHandle tensor) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &type));
  return type == aoti_torch_device_type_cpu();
}

inline bool is_contiguous(AtenTensorHandle tensor) {
  bool contiguous;
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(tensor, &contiguous));
  return contiguous;
}

// A tensor's sizes, or strides; lives no longer than the tensor.
struct Span {
  const int64_t* data = nullptr;
  int64_t count = 0;

  int64_t operator[](int64_t i) const { return data[i]; }
  bool operator==(const Span& other) const {
    return count == other.count && std::equal(data, data + count, other.data);
  }
  Span first(int64_t n) const { return {data, n}; }
  Span last(int64_t n) const { return {data + count - n, n}; }
  int64_t product() const {
    int64_t result = 1;
    for (int64_t i = 0; i < count; ++i) result *= data[i];
    return result;
  }
};

inline Span sizes(AtenTensorHandle tensor) {
  int64_t* data;
  Span span;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &data));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &span.count));
  span.data = data;
  return span;
}

inline Span strides(AtenTensorHandle tensor) {
  int64_t* data;
  Span span;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &data));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &span.count));
  span.data = data;
  return span;
}

// The most dimensions that the kernels serve: torch's own operators have no more.
constexpr int64_t max_dims = 64;

// Sizes or strides that are made here, without memory from the heap.
struct Dims {
  int64_t data[max_dims];
  int64_t count;

  operator Span() const { return {data, count}; }
};

inline Dims contiguous_strides(Span sizes) {
  Dims strides;
  strides.count = sizes.count;
  int64_t distance = 1;
  for (int64_t i = sizes.count - 1; i >= 0; --i) {
    strides.data[i] = distance;
    distance *= std::max<int64_t>(sizes[i], 1);
  }
  return strides;
}

struct Device {
  int32_t type = aoti_torch_device_type_cpu(), index = 0;

  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

inline Device device_of(AtenTensorHandle tensor) {
  Device device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &device.type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor, &device.index));
  return device;
}

// Allocates a contiguous tensor, past the dispatcher.
inline Tensor empty(Span sizes, DType dtype, Device device = {}) {
  AtenTensorHandle tensor;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.count, sizes.data,
                                                  contiguous_strides(sizes).data, code(dtype),
                                                  device.type, device.index, &tensor));
  return Tensor(tensor);
}

inline Tensor undefined() {
  AtenTensorHandle tensor;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_uninitialized_tensor(&tensor));
  return Tensor(tensor);
}

inline Tensor contiguous(AtenTensorHandle tensor, DType dtype) {
  Tensor copy = empty(sizes(tensor), dtype, device_of(tensor));
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy.get(), tensor, 0));
  return copy;
}

// The values on a stack: arguments, which it owns until they are handed on, then results.
//
// `kinds` names the arguments: (t)ensor, (i)nt, int(s), (f)loat, (b)ool, (d)type and bool(m)ask; a
// capital letter is an optional one.
class Stack {
 public:
  Stack(StableIValue* values, const char* kinds) : values_(values), kinds_(kinds) {}
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  ~Stack() { release(); }

  const char* kinds() const { return kinds_; }

  bool has(int i) const { return kinds_[i] >= 'a' || values_[i] != 0; }

  // The value of an argument that is there.
  template <class T>
  T get(int i) const {
    return torch::stable::detail::to<T>(kinds_[i] >= 'a' ? values_[i] : *inner(i));
  }

  // Null for one that is absent or undefined.
  AtenTensorHandle tensor(int i) const {
    if (!has(i)) return nullptr;
    const auto tensor = get<AtenTensorHandle>(i);
    bool defined;
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_defined(tensor, &defined));
    return defined ? tensor : nullptr;
  }

  int64_t count(int i) const {
    size_t count;
    TORCH_ERROR_CODE_CHECK(torch_list_size(get<StableListHandle>(i), &count));
    return count;
  }

  template <class T>
  T item(int i, int64_t k) const {
    StableIValue value;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(get<StableListHandle>(i), k, &value));
    return torch::stable::detail::to<T>(value);
  }

  // None for one that is absent.
  DType dtype(int i) const {
    if (!has(i)) return DType::none;
    const DType found = boxed::dtype(get<int32_t>(i));
    if (found == DType::none)
      throw std::runtime_error("fusednorm: a dtype that the kernels do not have");
    return found;
  }

  // Whether an argument is a list of the last of these sizes, and not an empty one.
  bool is_end_of(int list, Span sizes) const {
    const int64_t length = count(list);
    if (length == 0 || length > sizes.count) return false;
    for (int64_t i = 0; i < length; ++i)
      if (item<int64_t>(list, i) != sizes[sizes.count - length + i]) return false;
    return true;
  }

  // Takes a tensor from the stack; null for one that is absent.
  Tensor take(int i) {
    if (!has(i)) return nullptr;
    Tensor tensor(get<AtenTensorHandle>(i));
    if (kinds_[i] < 'a') delete inner(i);
    values_[i] = 0;
    taken_ |= 1u << i;
    return tensor;
  }

  // Deletes the arguments and puts results in their place; one that is null is undefined.
  template <class Results>
  void finish(Results&& results) {
    for (Tensor& result : results)
      if (!result) result = undefined();
    release();
    int i = 0;
    for (Tensor& result : results) values_[i++] = torch::stable::detail::from(result.release());
  }

 private:
  void release() {
    if (released_) return;
    released_ = true;
    for (int i = 0; kinds_[i]; ++i) {
      if (!has(i) || taken_ >> i & 1) continue;
      const char kind = kinds_[i] | 0x20;
      if (kind == 't') aoti_torch_delete_tensor_object(get<AtenTensorHandle>(i));
      if (kind == 's' || kind == 'm') torch_delete_list(get<StableListHandle>(i));
      if (kinds_[i] < 'a') delete inner(i);
    }
  }

  StableIValue* inner(int i) const { return torch::stable::detail::to<StableIValue*>(values_[i]); }

  StableIValue* values_;
  const char* kinds_;
  uint32_t taken_ = 0;
  bool released_ = false;
};

// Tensors of shape [*leading, *normalized_shape] as rows. What it has to copy lives as long.
class Layout {
 public:
  using Tensor = AtenTensorHandle;
  using Owned = boxed::Tensor;
  using Shape = int64_t;  // the number of normalised dimensions

  static void* address(Tensor tensor) { return boxed::address(tensor); }
  static DType dtype_of(Tensor tensor) { return boxed::dtype_of(tensor); }
  static int64_t size(Tensor tensor, int dim) { return sizes(tensor)[dim]; }
  static void zero(Tensor tensor) { TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(tensor)); }
  static Owned empty_like(Tensor tensor, DType dtype) {
    return empty(sizes(tensor), dtype, device_of(tensor));
  }
  static Owned new_vector(Tensor like, int64_t elements, DType dtype) {
    return empty({&elements, 1}, dtype, device_of(like));
  }

  Layout(AtenTensorHandle tensor, int64_t normalized_dims)
      : leading_(sizes(tensor).count - normalized_dims),
        rows_(sizes(tensor).first(leading_).product()),
        cols_(sizes(tensor).last(normalized_dims).product()) {}

  int64_t row_count() const { return rows_; }
  int64_t cols() const { return cols_; }
  bool is_empty() const { return rows_ == 0 || cols_ == 0; }

  // Absent for null; copied where rows cannot be described as they lie.
  Rows rows(AtenTensorHandle tensor) {
    if (tensor == nullptr) return {};
    Rows found{nullptr, cols_, dtype_of(tensor)};
    const Span size = sizes(tensor), stride = strides(tensor);
    if (!is_contiguous(tensor) &&
        !find_spacing(size.data, stride.data, size.count, leading_, found)) {
      tensor = keep(contiguous(tensor, found.dtype));
      found = {nullptr, cols_, found.dtype};
    }
    found.data = address(tensor);
    return found;
  }

  // Rows that have just been allocated, or none.
  Rows fresh(const Owned& tensor, DType dtype) const {
    if (!tensor) return {};
    return {address(tensor.get()), cols_, dtype};
  }

  // A weight, a bias or the gradient of one.
  Term vector(AtenTensorHandle tensor) {
    if (tensor == nullptr) return {};
    if (!is_contiguous(tensor)) tensor = keep(contiguous(tensor, dtype_of(tensor)));
    return {address(tensor), 0, false, dtype_of(tensor)};
  }

  // A gate, scale or shift, [1 or S, N or 1].
  Term term(AtenTensorHandle tensor) {
    if (tensor == nullptr) return {};
    const Span size = sizes(tensor);
    const bool is_number = size[1] < cols_;
    if (!is_number && cols_ > 1 && strides(tensor)[1] != 1)
      tensor = keep(contiguous(tensor, dtype_of(tensor)));
    const int64_t distance = size[0] == 1 ? 0 : strides(tensor)[0];
    return {address(tensor), distance, is_number, dtype_of(tensor)};
  }

  AtenTensorHandle keep(Owned copy) {
    kept_.push_back(std::move(copy));
    return kept_.back().get();
  }

 private:
  int64_t leading_, rows_, cols_;
  std::vector<Owned> kept_;
};

}  // namespace fusednorm::boxed
