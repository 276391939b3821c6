// at::Tensor -> bytes. The only place that looks inside a tensor.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cpp/checkpoint.h"

namespace pccheck::python {

// "F32" for float32 and so on, as safetensors names them. Throws c10::TypeError naming the tensor
// when it is one that cannot be stored: sparse, quantized, a wrapper subclass, of a dtype without a
// name, on a device that has no bytes.
std::string_view safetensors_dtype(const at::Tensor& tensor, const std::string& name);

// A tensor's bytes in order, kept alive: the tensor's own memory where it is contiguous, otherwise
// a contiguous copy made here and now.
class TensorView {
 public:
  TensorView(const at::Tensor& tensor, const std::string& name);

  Source source() const;
  bool is_own_memory() const { return is_own_memory_; }
  std::string_view dtype() const { return dtype_; }  // as safetensors names it
  const at::Tensor& tensor() const { return held_; }

 private:
  std::string_view dtype_;
  at::Tensor held_;  // detached: a Parameter whose .data is swapped does not take these bytes away
  bool is_own_memory_;
};

// The tripwire: version counters as they were at hand-over and, on request, checksums.
class VersionWatch final : public SourceWatch {
 public:
  explicit VersionWatch(bool verify_bytes) : verify_bytes_(verify_bytes) {}

  // A view on a tensor's own memory; `name` must outlive the watch.
  void add(const TensorView& view, const std::string& name);
  std::string changed() const override;

 private:
  struct Watched {
    at::Tensor tensor;
    const std::string* name;
    std::optional<uint32_t> version;  // inference tensors have none
    uint32_t crc;
  };
  const bool verify_bytes_;
  std::vector<Watched> watched_;
};

}  // namespace pccheck::python
