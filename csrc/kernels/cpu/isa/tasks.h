// A loop whose ranges threads take one after another, as they get free: for tasks whose lengths
// differ. Which thread takes a range changes nothing in the results.
#pragma once

#include <cstdint>

namespace sae_fast::SAE_FAST_ISA {

class SharedLoop {
 public:
  // Over [0, size) in ranges of `step`.
  SharedLoop(int64_t size, int64_t step) : size_(size), step_(step) {}

  // Takes the next range, which begins at `first`; returns false if none is left.
  bool take(int64_t& first) {
    first = __atomic_fetch_add(&next_, step_, __ATOMIC_RELAXED);
    return first < size_;
  }

  // The end of the range that begins at `first`.
  int64_t end(int64_t first) const { return first + step_ < size_ ? first + step_ : size_; }

 private:
  int64_t next_ = 0;
  int64_t size_, step_;
};

}  // namespace sae_fast::SAE_FAST_ISA
