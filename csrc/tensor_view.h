// A view of a torch tensor without torch's headers: the part of DLPack's ABI that reading one needs.
//
// From 2.10 on torch.Tensor has `__dlpack_c_exchange_api__`, a capsule with a table of functions. One of them fills a
// DLTensor from a Python object in some tens of nanoseconds, without reference counting: it points to torch's own
// memory, valid for as long as the object lives and is not resized. The names and the layout are those of
// dlpack/dlpack.h, version 1; a table of another major version is not used.
//
// DLPack does not tell whether a tensor is a lazy negative of its memory: that must be asked of torch.
#pragma once

#include <cstdint>

namespace e2cm::dlpack {

struct Version {
  uint32_t major, minor;
};
constexpr uint32_t kMajor = 1;

enum DeviceType : int32_t { kCPU = 1 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Device {
  int32_t type;  // DeviceType
  int32_t id;
};

struct DataType {
  uint8_t code;  // TypeCode
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {  // DLTensor
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeHeader {  // DLPackExchangeAPIHeader
  Version version;
  ExchangeHeader* previous;  // an older table, or null
};

struct Exchange {  // DLPackExchangeAPI
  ExchangeHeader header;
  void (*managed_tensor_allocator)();
  void (*managed_tensor_from_py_object_no_sync)();
  void (*managed_tensor_to_py_object_no_sync)();
  int (*view)(void* object, Tensor* out);  // dltensor_from_py_object_no_sync; 0, or -1 with a Python exception set
  void (*current_work_stream)();
};

constexpr const char* kCapsule = "dlpack_exchange_api";

// The first table in the chain that has this layout and the function that is wanted, or null.
inline const Exchange* usable(const void* table) {
  for (auto header = static_cast<const ExchangeHeader*>(table); header; header = header->previous) {
    if (header->version.major != kMajor) continue;
    const auto exchange = reinterpret_cast<const Exchange*>(header);
    if (exchange->view) return exchange;
  }
  return nullptr;
}

}  // namespace e2cm::dlpack
