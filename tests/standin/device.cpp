// An accelerator for tests: tensors of the device `standin` lie in the memory of the CPU.
//
// Every operation is carried out by the CPU's kernel, on tensors that share the memory. What makes
// it an accelerator is what torch makes of it: tensors are not `is_cpu`, backward passes run on a
// thread of the device, operations refuse operands on the CPU, and to read a number is to wait,
// which is counted.

#include <ATen/autocast_mode.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <atomic>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using c10::DataPtr, c10::Device, c10::DeviceIndex, c10::DeviceType, c10::DispatchKey;
using c10::DispatchKeySet, c10::IValue, c10::Storage, c10::StorageImpl, c10::Stream;
using c10::TensorImpl, at::Tensor, std::optional;

const Device OURS(DeviceType::PrivateUse1, 0), CPU(DeviceType::CPU);

std::atomic<int64_t> operations{0}, waits{0};

bool is_ours(const Tensor& t) { return t.device().type() == DeviceType::PrivateUse1; }

// -- what torch wants to know of a device ----------------------------------------------------------

// Streams have numbers only: each operation is done when it is called.
const Stream FIRST{Stream::DEFAULT, OURS};
thread_local Stream current = FIRST;
std::atomic<int64_t> streams{0};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::PrivateUse1; }
  Device exchangeDevice(Device) const override { return OURS; }
  Device getDevice() const override { return OURS; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return current; }
  Stream getNewStream(Device, int) const override {
    return Stream(Stream::UNSAFE, OURS, ++streams);
  }
  Stream getDefaultStream(Device) const override { return FIRST; }
  Stream exchangeStream(Stream stream) const noexcept override {
    return std::exchange(current, stream);
  }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  void init() const override {}
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void*) const override { return false; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
};

struct Allocator final : c10::Allocator {
  DataPtr allocate(size_t n) override {
    auto* kept = new DataPtr(c10::GetAllocator(DeviceType::CPU)->allocate(n));
    return DataPtr(kept->get(), kept, [](void* p) { delete static_cast<DataPtr*>(p); }, OURS);
  }
  void copy_data(void* to, const void* from, size_t n) const override {
    default_copy_data(to, from, n);
  }
};

Allocator allocator;

