// The fast path: exits on Python's own objects, for the arguments that nearly every call brings.
#pragma once

#include <pybind11/pybind11.h>

namespace e2cm {

// Adds register_torch_types, try_exit_step, try_linear_step and try_decide to the module.
void bind_fast_path(pybind11::module_& m);

}  // namespace e2cm
