#pragma once

// The one macro for code that both the host compiler and nvcc's device pass compile.
#if defined(__CUDACC__)
#define DEEP_EP_HD __host__ __device__
#else
#define DEEP_EP_HD
#endif
