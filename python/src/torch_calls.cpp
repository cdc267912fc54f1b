#include "torch_calls.hpp"

#include <dlfcn.h>

namespace deep_ep::python {

namespace {

TorchCalls& calls() {
  static auto* all = new TorchCalls;  // tensors may go when the process ends
  return *all;
}
bool found = false;

template <class Function>
bool look_up(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  return function != nullptr;
}

}  // namespace

void TorchOwner::operator()(void*) const {
  if (nb::is_alive()) (void)calls().delete_(tensor);
}

const TorchCalls* TorchCalls::get() { return found ? &calls() : nullptr; }

bool TorchCalls::load(const std::string& path) {
  if (found) return true;
  // Not what is not loaded: whose symbols these are, is the torch that Python has imported. A
  // handle's symbols include those of the libraries that it needs. It stays open.
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  found = library != nullptr && calls().find(library);
  return found;
}

bool TorchCalls::find(void* library) {
  constexpr const char* kDTypeNames[kDTypes] = {
      "aoti_torch_dtype_uint8",    "aoti_torch_dtype_bool",         "aoti_torch_dtype_int32",
      "aoti_torch_dtype_int64",    "aoti_torch_dtype_float32",      "aoti_torch_dtype_float16",
      "aoti_torch_dtype_bfloat16", "aoti_torch_dtype_float8_e4m3fn"};
  std::int32_t (*number)() = nullptr;
  for (int i = 0; i < kDTypes; ++i) {
    if (!look_up(library, kDTypeNames[i], number)) return false;
    dtypes_[i] = number();
  }
  if (!look_up(library, "aoti_torch_device_type_cpu", number)) return false;
  cpu_ = number();
  if (!look_up(library, "aoti_torch_device_type_cuda", number)) return false;
  cuda_ = number();
  (void)look_up(library, "cudaStreamIsCapturing", stream_is_capturing_);
  (void)look_up(library, "aoti_torch_get_current_cuda_stream", current_stream_);
  // The last is C++: THPVariable_Wrap(const at::TensorBase&), of which an at::Tensor is one.
  return look_up(library, "aoti_torch_empty_strided", empty_strided_) &&
         look_up(library, "aoti_torch__alloc_from_pool", alloc_from_pool_) &&
         look_up(library, "aoti_torch_get_data_ptr", get_data_ptr_) &&
         look_up(library, "aoti_torch_delete_tensor_object", delete_) &&
         look_up(library, "_Z16THPVariable_WrapRKN2at10TensorBaseE", wrap_);
}

bool TorchCalls::is_outside_capture(void* stream) const {
  // The legacy stream cannot be captured, and asking about it disturbs other captures.
  if (stream == nullptr) return true;
  int status = 0;  // cudaStreamCaptureStatusNone
  return stream_is_capturing_ != nullptr && stream_is_capturing_(stream, &status) == 0 &&
         status == 0;
}

std::shared_ptr<void> TorchCalls::allocate(std::int64_t bytes, int device) const {
  const std::int64_t stride = 1;
  const bool on_gpu = device >= 0;
  Handle block = nullptr;
  if (empty_strided_(1, &bytes, &stride, dtypes_[static_cast<int>(DType::kUint8)],
                     on_gpu ? cuda_ : cpu_, on_gpu ? device : 0, &block) != 0)
    return nullptr;
  void* data = nullptr;
  if (get_data_ptr_(block, &data) != 0 || data == nullptr) {
    (void)delete_(block);
    return nullptr;
  }
  return {data, TorchOwner{block}};
}

nb::object TorchCalls::object(const TorchOwner& owner, const Tensor& tensor) const {
  const std::int64_t offset =
      static_cast<std::byte*>(tensor.data) - static_cast<std::byte*>(tensor.owner().get());
  Handle made = nullptr;
  if (alloc_from_pool_(owner.tensor, offset, dtypes_[static_cast<int>(tensor.dtype)], tensor.ndim,
                       tensor.shape.data(), tensor.strides.data(), &made) != 0)
    throw std::runtime_error("torch made no tensor of a result");
  PyObject* object = wrap_(made);
  (void)delete_(made);
  if (object == nullptr) throw nb::python_error();
  return nb::steal(object);
}

}  // namespace deep_ep::python
