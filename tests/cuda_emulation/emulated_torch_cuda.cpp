// Stands in for the functions of torch that exist only where torch has CUDA, so that the host code
// of the kernels runs unchanged on CPU tensors.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

extern "C" {

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  static int none;
  *guard = reinterpret_cast<DeviceGuardHandle>(&none);
  return 0;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

AOTITorchError torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool,
                                        char** message) {
  *message = nullptr;  // the emulator throws its errors
  return 0;
}

void torch_c10_cuda_free_error_msg(char*) {}

__attribute__((visibility("default"))) const char* mmdeform_cpu_capability() {
  return "emulated CUDA";
}

}  // extern "C"
