// What the compiled CUDA library says about itself.

#ifndef MMDEFORM_CUDA_ARCHS
#define MMDEFORM_CUDA_ARCHS "unknown"
#endif

extern "C" __attribute__((visibility("default"))) const char* mmdeform_cuda_archs() {
  return MMDEFORM_CUDA_ARCHS;
}
