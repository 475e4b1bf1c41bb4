// The ops as Python calls them, for the arguments that nearly every call brings.
#pragma once

#include <pybind11/pybind11.h>

namespace e2cm {

// Adds meet_torch, usual_exit_step, usual_linear_step and usual_decide to the module.
void bind_usual_calls(pybind11::module_& m);

}  // namespace e2cm
