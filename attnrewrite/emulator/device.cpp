// A Metal device for TVM on a machine without one: memory behind opaque handles, and kernels that run where they are
// called. The class below has the layout of tvm::runtime::DeviceAPI in TVM 0.27 (tvm/runtime/device_api.h): virtual
// functions in that order, arguments that are C++ objects passed by address.
#include <dlpack/dlpack.h>

#include "session.h"

using emulator::Buffer;

emulator::Session attnrewrite_emulator_session;

namespace {

constexpr size_t kAlignment = 256;

enum Attribute { kExist, kMaxThreadsPerBlock, kWarpSize, kMaxSharedMemoryPerBlock };

struct Any {
  int32_t type_index;
  uint32_t padding;
  int64_t integer;
};
constexpr int32_t kNone = 0, kInteger = 1;

size_t size_of(const DLTensor& tensor) {
  size_t count = 1;
  for (int i = 0; i < tensor.ndim; ++i) count *= tensor.shape[i];
  return (count * tensor.dtype.bits * tensor.dtype.lanes + 7) / 8;
}

void* zeros(size_t bytes) { return calloc(bytes ? bytes : 1, 1); }

class MetalDevice {
 public:
  virtual void destroy() {}
  virtual void destroy_and_delete() {}
  virtual void set_device(DLDevice) {}
  virtual void attribute(DLDevice, int kind, Any* result) {
    const int64_t values[] = {attnrewrite_emulator_session.exists, 1024, 32, 32768};
    const bool known = kind >= kExist && kind <= kMaxSharedMemoryPerBlock;
    *result = {known ? kInteger : kNone, 0, known ? values[kind] : 0};
  }
  virtual size_t data_size(const DLTensor& tensor, const void*) { return size_of(tensor); }
  virtual void target_property(DLDevice, const void*, Any*) {}
  virtual void* allocate(DLDevice, size_t bytes, size_t, DLDataType) {
    void* memory = nullptr;
    if (posix_memalign(&memory, alignof(Buffer), sizeof(Buffer))) return nullptr;
    Buffer* buffer = static_cast<Buffer*>(memory);
    memset(buffer, 0, sizeof(Buffer));
    buffer->bytes = buffer->extent = bytes;
    if (posix_memalign(&memory, kAlignment, bytes ? bytes : 1)) return nullptr;
    buffer->data = static_cast<char*>(memory);
    memset(buffer->data, 0xff, bytes);  // NaN in every floating-point type
    if (attnrewrite_emulator_session.recording) buffer->written = static_cast<uint8_t*>(zeros(bytes));
    return buffer;
  }
  virtual void* allocate_tensor(DLDevice device, int ndim, const int64_t* shape, DLDataType dtype, const void*) {
    const DLTensor tensor{nullptr, device, ndim, dtype, const_cast<int64_t*>(shape), nullptr, 0};
    return allocate(device, size_of(tensor), kAlignment, dtype);
  }
  virtual void free_space(DLDevice, void* handle) {
    Buffer* buffer = static_cast<Buffer*>(handle);
    free(buffer->data);
    free(buffer->written);
    free(buffer->cells);
    free(buffer);
  }
  virtual void copy_tensor(DLTensor* from, DLTensor* to, void* stream) {
    copy(from->data, from->byte_offset, to->data, to->byte_offset, size_of(*from), from->device, to->device,
         from->dtype, stream);
  }
  virtual void* create_stream(DLDevice) { return nullptr; }
  virtual void free_stream(DLDevice, void*) {}
  virtual void wait_for_stream(DLDevice, void*) {}
  virtual void set_stream(DLDevice, void*) {}
  virtual void* current_stream(DLDevice) { return nullptr; }
  virtual void order_streams(DLDevice, void*, void*) {}
  virtual void* allocate_workspace(DLDevice device, size_t bytes, DLDataType dtype) {
    return allocate(device, bytes, kAlignment, dtype);
  }
  virtual void free_workspace(DLDevice device, void* handle) { free_space(device, handle); }
  virtual bool has_pointer_arithmetic() { return false; }
  virtual void copy(const void* from, size_t from_offset, void* to, size_t to_offset, size_t bytes, DLDevice source,
                    DLDevice target, DLDataType, void*) {
    const Buffer* read = source.device_type == kDLMetal ? static_cast<const Buffer*>(from) : nullptr;
    Buffer* written = target.device_type == kDLMetal ? static_cast<Buffer*>(to) : nullptr;
    const char* begin = (read ? read->data : static_cast<const char*>(from)) + from_offset;
    memcpy((written ? written->data : static_cast<char*>(to)) + to_offset, begin, bytes);
    if (written && written->written) memset(written->written + to_offset, 1, bytes);
  }
};

}  // namespace

// The function that TVM asks for the device by its name `device_api.metal`.
extern "C" int __tvm_ffi_device(void*, const Any*, int32_t, Any* result) {
  static MetalDevice device;
  constexpr int32_t kPointer = 4;
  *result = {kPointer, 0, reinterpret_cast<int64_t>(&device)};
  return 0;
}

// The tensor that lies in a buffer from now on, of so many bytes; a new one holds no values yet.
extern "C" void attnrewrite_emulator_declare(void* handle, int64_t bytes, int32_t is_new) {
  Buffer* buffer = static_cast<Buffer*>(handle);
  buffer->extent = bytes < (int64_t)buffer->bytes ? bytes : buffer->bytes;
  if (is_new && buffer->written) memset(buffer->written, 0, buffer->bytes);
}
