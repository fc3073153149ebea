// Registers the ops in codes for the CPU by PyTorch's stable interface, so that no Python runs in a call, and lends the
// kernels PyTorch's threads.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <stdexcept>
#include <string>

#include "coded.h"
#include "pool.h"

namespace {

void check(AOTITorchError error) {
  if (error) throw std::runtime_error("PyTorch could not serve an op of tardis");
}

// A reference to a tensor, given up at the end.
struct Tensor {
  AtenTensorHandle handle = nullptr;

  Tensor() = default;
  explicit Tensor(StableIValue value) : handle(reinterpret_cast<AtenTensorHandle>(value)) {}
  Tensor(const Tensor&) = delete;
  ~Tensor() {
    if (handle) aoti_torch_delete_tensor_object(handle);
  }
  int64_t dim() const {
    int64_t dim;
    check(aoti_torch_get_dim(handle, &dim));
    return dim;
  }
  const int64_t* sizes() const {
    int64_t* sizes;
    check(aoti_torch_get_sizes(handle, &sizes));
    return sizes;
  }
  int32_t dtype() const {
    int32_t dtype;
    check(aoti_torch_get_dtype(handle, &dtype));
    return dtype;
  }
  void* data() const {
    void* data;
    check(aoti_torch_get_data_ptr(handle, &data));
    return data;
  }
};

// x, what is prepared, d_out -> the output
template <Coded* OP>
void run(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x(stack[0]), prepared(stack[1]);
  const int64_t d_out = static_cast<int64_t>(stack[2]);
  const int64_t dim = x.dim();
  const int64_t* const sizes = x.sizes();
  int64_t shape[64], strides[64], count = 1;
  if (dim < 1 || dim > 64) throw std::runtime_error("an op of tardis takes x of 1 to 64 axes");
  for (int64_t i = dim - 1, stride = 1; i >= 0; --i) {
    shape[i] = i == dim - 1 ? d_out : sizes[i];
    strides[i] = stride;
    stride *= std::max<int64_t>(shape[i], 1);
    if (i < dim - 1) count *= sizes[i];
  }
  Tensor out, copy;
  const int32_t dtype = x.dtype(), cpu = aoti_torch_device_type_cpu();
  check(aoti_torch_empty_strided(dim, shape, strides, dtype, cpu, 0, &out.handle));
  bool contiguous;
  check(aoti_torch_is_contiguous(x.handle, &contiguous));
  if (!contiguous) {
    for (int64_t i = dim - 1, stride = 1; i >= 0; stride *= std::max<int64_t>(sizes[i--], 1)) strides[i] = stride;
    check(aoti_torch_empty_strided(dim, sizes, strides, dtype, cpu, 0, &copy.handle));
    check(aoti_torch_copy_(copy.handle, x.handle, 0));
  }
  const int32_t dtypes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16(),
                            aoti_torch_dtype_float64()};
  const int64_t number = std::find(std::begin(dtypes), std::end(dtypes), dtype) - std::begin(dtypes);
  uint32_t threads;
  check(torch_get_num_threads(&threads));
  bool whole;
  check(aoti_torch_is_contiguous(prepared.handle, &whole));
  if (prepared.dim() != 1 || prepared.dtype() != aoti_torch_dtype_uint8() || !whole ||
      OP(static_cast<const uint8_t*>(prepared.data()), prepared.sizes()[0], (contiguous ? x : copy).data(), out.data(), count,
         sizes[dim - 1], d_out, number, threads))
    throw std::runtime_error("an op of tardis takes x, and a prepared site of its dtype, with " + std::to_string(sizes[dim - 1]) +
                             " columns and an output of " + std::to_string(d_out));
  stack[0] = reinterpret_cast<StableIValue>(out.handle);
  out.handle = nullptr;
}

}  // namespace

void start_threads(int64_t threads, void (*task)(void* context, int64_t thread), void* context) {
  struct Work {
    void (*task)(void* context, int64_t thread);
    void* context;
  } work = {task, context};
  const auto run = [](int64_t begin, int64_t end, void* of) {
    const Work* const work = static_cast<Work*>(of);
    for (int64_t thread = begin; thread < end; ++thread) work->task(work->context, thread);
  };
  check(torch_parallel_for(0, threads, 1, run, &work));
}

namespace {
TorchLibraryHandle library = nullptr;
}

// Makes PyTorch call this library for tensors on the CPU, or no longer.
extern "C" void tardis_register() {
  check(aoti_torch_library_init_impl("tardis", "CPU", __FILE__, __LINE__, &library));
  check(aoti_torch_library_impl(library, "coded_ffn", run<tardis_coded_ffn>));
  check(aoti_torch_library_impl(library, "coded_linear", run<tardis_coded_linear>));
}

extern "C" void tardis_unregister() {
  if (library) check(aoti_torch_delete_library_object(library));
  library = nullptr;
}