const bool registered = [] {
  c10::SetAllocator(DeviceType::PrivateUse1, &allocator);
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

// -- the same memory on both devices ---------------------------------------------------------------

DataPtr memory_of(const Storage& storage, Device device) {
  auto* kept = new Storage(storage);
  auto* data = const_cast<void*>(storage.data());
  return DataPtr(data, kept, [](void* p) { delete static_cast<Storage*>(p); }, device);
}

Storage storage_over(const Storage& storage, Device device) {
  return Storage(c10::make_intrusive<StorageImpl>(
      StorageImpl::use_byte_size_t(), storage.nbytes(), memory_of(storage, device),
      c10::GetAllocator(device.type()), true));
}

Tensor tensor_over(Storage storage, const Tensor& like, DispatchKey key) {
  auto made = at::detail::make_tensor<TensorImpl>(
      std::move(storage), DispatchKeySet(key), like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_storage_offset(like.storage_offset());
  impl->set_sizes_and_strides(like.sizes(), like.strides());
  return made;
}

// The tensors of one operation on the CPU, and what they stand for.
class Call {
 public:
  bool ours = false;    // whether an operand is on this device
  bool others = false;  // whether one that is no number is on the CPU

  Tensor on_cpu(const Tensor& t) {
    if (!t.defined()) return t;
    if (!is_ours(t)) {
      others |= t.is_cpu() && t.dim() > 0;
      return t;
    }
    TORCH_CHECK_NOT_IMPLEMENTED(
        t.layout() == at::kStrided && !t.is_complex(), "standin: dense real tensors only");
    ours = true;
    auto* key = t.storage().unsafeGetStorageImpl();
    auto found = below_.find(key);
    if (found == below_.end()) {
      found = below_.emplace(key, storage_over(t.storage(), CPU)).first;
      above_.emplace(found->second.unsafeGetStorageImpl(), t.storage());
    }
    auto made = tensor_over(Storage(found->second), t, DispatchKey::CPU);
    if (t.unsafeGetTensorImpl()->is_wrapped_number())
      made.unsafeGetTensorImpl()->set_wrapped_number(true);
    operands_.emplace_back(made, t);
    return made;
  }

  Tensor on_device(const Tensor& t) {
    if (!t.defined() || !t.is_cpu() || t.layout() != at::kStrided) return t;
    for (auto& [cpu, original] : operands_)
      if (cpu.is_same(t)) return original;
    auto* key = t.storage().unsafeGetStorageImpl();
    auto found = above_.find(key);  // a view of an operand
    if (found == above_.end())
      found = above_.emplace(key, storage_over(t.storage(), OURS)).first;
    return tensor_over(Storage(found->second), t, DispatchKey::PrivateUse1);
  }

  // Operations may give their operands other memory and other sizes: `resize_`, `out=`.
  void write_back() {
    for (auto& [cpu, original] : operands_) {
      auto* from = cpu.storage().unsafeGetStorageImpl();
      auto* to = original.storage().unsafeGetStorageImpl();
      if (from->data() != to->data() || from->nbytes() != to->nbytes()) {
        to->set_data_ptr_noswap(memory_of(cpu.storage(), OURS));
        to->set_nbytes(from->nbytes());
      }
      auto* impl = original.unsafeGetTensorImpl();
      if (cpu.sizes() != original.sizes() || cpu.strides() != original.strides()) {
        impl->set_storage_offset(cpu.storage_offset());
        impl->set_sizes_and_strides(cpu.sizes(), cpu.strides());
      }
    }
  }

 private:
  std::map<StorageImpl*, Storage> below_, above_;
  std::vector<std::pair<Tensor, Tensor>> operands_;
};

// -- operations ------------------------------------------------------------------------------------

// These take indices from the CPU, as they do on CUDA.
const std::set<std::string> MIXED{
    "aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put"};
// The host waits for what these find.
const std::set<std::string> WAITING{
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal",
    "aten::_unique2", "aten::unique_dim", "aten::repeat_interleave.Tensor"};

template <class F>
IValue each_tensor(const IValue& value, F change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    auto tensors = value.toTensorVector();
    for (auto& t : tensors) t = change(t);
    return tensors;
  }
  if (value.isOptionalTensorList()) {
    c10::List<optional<Tensor>> tensors;
    for (const auto& t : value.toOptionalTensorVector())
      tensors.push_back(t ? optional<Tensor>(change(*t)) : std::nullopt);
    return tensors;
  }
  return value;
}

void carried_out_on_cpu(
    const c10::OperatorHandle& operation, DispatchKeySet, torch::jit::Stack* stack) {
  const auto name = toString(operation.operator_name());
  Call call;
  bool made_here = false;
  const auto first = stack->size() - operation.schema().arguments().size();
  for (auto i = first; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isDevice() && value.toDevice().type() == OURS.type()) {
      made_here = true;
      value = CPU;
    } else {
      value = each_tensor(value, [&](const Tensor& t) { return call.on_cpu(t); });
    }
  }
  ++operations;
  waits += WAITING.count(name);
  TORCH_CHECK(
      !call.ours || !call.others || MIXED.count(name),
      "Expected all tensors to be on the same device, but found at least two devices, ", OURS,
      " and cpu! (", name, ")");
  if (operation.hasKernelForDispatchKey(DispatchKey::CPU))
    operation.callBoxedForDispatchKey(DispatchKey::CPU, *stack);
  else
    operation.callBoxed(*stack);
  call.write_back();
  if (!call.ours && !made_here) return;
  const auto results = stack->size() - operation.schema().returns().size();
  for (auto i = results; i < stack->size(); ++i)
    (*stack)[i] = each_tensor((*stack)[i], [&](const Tensor& t) { return call.on_device(t); });
}

Tensor copied(const Tensor& from, const Tensor& to, bool non_blocking) {
  Call call;
  // Of what it copies to the device, CUDA waits for all that was asked for before, unless told not
  // to.
  waits += is_ours(from) != is_ours(to) && !(non_blocking && is_ours(to));
  call.on_cpu(to).copy_(call.on_cpu(from));
  return to;
}

