#include "python/tensor_view.h"

#include <c10/core/DispatchKey.h>
#include <c10/util/Exception.h>

#include "cpp/crc32c.h"

namespace pccheck::python {
namespace {

std::string_view name_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return "F64";
    case at::kFloat:
      return "F32";
    case at::kHalf:
      return "F16";
    case at::kBFloat16:
      return "BF16";
    case at::kLong:
      return "I64";
    case at::kInt:
      return "I32";
    case at::kShort:
      return "I16";
    case at::kChar:
      return "I8";
    case at::kByte:
      return "U8";
    case at::kBool:
      return "BOOL";
    case at::kUInt64:
      return "U64";
    case at::kUInt32:
      return "U32";
    case at::kUInt16:
      return "U16";
    case at::kFloat8_e4m3fn:
      return "F8_E4M3";
    case at::kFloat8_e5m2:
      return "F8_E5M2";
    case at::kComplexFloat:
      return "C64";
    default:
      return {};
  }
}

uint32_t sum_of(const at::Tensor& tensor) {
  const at::Tensor host = tensor.contiguous().cpu();
  return crc32c(0, {static_cast<const std::byte*>(host.const_data_ptr()), host.nbytes()});
}

}  // namespace

std::string_view safetensors_dtype(const at::Tensor& tensor, const std::string& name) {
  TORCH_CHECK_TYPE(tensor.defined(), "tensor '", name, "' is undefined");
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided && !tensor.is_quantized(), "tensor '", name,
                   "' is ", tensor.is_quantized() ? "quantized" : "sparse",
                   ", which cannot be checkpointed; convert it to a dense tensor, or leave it out");
  TORCH_CHECK_TYPE(!tensor.key_set().has(c10::DispatchKey::Python) && !tensor.is_meta(), "tensor '",
                   name, "' is a ", tensor.is_meta() ? "meta tensor" : "tensor subclass",
                   " without bytes of its own; save the plain tensors it stands for");
  const std::string_view dtype = name_of(tensor.scalar_type());
  TORCH_CHECK_TYPE(!dtype.empty(), "tensor '", name, "' has dtype ", tensor.scalar_type(),
                   ", which safetensors files cannot hold");
  return dtype;
}

TensorView::TensorView(const at::Tensor& tensor, const std::string& name)
    : dtype_(safetensors_dtype(tensor, name)) {
  is_own_memory_ = tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg();
  held_ = tensor.detach();
  if (!is_own_memory_) held_ = held_.resolve_conj().resolve_neg().contiguous();
}

Source TensorView::source() const {
  return {static_cast<const std::byte*>(held_.const_data_ptr()), held_.nbytes()};
}

void VersionWatch::add(const TensorView& view, const std::string& name) {
  const at::Tensor& tensor = view.tensor();  // detached, but with the original's version counter
  Watched watched{tensor, &name, std::nullopt, 0};
  if (!tensor.is_inference()) watched.version = tensor._version();
  if (verify_bytes_) watched.crc = sum_of(tensor);
  watched_.push_back(std::move(watched));
}

std::string VersionWatch::changed() const {
  for (const Watched& watched : watched_) {
    const bool moved = watched.version && watched.tensor._version() != *watched.version;
    if (moved || (verify_bytes_ && sum_of(watched.tensor) != watched.crc))
      return "tensor '" + *watched.name +
             "' was changed in place while its checkpoint was still reading it; change it before "
             "the optimizer's step, or call wait() first";
  }
  return {};
}

}  // namespace pccheck::python
