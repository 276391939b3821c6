// A block on its way: the slot it is filled in, then written from. Owned by whoever works on it.
#pragma once

#include <deque>
#include <memory>
#include <mutex>

#include "cpp/checkpoint.h"
#include "cpp/staging_pool.h"
#include "cpp/worker.h"

namespace pccheck {

class Block {
 public:
  Block(std::shared_ptr<Checkpoint> of, uint32_t file, uint64_t index, size_t bytes, SlotLease slot)
      : checkpoint(std::move(of)), file(file), index(index), bytes(bytes), slot_(std::move(slot)) {
    checkpoint->block_opened();
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() {
    slot_.release();  // first: whoever hears that the block has gone may count on its slot
    checkpoint->block_gone();
  }

  std::span<std::byte> contents() const { return slot_.bytes().first(bytes); }
  size_t slot() const { return slot_.index(); }

  const std::shared_ptr<Checkpoint> checkpoint;
  const uint32_t file;
  const uint64_t index;
  const size_t bytes;
  size_t filled = 0;        // copied, copies ended
  size_t summed = 0;        // bytes from the front that `crc` covers
  bool in_sequence = true;  // every copy so far began where the one before it ended
  uint32_t crc = 0;

 private:
  SlotLease slot_;
};

// Full blocks, waiting for a writer.
class BlockQueue {
 public:
  // `popped` is rung when a block has been taken out.
  BlockQueue(Doorbell& pushed, Doorbell& popped) : pushed_(pushed), popped_(popped) {}

  void push(std::unique_ptr<Block> block) {
    {
      const std::lock_guard lock(mutex_);
      blocks_.push_back(std::move(block));
    }
    pushed_.ring_for_one();
  }

  std::unique_ptr<Block> try_pop() {
    std::unique_ptr<Block> block;
    {
      const std::lock_guard lock(mutex_);
      if (blocks_.empty()) return nullptr;
      block = std::move(blocks_.front());
      blocks_.pop_front();
    }
    popped_.ring();
    return block;
  }

  size_t waiting() const {
    const std::lock_guard lock(mutex_);
    return blocks_.size();
  }

 private:
  Doorbell& pushed_;
  Doorbell& popped_;
  mutable std::mutex mutex_;  // guards blocks_
  std::deque<std::unique_ptr<Block>> blocks_;
};

}  // namespace pccheck
