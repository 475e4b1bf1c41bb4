// Uninitialised memory on a cache line boundary, given back at the end of the scope.
//
// Small pieces come from a block that each thread keeps, one on top of the other: a call on a small batch would
// otherwise spend most of its time in malloc. So buffers of one thread must end in the reverse order of their
// beginning, which local variables and members do by themselves.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace e2cm {

class Arena {
 public:
  static constexpr size_t kSize = size_t{1} << 19;
  static constexpr std::align_val_t kLine{64};

  static Arena& of_this_thread() {
    static thread_local Arena arena;
    return arena;
  }
  ~Arena() { ::operator delete(base_, kLine); }

  // Null if it does not fit.
  void* take(size_t bytes) {
    if (bytes > kSize - used_) return nullptr;
    if (!base_) base_ = static_cast<char*>(::operator new(kSize, kLine));
    void* const piece = base_ + used_;
    used_ += bytes;
    return piece;
  }
  void give_back(size_t bytes) { used_ -= bytes; }

 private:
  char* base_ = nullptr;
  size_t used_ = 0;
};

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : bytes_((static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64),
        arena_(Arena::of_this_thread()),
        small_(arena_.take(bytes_)),
        memory_(small_ ? small_ : ::operator new(bytes_, Arena::kLine)) {}
  ~Buffer() {
    if (small_)
      arena_.give_back(bytes_);
    else
      ::operator delete(memory_, Arena::kLine);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return static_cast<T*>(memory_); }
  T& operator[](int64_t i) const { return get()[i]; }

 private:
  const size_t bytes_;
  Arena& arena_;
  void* const small_;
  void* const memory_;
};

}  // namespace e2cm
