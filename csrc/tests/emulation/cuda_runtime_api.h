// The part of the CUDA API that launch.h needs; see cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"
