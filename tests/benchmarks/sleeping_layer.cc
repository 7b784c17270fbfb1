// Takes the given time without using a core, then copies its input to its output.
#include <chrono>
#include <cstring>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

static ffi::Error Sleep(ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y, int64_t microseconds) {
  std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
  std::memcpy(y->untyped_data(), x.untyped_data(), x.size_bytes());
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(SleepHandler, Sleep,
                              ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Attr<int64_t>("microseconds"));
