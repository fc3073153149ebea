// Threads that work together. PyTorch's own, so that no second pool of threads waits for work on the same processors.

#pragma once

#include <cstdint>

// Calls `task(context, thread)` for each thread, and returns when all have ended; op.cpp hands them to PyTorch.
void start_threads(int64_t threads, void (*task)(void* context, int64_t thread), void* context);

// Calls `task(thread)` for each thread.
template <class Task>
void run_threads(int64_t threads, Task task) {
  if (threads == 1) return task(0);
  start_threads(threads, [](void* context, int64_t thread) { (*static_cast<Task*>(context))(thread); }, &task);
}
