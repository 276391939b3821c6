// Wakes a thread that polls descriptors. Any thread.
#pragma once

#include "cpp/descriptor.h"

namespace pccheck {

class Wake {
 public:
  Wake();  // throws std::system_error

  void ring() noexcept;
  void clear() noexcept;  // by whoever polls, before looking for what to do

  int descriptor() const { return event_.get(); }  // readable from a ring() to the next clear()

 private:
  Descriptor event_;
};

}  // namespace pccheck
