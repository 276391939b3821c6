#include "cpp/book.h"

namespace pccheck {

FileDigester::FileDigester(const PayloadFile& file, size_t block_bytes)
    : beginning_bytes_((file.data_begin() / block_bytes + 1) * block_bytes),
      bytes_(file.data_begin()) {
  digester_.update(std::as_bytes(std::span(file.header)));
}

void FileDigester::update(std::span<const std::byte> data) {
  digester_.update(data);
  bytes_ += data.size();
  if (bytes_ == beginning_bytes_) beginning_ = digester_.finish();
}

}  // namespace pccheck
