#include "cpp/writer_pool.h"

#include "cpp/crc32c.h"

namespace pccheck {

bool WriterPool::run_one() noexcept {
  const std::unique_ptr<Block> block = full_.try_pop();
  if (!block) return false;
  Checkpoint& checkpoint = *block->checkpoint;
  if (checkpoint.error()) return true;  // the block is dropped, its slot comes free
  try {
    // What the copier did not sum on the way, a device's copies above all.
    if (block->summed != block->bytes) block->crc = crc32c(0, block->contents());
    checkpoint.write_block(block->file, block->index, block->contents(), block->crc);
  } catch (...) {
    checkpoint.fail(std::current_exception());
  }
  return true;
}

}  // namespace pccheck
