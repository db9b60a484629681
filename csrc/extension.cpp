// The module: the functions of what was built.
#include "cpu_ops.h"
#include "eager.h"
#include "operators.h"
#include "own_operators.h"
#include "triton_launch.h"
#ifdef FUSEDNORM_CUDA
#include "cuda_ops.h"
#endif

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr,
};

PyMODINIT_FUNC PyInit__C() {
  PyObject* const created = PyModule_Create(&module);
  if (created == nullptr) return nullptr;
  if (PyModule_AddFunctions(created, fusednorm::eager_methods) < 0) return nullptr;
  if (PyModule_AddFunctions(created, fusednorm::cpu_methods) < 0) return nullptr;
  if (PyModule_AddFunctions(created, fusednorm::triton_methods) < 0) return nullptr;
  if (PyModule_AddFunctions(created, fusednorm::operator_methods) < 0) return nullptr;
  if (PyModule_AddFunctions(created, fusednorm::own_operator_methods) < 0) return nullptr;
#ifdef FUSEDNORM_CUDA
  if (PyModule_AddFunctions(created, fusednorm::cuda_methods) < 0) return nullptr;
#endif
  // For `python -m fusednorm`.
  const char* const built = "built with " FUSEDNORM_BUILT ", compiler " __VERSION__;
  if (PyModule_AddStringConstant(created, "built", built) < 0) return nullptr;
  return created;
}