Tensor& placed(
    Tensor& self, Storage storage, int64_t offset, at::IntArrayRef sizes, at::IntArrayRef strides) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset);
  if (strides.size() == sizes.size())
    impl->set_sizes_and_strides(sizes, strides);
  else
    impl->set_sizes_contiguous(sizes);
  return self;
}

Tensor& placed_whole(Tensor& self, Storage storage) {
  const auto n = static_cast<int64_t>(storage.nbytes() / self.dtype().itemsize());
  return placed(self, std::move(storage), 0, {n}, {});
}

Tensor& placed_as(Tensor& self, const Tensor& other) {
  return placed(self, other.storage(), other.storage_offset(), other.sizes(), other.strides());
}

using Ints = c10::SymIntArrayRef;

Tensor convolution(
    const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, Ints stride, Ints padding,
    Ints dilation, bool transposed, Ints output_padding, c10::SymInt groups) {
  Call call;
  ++operations;
  const auto b = bias ? optional<Tensor>(call.on_cpu(*bias)) : std::nullopt;
  return call.on_device(at::convolution_symint(
      call.on_cpu(x), call.on_cpu(weight), b, stride, padding, dilation, transposed,
      output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& x, const Tensor& weight, Ints stride, Ints padding,
    Ints dilation, bool transposed, Ints output_padding, c10::SymInt groups,
    std::array<bool, 3> wanted) {
  Call call;
  ++operations;
  const c10::SymInt channels = transposed ? weight.sym_size(1) * groups : weight.sym_size(0);
  auto [a, b, c] = at::convolution_backward_symint(
      call.on_cpu(gradient), call.on_cpu(x), call.on_cpu(weight), Ints(channels), stride, padding,
      dilation, transposed, output_padding, groups, wanted);
  return {call.on_device(a), call.on_device(b), call.on_device(c)};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&carried_out_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  // Beside their kernels, these have compositions of others, which do not fit all layouts.
  for (const auto* name : {"native_group_norm", "native_group_norm_backward", "native_dropout"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&carried_out_on_cpu>());
  m.impl("_copy_from", &copied);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  m.impl("set_.source_Storage_storage_offset", &placed);
  m.impl("set_.source_Storage", &placed_whole);
  m.impl("set_.source_Tensor", &placed_as);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define WIDER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(WIDER)
}

// Functions that extensions in C++ bring, whose backward does what torch asks it not to. Each is x in
// the forward pass, times two.

using torch::autograd::AutogradContext, torch::autograd::variable_list;

template <typename Self>
struct Twice : torch::autograd::Function<Self> {
  static Tensor forward(AutogradContext* context, const Tensor& x) {
    context->save_for_backward({x});
    return x * 2;
  }
};

struct MixesWithoutNaN : Twice<MixesWithoutNaN> {
  static variable_list backward(AutogradContext*, variable_list grads) {
    return {grads[0] * 2 - grads[0].sum(0, true).nan_to_num()};
  }
};

struct WritesIntoItsGradient : Twice<WritesIntoItsGradient> {
  static variable_list backward(AutogradContext*, variable_list grads) {
    return {grads[0].mul_(2)};
  }
};

struct ReturnsOneBuffer : Twice<ReturnsOneBuffer> {
  static variable_list backward(AutogradContext*, variable_list grads) {
    static Tensor buffer = at::empty_like(grads[0]);
    return {at::mul_out(buffer, grads[0], at::full_like(grads[0], 2))};
  }
};

struct AccumulatesItself : Twice<AccumulatesItself> {
  static variable_list backward(AutogradContext* context, variable_list grads) {
    context->get_saved_variables()[0].mutable_grad() = grads[0] * 2;
    return {Tensor()};
  }
};

TORCH_LIBRARY(standin, m) {
  m.def("mixes", [](const Tensor& x) { return MixesWithoutNaN::apply(x); });
  m.def("writes", [](const Tensor& x) { return WritesIntoItsGradient::apply(x); });
  m.def("buffered", [](const Tensor& x) { return ReturnsOneBuffer::apply(x); });
  m.def("accumulates", [](const Tensor& x) { return AccumulatesItself::apply(x); });
  m.def("operations", []() -> int64_t { return operations.load(); });
  m.def("waits", []() -> int64_t { return waits.load(); });
}

}  // namespace
