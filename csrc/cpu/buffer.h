// Uninitialised memory, aligned to cache lines, for the scope of the object.
//
// Small buffers come from a block that each thread keeps, stacked: a call on a small batch would otherwise spend most
// of its time in malloc. Buffers of a thread must therefore be destroyed in reverse order, as local variables and
// members are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace e2cm {

class Arena {
 public:
  static constexpr size_t kSize = size_t{1} << 19;
  static constexpr std::align_val_t kCacheLine{64};

  static Arena& of_this_thread() {
    static thread_local Arena arena;
    return arena;
  }
  ~Arena() { ::operator delete(base_, kCacheLine); }

  // Null if it does not fit.
  void* allocate(size_t bytes) {
    if (bytes > kSize - used_) return nullptr;
    if (!base_) base_ = static_cast<char*>(::operator new(kSize, kCacheLine));
    void* const piece = base_ + used_;
    used_ += bytes;
    return piece;
  }
  void release(size_t bytes) { used_ -= bytes; }

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
        small_(arena_.allocate(bytes_)),
        memory_(small_ ? small_ : ::operator new(bytes_, Arena::kCacheLine)) {}
  ~Buffer() {
    if (small_)
      arena_.release(bytes_);
    else
      ::operator delete(memory_, Arena::kCacheLine);
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
