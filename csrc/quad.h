#pragma once

#include <cstdint>

#include "dispatch.h"

namespace fbk {

// Four neighbours, in one access where memory allows it.
template <class T>
struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) Quad {
  T v[4];
};

// of which the first `count` are there; the others read as zero and are not touched
template <class T>
FBK_INLINE Quad<T> load_quad(const T* from, int64_t count) {
  if (count >= 4 && uintptr_t(from) % alignof(Quad<T>) == 0) return *reinterpret_cast<const Quad<T>*>(from);
  Quad<T> q{};
  for (int i = 0; i < 4; ++i)
    if (i < count) q.v[i] = from[i];
  return q;
}

template <class T>
FBK_INLINE void store_quad(T* to, const Quad<T>& q, int64_t count) {
  if (count >= 4 && uintptr_t(to) % alignof(Quad<T>) == 0) {
    *reinterpret_cast<Quad<T>*>(to) = q;
    return;
  }
  for (int i = 0; i < 4; ++i)
    if (i < count) to[i] = q.v[i];
}

}  // namespace fbk
